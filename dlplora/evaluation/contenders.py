"""Who is timed: the bare backbone, what PEFT offers, the released code's loop, and every method of ours.

All contenders of a process wrap module trees over one set of backbone weights, so that none pays for another's copy. Each is driven
through ``generate``; none is told apart by its name once it is built. Shapes: B rows, T tokens, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from dlplora.config import list_configs
from dlplora.errors import ConfigError, MethodError, nearest
from dlplora.evaluation.latency import dtype_of
from dlplora.evaluation.released_loop import ReleasedLoop
from dlplora.evaluation.shapes import first_experts, share_weights, write_adapter
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.generation import view_text
from dlplora.inference.loading import nano_asset
from dlplora.methods.base import FusionMethod, MethodContext
from dlplora.methods.registry import MethodSpec, build_method, load_method_spec, method_class
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.router import MiniMLPRouter
from dlplora.reporting.bench import BASE, SINGLE
from dlplora.tasks.nano import nano_suite
from dlplora.tasks.suite import Item
from dlplora.types import PromptBatch

MAX_PEFT_EXPERTS = 128
"""PEFT keeps every adapter of every layer as modules of its own; larger pools take it minutes to load."""
LOOP_PRESET = "dlp_code"
"""How the released code routes."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contender with its settings."""

    contender: str
    experts: int
    kept: int | None = None
    reroute_every: int | None = None
    backend: str = "auto"
    compiled: bool = False

    @property
    def label(self) -> str:
        """How the entry is called in messages."""
        parts = [f"{self.experts} experts" if self.experts > 1 else "", f"kept {self.kept}" if self.kept else ""]
        parts += [f"re-routed every {self.reroute_every}" if self.reroute_every else "", self.backend if self.backend != "auto" else ""]
        told = ", ".join(part for part in [*parts, "compiled" if self.compiled else ""] if part)
        return f"{self.contender} ({told})" if told else self.contender


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts of equal length, all different, and how many tokens to generate."""

    prompts: PromptBatch
    new_tokens: int

    def options(self, pad_id: int) -> dict[str, Any]:
        """Greedy decoding of exactly that many tokens."""
        return {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens, "do_sample": False, "pad_token_id": pad_id}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something that generates.

    Args:
        entry: What it is.
        modules: What holds its tensors.
        generate: Workload and further options of ``generate`` -> token ids (B, T).
        granularity: How often routing may change; empty for what does not route.
        plan: Routing alone, if it comes before the first token; returns the routing weights (B, E), or None.
        count_reroutes: How often rows are re-routed at sentence ends of their own while a workload is generated.
        max_batch: Rows it can serve at once.
        compilable: Whether a compiled decoding step makes sense for it.
        backend: Kernel backends used so far.
    """

    entry: Entry
    modules: tuple[nn.Module, ...]
    generate: Callable[..., Tensor]
    granularity: str = ""
    plan: Callable[[Workload], Tensor | None] | None = None
    count_reroutes: Callable[[Workload], int] | None = None
    max_batch: int | None = None
    compilable: bool = False
    backend: Callable[[], str] = str


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What contenders are built from.

    Args:
        model, tokenizer: The backbone; never changed.
        bank: The largest pool.
        folder: For files, emptied by whoever made it.
        shipped: Whether backbone and pool are the embedded ones, whose trained artefacts then fit.
    """

    model: Any
    tokenizer: Any
    bank: AdapterBank
    folder: Path
    shipped: bool

    @property
    def dtype_name(self) -> str:
        """Name of the backbone's dtype."""
        return str(dtype_of(self.model)).removeprefix("torch.")

    def pool(self, experts: int) -> AdapterBank:
        """The first experts of the pool."""
        return first_experts(self.bank, experts)

    def adapter_folders(self, number: int) -> list[Path]:
        """PEFT folders of the first adapters, written at first use."""
        folders = [self.folder / "adapters" / str(index) for index in range(number)]
        for index, folder in enumerate(folders):
            if not folder.is_dir():
                write_adapter(self.bank, index, folder, self.dtype_name)
        return folders

    def context(self, cls: type[FusionMethod], spec: MethodSpec, experts: int) -> MethodContext:
        """What a method may use: shipped artefacts where they fit, otherwise untrained stand-ins of true size."""
        embedding = self.model.get_input_embeddings()
        bank = self.pool(experts)
        bare = MethodContext(tokenizer=self.tokenizer, embedding=embedding, device=self.model.device, few_shot=_few_shot(bank.names))
        roles = build_method(spec).artifact_roles
        if self.shipped and experts == self.bank.num_experts:
            found = {role: nano_asset(f"trained/{spec.name}" if role == "trained" else role) for role in roles}
            return dataclasses.replace(bare, artifacts={role: path for role, path in found.items() if path.is_dir()})
        folder = self.folder / "artifacts" / f"{spec.name}-{experts}"
        made = cls.example_artifacts(folder, bank, bare)
        if "router" in roles:
            made["router"] = random_router(bank.names, embedding, folder / "full_router")
        if "all_tasks_adapter" in cls.metadata.needs and "multitask" in roles:
            made["multitask"] = self.adapter_folders(1)[0]
        return dataclasses.replace(bare, artifacts=made)


