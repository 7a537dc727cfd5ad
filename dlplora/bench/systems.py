"""The timed systems: the base model, PEFT's own methods, the loop of the released code, and every method of this package.

All systems of a process share one set of base weights and wrap it in different modules. Each is run through ``generate``; after
construction nothing depends on its name. Shapes: B rows, T tokens, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlplora.bench.model_shapes import share_weights
from dlplora.bench.released_loop import ReleasedLoop
from dlplora.bench.setup import BenchSetup, BenchSystem, Entry, Workload
from dlplora.bench.timing import dtype_of
from dlplora.config import list_configs
from dlplora.errors import ConfigError, MethodError, nearest
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.generation import RoutedCriterion, view_text
from dlplora.inference.question import routed_tail
from dlplora.methods.registry import MethodSpec, build_method, load_method_spec, method_class
from dlplora.reporting.latency.records import BASE, SINGLE
from dlplora.tasks.nano import nano_suite
from dlplora.types import PromptBatch

MAX_PEFT_EXPERTS = 128
"""PEFT keeps every adapter of every layer as modules of its own; larger pools take it minutes to load."""
LOOP_PRESET = "dlp_code"
"""How the released code routes."""


class ForcedRerouter(RoutedCriterion):
    """Re-routes every row after a fixed number of tokens, through the router and the routing state of the running request; never stops.

    Args:
        model: The model that generates.
        workload: What it generates from.
        every: Tokens between two re-routes; none falls after the last token.
    """

    def __init__(self, model: FusedCausalLM, workload: Workload, every: int) -> None:
        self.model, self.workload, self.every = model, workload, every
        self.num_reroutes = 0
        self._tail = functools.cache(routed_tail)  # as long as the one request, like the re-router's own

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Always False (B,)."""
        generated = input_ids[:, self.workload.prompts.input_ids.shape[1] :]
        number = generated.shape[1]
        if number and number % self.every == 0 and number < self.workload.new_tokens:
            self._reroute(generated)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def _reroute(self, generated: Tensor) -> None:
        tokenizer, state = self.model.tokenizer, self.state
        assert state is not None, "generate gives its routing state"
        # Random weights emit ids that the small tokenizer does not have; the text only has to be of the right length.
        since = tokenizer.batch_decode((generated % len(tokenizer)).tolist(), skip_special_tokens=True)
        view, prompts = self.model.method.view, self.workload.prompts.texts
        texts = [view_text(view, prompt, text, 0, tokenizer, self._tail) for prompt, text in zip(prompts, since, strict=True)]
        weights = self.model.method.route(PromptBatch.from_texts(texts, tokenizer, device=self.model.device))
        assert weights is not None
        state.update_rows(torch.arange(len(texts), device=state.weights.device), weights.to(state.weights))
        self.num_reroutes += len(texts)


def _plain(model: Any, pad_id: int, **fixed: Any) -> Callable[..., Tensor]:
    """``generate`` of a Hugging Face or PEFT model over a workload."""

    def generate(workload: Workload, **options: Any) -> Tensor:
        ids, mask = workload.prompts.input_ids, workload.prompts.attention_mask
        return model.generate(input_ids=ids, attention_mask=mask, **workload.options(pad_id), **fixed, **options)  # type: ignore[no-any-return]

    return generate


def _base(setup: BenchSetup, entry: Entry) -> BenchSystem:
    model = share_weights(setup.model)
    return BenchSystem(entry=entry, modules=(model,), generate=_plain(model, setup.tokenizer.pad_token_id), compilable=True)


def _peft_with(setup: BenchSetup, number: int) -> Any:
    """The base model with ``number`` unmerged adapters named 0, 1, …, all in the base model's dtype."""
    from peft import PeftModel

    first, *others = setup.adapter_folders(number)
    model = PeftModel.from_pretrained(share_weights(setup.model), str(first), adapter_name="0", autocast_adapter_dtype=False)
    for name, folder in enumerate(others, start=1):
        model.load_adapter(str(folder), str(name), autocast_adapter_dtype=False)
    return model.eval()


def _peft_single(setup: BenchSetup, entry: Entry) -> BenchSystem:
    model = _peft_with(setup, 1)
    return BenchSystem(entry=entry, modules=(model,), generate=_plain(model, setup.tokenizer.pad_token_id), compilable=True)