def _few_shot(names: Sequence[str]) -> Callable[[str, int], Sequence[Item]]:
    tasks = nano_suite().tasks
    return lambda name, num: tasks[list(names).index(name) % len(tasks)].items("train", num)


def random_router(names: Sequence[str], embedding: nn.Module, folder: Path, seed: int = 0) -> Path:
    """A router of the default size with random weights, about as sure of itself as a trained one."""
    router = MiniMLPRouter(names, embedding=embedding)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            scale = 4.0 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        router.temperature.fill_(0.05)
    router.save(folder)
    return folder


class ForcedRerouter(StoppingCriteria):
    """Re-routes every row after every so many tokens, through the router and the routing state of the running request; never stops.

    Args:
        model: The model that generates.
        workload: What it generates from.
        every: Tokens between two re-routes; none falls behind the last token.
    """

    def __init__(self, model: FusedCausalLM, workload: Workload, every: int) -> None:
        self.model, self.workload, self.every = model, workload, every
        self.num_reroutes = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Always False (B,)."""
        generated = input_ids[:, self.workload.prompts.input_ids.shape[1] :]
        number = generated.shape[1]
        if number and number % self.every == 0 and number < self.workload.new_tokens:
            self._reroute(generated)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def _reroute(self, generated: Tensor) -> None:
        tokenizer, state = self.model.tokenizer, self.model.slot.state
        assert state is not None, "generate binds the routing state"
        # Random weights emit ids that the small tokenizer does not have; the text only has to be of the right length.
        since = tokenizer.batch_decode(generated % len(tokenizer), skip_special_tokens=True)
        view = self.model.method.view
        texts = [view_text(view, prompt, text, 0, tokenizer) for prompt, text in zip(self.workload.prompts.texts, since, strict=True)]
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


def _base(shop: Workshop, entry: Entry) -> Contender:
    model = share_weights(shop.model)
    return Contender(entry=entry, modules=(model,), generate=_plain(model, shop.tokenizer.pad_token_id), compilable=True)


def _peft_with(shop: Workshop, number: int) -> Any:
    """The backbone with so many unmerged adapters named 0, 1, …, all in the backbone's dtype."""
    from peft import PeftModel

    first, *others = shop.adapter_folders(number)
    model = PeftModel.from_pretrained(share_weights(shop.model), str(first), adapter_name="0", autocast_adapter_dtype=False)
    for name, folder in enumerate(others, start=1):
        model.load_adapter(str(folder), str(name), autocast_adapter_dtype=False)
    return model.eval()


def _peft_single(shop: Workshop, entry: Entry) -> Contender:
    model = _peft_with(shop, 1)
    return Contender(entry=entry, modules=(model,), generate=_plain(model, shop.tokenizer.pad_token_id), compilable=True)


def _peft_mixed(shop: Workshop, entry: Entry) -> Contender:
    model = _peft_with(shop, entry.experts)

    def generate(workload: Workload, **options: Any) -> Tensor:
        names = [str(row % entry.experts) for row in range(len(workload.prompts))]
        return _plain(model, shop.tokenizer.pad_token_id, adapter_names=names)(workload, **options)

    return Contender(entry=entry, modules=(model,), generate=generate, granularity="prompt")


def _peft_xlora(shop: Workshop, entry: Entry) -> Contender:
    from peft import XLoraConfig, get_peft_model

    backbone = share_weights(shop.model)
    backbone.config.use_cache = False  # PEFT's class refuses to be built otherwise
    adapters = {str(index): str(folder) for index, folder in enumerate(shop.adapter_folders(entry.experts))}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=backbone.config.hidden_size, adapters=adapters)
    model = get_peft_model(backbone, config, autocast_adapter_dtype=False).to(dtype_of(shop.model)).eval()
    return Contender(entry=entry, modules=(model,), generate=_plain(model, shop.tokenizer.pad_token_id), granularity="token")


def _peft_arrow(shop: Workshop, entry: Entry) -> Contender:
    from peft import ArrowConfig, create_arrow_model

    paths = [str(folder) for folder in shop.adapter_folders(entry.experts)]
    config = ArrowConfig(top_k=min(3, entry.experts), rng_seed=0)
    model = create_arrow_model(share_weights(shop.model), paths, config, autocast_adapter_dtype=False).to(dtype_of(shop.model)).eval()
    return Contender(entry=entry, modules=(model,), generate=_plain(model, shop.tokenizer.pad_token_id), granularity="token")


def _released_loop(shop: Workshop, entry: Entry) -> Contender:
    spec = load_method_spec(LOOP_PRESET)
    context = shop.context(method_class(spec.method), spec, entry.experts)
    loop = ReleasedLoop(share_weights(shop.model), shop.pool(entry.experts), build_method(spec), context)

    def generate(workload: Workload, **options: Any) -> Tensor:
        return loop.generate(workload.prompts, **workload.options(shop.tokenizer.pad_token_id), **options)

    return Contender(
        entry=entry, modules=(loop.model, loop.method), generate=generate, granularity="prompt",
        plan=lambda workload: loop.plan(workload.prompts), max_batch=1,
    )  # fmt: skip