def _peft_mixed(setup: BenchSetup, entry: Entry) -> BenchSystem:
    model = _peft_with(setup, entry.experts)

    def generate(workload: Workload, **options: Any) -> Tensor:
        names = [str(row % entry.experts) for row in range(len(workload.prompts))]
        return _plain(model, setup.tokenizer.pad_token_id, adapter_names=names)(workload, **options)

    return BenchSystem(entry=entry, modules=(model,), generate=generate, granularity="prompt")


def _peft_xlora(setup: BenchSetup, entry: Entry) -> BenchSystem:
    from peft import XLoraConfig, get_peft_model

    backbone = share_weights(setup.model)
    backbone.config.use_cache = False  # PEFT's class refuses to be built otherwise
    adapters = {str(index): str(folder) for index, folder in enumerate(setup.adapter_folders(entry.experts))}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=backbone.config.hidden_size, adapters=adapters)
    model = get_peft_model(backbone, config, autocast_adapter_dtype=False).to(dtype_of(setup.model)).eval()
    return BenchSystem(entry=entry, modules=(model,), generate=_plain(model, setup.tokenizer.pad_token_id), granularity="token")


def _peft_arrow(setup: BenchSetup, entry: Entry) -> BenchSystem:
    from peft import ArrowConfig, create_arrow_model

    paths = [str(folder) for folder in setup.adapter_folders(entry.experts)]
    config = ArrowConfig(top_k=min(3, entry.experts), rng_seed=0)
    model = create_arrow_model(share_weights(setup.model), paths, config, autocast_adapter_dtype=False).to(dtype_of(setup.model)).eval()
    return BenchSystem(entry=entry, modules=(model,), generate=_plain(model, setup.tokenizer.pad_token_id), granularity="token")


def _released_loop(setup: BenchSetup, entry: Entry) -> BenchSystem:
    spec = load_method_spec(LOOP_PRESET)
    context = setup.context(method_class(spec.method), spec, entry.experts)
    loop = ReleasedLoop(share_weights(setup.model), setup.pool(entry.experts), build_method(spec), context)

    def generate(workload: Workload, **options: Any) -> Tensor:
        return loop.generate(workload.prompts, **workload.options(setup.tokenizer.pad_token_id), **options)

    return BenchSystem(
        entry=entry, modules=(loop.model, loop.method), generate=generate, granularity="prompt",
        route=lambda workload: loop.route(workload.prompts), max_batch=1,
    )  # fmt: skip


BUILTIN: dict[str, Callable[[BenchSetup, Entry], BenchSystem]] = {
    BASE: _base,
    SINGLE: _peft_single,
    "peft_mixed": _peft_mixed,
    "peft_xlora": _peft_xlora,
    "peft_arrow": _peft_arrow,
    "released_loop": _released_loop,
}
"""Systems that are not methods of this suite."""
POOL_FREE = {BASE: 0, SINGLE: 1}
"""Systems that sweeps over pools do not change -> number of their adapters."""


def build_method_system(setup: BenchSetup, entry: Entry) -> BenchSystem:
    """A method of this suite.

    Raises:
        DLPLoRAError: If it cannot be built for this pool, or cannot keep or re-route as asked.
    """
    spec = _spec(entry)
    method = build_method(spec)
    context = setup.context(type(method), spec, entry.experts)
    bank = setup.pool(entry.experts)
    if "trained" in context.artifacts:
        method = type(method).load(context.artifacts["trained"], bank, context)
    model = FusedCausalLM(share_weights(setup.model), setup.tokenizer, bank, method, backend=entry.backend, context=context)
    if entry.compiled:
        model.compile()
    if entry.reroute_every is not None and method.granularity != "sentence":
        raise MethodError(f"'{entry.system}' does not re-route at sentence ends; --reroute-every is for methods that do.")

    sentence = method.granularity == "sentence"
    gated = method.granularity == "token" or any(layer.gate is not None for layer in model.patched.layers.values())

    def named(workload: Workload) -> PromptBatch:
        names = tuple(bank.names[row % entry.experts] for row in range(len(workload.prompts)))
        return dataclasses.replace(workload.prompts, task_names=names)

    def generate(workload: Workload, **options: Any) -> Tensor:
        if entry.reroute_every is not None:
            forced = ForcedRerouter(model, workload, entry.reroute_every)
            options["stopping_criteria"] = [forced, *options.get("stopping_criteria", ())]
        prompts = named(workload)
        fixed = workload.options(setup.tokenizer.pad_token_id)
        return model.generate(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, prompts=prompts, **fixed, **options)

    def route(workload: Workload) -> Tensor | None:
        state = model.route(named(workload), new_tokens=workload.new_tokens)
        return None if state is None else model.request_router.per_expert(state.per_row())

    def backend(workload: Workload) -> str:
        state = None if gated else model.route(named(workload), new_tokens=workload.new_tokens)
        return model.backends_used() if state is None else state.backend

    def count(workload: Workload) -> int:
        trace: list[dict[str, Any]] = []
        generate(workload, trace=trace)
        return len(trace) - len(workload.prompts)  # the prompts' own routing comes first

    return BenchSystem(
        entry=entry, modules=(model.model, method), generate=generate, granularity=method.granularity, route=None if gated else route,
        count_reroutes=count if sentence else None, compilable=True, backend=backend,
    )  # fmt: skip