BUILTIN: dict[str, Callable[[Workshop, Entry], Contender]] = {
    BASE: _base,
    SINGLE: _peft_single,
    "peft_mixed": _peft_mixed,
    "peft_xlora": _peft_xlora,
    "peft_arrow": _peft_arrow,
    "released_loop": _released_loop,
}
"""Contenders that are no methods of this suite."""
POOL_FREE = {BASE: 0, SINGLE: 1}
"""Contenders that every sweep over pools leaves as they are -> adapters they hold."""


def ours(shop: Workshop, entry: Entry) -> Contender:
    """A method of this suite.

    Raises:
        DLPLoRAError: If it cannot be built for this pool, or cannot keep or re-route as asked.
    """
    spec = _spec(entry)
    method = build_method(spec)
    context = shop.context(type(method), spec, entry.experts)
    bank = shop.pool(entry.experts)
    if "trained" in context.artifacts:
        method = type(method).load(context.artifacts["trained"], bank, context)
    model = FusedCausalLM(share_weights(shop.model), shop.tokenizer, bank, method, backend=entry.backend, context=context)
    if entry.reroute_every is not None and method.granularity != "sentence":
        raise MethodError(f"'{entry.contender}' does not re-route at sentence ends; --reroute-every is for methods that do.")

    def named(workload: Workload) -> PromptBatch:
        names = tuple(bank.names[row % entry.experts] for row in range(len(workload.prompts)))
        return dataclasses.replace(workload.prompts, task_names=names)

    def generate(workload: Workload, **options: Any) -> Tensor:
        if entry.reroute_every is not None:
            forced = ForcedRerouter(model, workload, entry.reroute_every)
            options["stopping_criteria"] = [forced, *options.get("stopping_criteria", ())]
        prompts = named(workload)
        fixed = workload.options(shop.tokenizer.pad_token_id)
        return model.generate(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, prompts=prompts, **fixed, **options)

    def plan(workload: Workload) -> Tensor | None:
        state = model.plan(named(workload))
        return None if state is None else state.per_row()

    def count(workload: Workload) -> int:
        trace: list[dict[str, Any]] = []
        generate(workload, trace=trace)
        return len(trace) - len(workload.prompts)  # the prompts' own plans come first

    token, sentence = method.granularity == "token", method.granularity == "sentence"
    return Contender(
        entry=entry, modules=(model.model, method), generate=generate, granularity=method.granularity, plan=None if token else plan,
        count_reroutes=count if sentence else None, compilable=not token, backend=model.backends_used,
    )  # fmt: skip


def _spec(entry: Entry) -> MethodSpec:
    spec = load_method_spec(entry.contender)
    if entry.kept is None:
        return spec
    if not can_keep(spec):
        raise MethodError(f"'{entry.contender}' has no setting for the number of kept experts; leave --kept out or name other contenders.")
    return load_method_spec(entry.contender, {"selector": "topk", "k": entry.kept})


def can_keep(spec: MethodSpec) -> bool:
    """Whether a method can be told how many experts to keep."""
    return {"selector", "k"} <= set(getattr(method_class(spec.method).Config, "__dataclass_fields__", ()))


def known_contenders() -> list[str]:
    """Names of everything that can be timed; the preset of the bare backbone is the contender of that name."""
    return [*BUILTIN, *(name for name in list_configs("method") if name not in BUILTIN)]


def check_contender(name: str) -> None:
    """Refuse a name that nothing bears.

    Raises:
        ConfigError: With the nearest names.
    """
    known = known_contenders()
    if name not in known and Path(name).suffix not in {".yaml", ".yml"}:
        raise ConfigError(f"unknown contender '{name}'.{nearest(name, known)} Known: {', '.join(known)}; or a method YAML file.")


def build_contender(shop: Workshop, entry: Entry) -> Contender:
    """Make one contender.

    Raises:
        DLPLoRAError: If it cannot be made, with the reason.
    """
    if entry.contender not in BUILTIN:
        return ours(shop, entry)
    if entry.contender.startswith("peft_") and entry.experts > MAX_PEFT_EXPERTS:
        raise ConfigError(f"PEFT is timed with at most {MAX_PEFT_EXPERTS} adapters, kept as separate modules; got {entry.experts}.")
    return BUILTIN[entry.contender](shop, entry)


def facts(contender: Contender, workload: Workload) -> Mapping[str, Any]:
    """What a measurement says about its contender under a workload apart from times."""
    entry = contender.entry
    weights = None if contender.plan is None else contender.plan(workload)
    kept = None if weights is None else float((weights != 0).sum(dim=-1).float().mean())
    return {
        "contender": entry.contender, "experts": entry.experts, "kept": entry.kept, "reroute_every": entry.reroute_every,
        "compiled": entry.compiled, "granularity": contender.granularity, "backend": contender.backend(),
        "backend_asked": "" if entry.contender in BUILTIN else entry.backend, "experts_kept": kept,
        "sentence_reroutes": None if contender.count_reroutes is None else contender.count_reroutes(workload),
    }  # fmt: skip