def _spec(entry: Entry) -> MethodSpec:
    spec = load_method_spec(entry.system)
    if entry.kept is None:
        return spec
    if not can_keep(spec):
        raise MethodError(f"'{entry.system}' has no setting for the number of kept experts; leave --kept out or name other systems.")
    return load_method_spec(entry.system, {"selector": "topk", "top_k": entry.kept})


def can_keep(spec: MethodSpec) -> bool:
    """Whether a method can be told how many experts to keep."""
    return {"selector", "top_k"} <= set(getattr(method_class(spec.method).Config, "__dataclass_fields__", ()))


def known_systems() -> list[str]:
    """Names of everything that can be timed; the preset of the bare base model is the system of that name."""
    return [*BUILTIN, *(name for name in list_configs("method") if name not in BUILTIN)]


def check_system(name: str) -> None:
    """Refuse an unknown name.

    Raises:
        ConfigError: With the nearest names.
    """
    known = known_systems()
    if name not in known and Path(name).suffix not in {".yaml", ".yml"}:
        raise ConfigError(f"unknown system '{name}'.{nearest(name, known)} Known: {', '.join(known)}; or a method YAML file.")


def build_system(setup: BenchSetup, entry: Entry) -> BenchSystem:
    """Make one system.

    Raises:
        DLPLoRAError: If it cannot be made, with the reason.
    """
    if entry.system not in BUILTIN:
        return build_method_system(setup, entry)
    if entry.system.startswith("peft_") and entry.experts > MAX_PEFT_EXPERTS:
        raise ConfigError(f"PEFT is timed with at most {MAX_PEFT_EXPERTS} adapters, kept as separate modules; got {entry.experts}.")
    return BUILTIN[entry.system](setup, entry)


def facts(system: BenchSystem, workload: Workload) -> Mapping[str, Any]:
    """Facts of a measurement about its system under a workload, without times."""
    entry = system.entry
    weights = None if system.route is None else system.route(workload)
    kept = None if weights is None else float((weights != 0).sum(dim=-1).float().mean())
    return {
        "contender": entry.system, "experts": entry.experts, "kept": entry.kept, "reroute_every": entry.reroute_every,
        "compiled": entry.compiled, "granularity": system.granularity, "backend": system.backend(workload),
        "backend_asked": "" if entry.system in BUILTIN else entry.backend, "experts_kept": kept,
        "sentence_reroutes": None if system.count_reroutes is None else system.count_reroutes(workload),
    }  # fmt: skip


def make_workload(tokenizer: Any, device: torch.device, batch_size: int, prompt_tokens: int, new_tokens: int) -> Workload:
    """Rows of questions from the embedded suite, different in every row, all cut to one length."""
    tasks = nano_suite().tasks
    rows: list[list[int]] = []
    for row in range(batch_size):
        task = tasks[row % len(tasks)]
        ids: list[int] = []
        number = 8
        while len(ids) < prompt_tokens:
            number *= 2
            text = " ".join(f"{item.prompt} {item.answer}." for item in task.items("test", number, seed=row)[row % 4 :])
            ids = list(tokenizer(text)["input_ids"])
        rows.append(ids[:prompt_tokens])
    return Workload(prompts=PromptBatch.from_ids(rows, tokenizer, device=device), new_tokens=new_tokens)
