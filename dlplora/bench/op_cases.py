"""Operator counts of every method on every backend: routing (``plan`` in records), prefill and one decode step of a small random model.

Counts depend on sizes and not on values, so base model, adapters and trained parts are random. Shapes: E experts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlplora.atomic import write_atomically
from dlplora.bench.op_counter import Counts, count
from dlplora.errors import ConfigError, nearest
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.loading import nano_asset
from dlplora.inference.shapes import find_shape
from dlplora.kernels.backends import BACKENDS, GATE_BACKENDS, RoutingFacts, obstacle
from dlplora.methods.base import FusionMethod, MethodContext
from dlplora.methods.registry import build_method, load_method_spec, method_class
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.routing_state import RoutingState
from dlplora.modules.seeds import derive_seed
from dlplora.reporting.goldens import FORMAT, read_accepted
from dlplora.tasks.types import Item
from dlplora.training.adapter_export import save_adapter
from dlplora.types import PromptBatch

PROMPT_TOKENS = 16
NEW_TOKENS = 16
"""Tokens that requests are sized for; sentence-level methods get room for re-routing."""
COUNTED_BACKENDS = tuple(name for name in BACKENDS if name != "triton")
PHASES = ("plan", "prefill", "decode")
GOLDEN = "counters"
Cells = dict[str, dict[str, dict[str, int]]]
"""``method/backend`` -> phase -> quantity -> amount."""


@dataclass(frozen=True, kw_only=True)
class CountCase:
    """A base model with random weights, and the size of its pool; adapters on the query and value projections, as in the paper."""

    shape: str
    """Name of the base model's sizes."""
    experts: int
    rank: int = 8


CASES = {"nano": CountCase(shape="nano", experts=26), "tiny": CountCase(shape="tiny", experts=4, rank=4)}


def find_case(name: str, experts: int | None = None) -> CountCase:
    """A case by name, with another number of experts if one is given.

    Raises:
        ConfigError: If the name is unknown, or the number below one.
    """
    if name not in CASES:
        raise ConfigError(f"unknown shape '{name}'.{nearest(name, CASES)} Known: {', '.join(CASES)}.")
    if experts is not None and experts < 1:
        raise ConfigError(f"experts must be at least 1, got {experts}.")
    return CASES[name] if experts is None else replace(CASES[name], experts=experts)


@contextmanager
def _seeded() -> Iterator[None]:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _backbone(case: CountCase) -> tuple[Any, Any]:
    """A random causal LM of the nano base model's kind, float32 on the CPU, and the embedded tokenizer.

    Other sizes are put into nano's configuration: what a method finds in random weights depends on how they are drawn.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = str(nano_asset("backbone"))
    shape = find_shape(case.shape)
    sizes = {} if shape is None else {**asdict(shape), "head_dim": shape.hidden_size // shape.num_attention_heads}
    sizes = {key: value for key, value in sizes.items() if key not in {"model_type", "tie_word_embeddings"}}
    config = AutoConfig.from_pretrained(source, **sizes)
    with _seeded():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(source)


def _adapter(model: Any, rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Random factors for the query and value projections by module path."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: (
            0.1 * torch.randn(rank, module.in_features, generator=generator),
            0.1 * torch.randn(module.out_features, rank, generator=generator),
            2.0,
        )
        for path, module in model.named_modules()
        if path.endswith(("q_proj", "v_proj"))
    }


def _bank(model: Any, case: CountCase) -> AdapterBank:
    adapters = [_adapter(model, case.rank, seed) for seed in range(case.experts)]
    names = [f"expert{index:04d}" for index in range(case.experts)]
    return AdapterBank.from_tensors(names, {path: [adapter[path] for adapter in adapters] for path in adapters[0]})


def _adapter_folder(folder: Path, model: Any, rank: int) -> Path:
    """A PEFT folder with random factors, for methods that read an adapter of all tasks."""
    from peft import LoraConfig

    tensors = {}
    for path, (lora_a, lora_b, _) in _adapter(model, rank, 999).items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{path}.lora_B.weight"] = lora_b
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return save_adapter(folder, config, tensors)


def _examples(task: str, num: int) -> list[Item]:
    """Random training items."""
    return [Item(task, f"{task} asks {derive_seed(task, i) % 1000} ?", "yes") for i in range(num)]


@contextmanager
def fused_stand_in(name: str, case: CountCase, params: Mapping[str, Any] | None = None) -> Iterator[FusedCausalLM]:
    """A method on the base model of a case, with random trained parts; closed afterwards.

    Raises:
        MethodError: If the method is unknown.
    """
    spec = load_method_spec(name)
    method: FusionMethod = build_method(spec, {**method_class(spec.method).stand_in_params, **(params or {})})
    model, tokenizer = _backbone(case)
    bank = _bank(model, case)
    with tempfile.TemporaryDirectory() as folder, _seeded():
        context = MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings(), few_shot=_examples)
        artifacts = dict(type(method).example_artifacts(Path(folder), bank, context))
        for role in method.artifact_roles:
            if role.startswith("multitask"):
                ratio = int(role.partition("_r")[2] or 8) / 8
                artifacts[role] = _adapter_folder(Path(folder) / role, model, int(case.rank * ratio))
        fused = FusedCausalLM(model, tokenizer, bank, method, context=replace(context, artifacts=artifacts))
        try:
            yield fused
        finally:
            fused.close()


def _prompts(fused: FusedCausalLM, names: Sequence[str]) -> PromptBatch:
    ids = [3 + derive_seed("prompt", i) % (fused.config.vocab_size - 3) for i in range(PROMPT_TOKENS)]
    return PromptBatch.from_ids([ids], fused.tokenizer, task_names=[names[0]])


def count_method(name: str, case: CountCase, params: Mapping[str, Any] | None = None) -> Cells:
    """Counts of one method on every backend that can serve it, but ``triton``."""
    found: Cells = {}
    with fused_stand_in(name, case, params) as fused, torch.no_grad():
        prompts = _prompts(fused, fused.method.expert_names)
        fused.route(prompts, new_tokens=NEW_TOKENS)  # a method may search or cache when it first meets a task
        weights = fused.request_router.route(prompts)
        if weights is None:
            found[f"{name}/{fused.request_router.gate_backend}"] = _phases(fused, prompts, None)
            return found
        facts = RoutingFacts.of(weights)
        able = ["dense"] if fused.method.metadata.combine == "factor" else [b for b in COUNTED_BACKENDS if obstacle(b, facts) is None]
        if fused.request_router.weighs_parts:
            able = [backend for backend in able if backend in GATE_BACKENDS]
        if fused.method.weight_sum == "zero":
            able = able[:1]  # layers without weight take the same path on every backend
        for backend in able:
            fused.backend = backend
            found[f"{name}/{backend}"] = _phases(fused, prompts, weights)
    return found


def _phases(fused: FusedCausalLM, prompts: PromptBatch, weights: Tensor | None) -> dict[str, dict[str, int]]:
    def route() -> RoutingState | None:
        state = fused.route(prompts, new_tokens=NEW_TOKENS)
        if state is not None and state.is_zero and fused.method.weight_sum != "zero":
            # A random method may have found that no adapter helps, which would leave the layers out.
            state = fused.request_router.state(torch.full_like(state.weights, 1.0 / state.num_experts), own=True)
        if state is not None:
            with fused.slot.bind(state):
                pass
        return state

    route()  # makes the buffers, once for all requests of this size
    routing, state = count(route)
    ids = prompts.input_ids
    with nullcontext() if state is None else fused.slot.bind(state):
        prefill, out = count(lambda: fused(input_ids=ids, use_cache=True))
        decode, _ = count(lambda: fused(input_ids=ids[:, -1:], past_key_values=out.past_key_values, use_cache=True))
    counted: dict[str, Counts] = {"plan": routing, "prefill": prefill, "decode": decode}
    return {phase: asdict(counted[phase]) for phase in PHASES}


# ------------------------------------------------------------------ the accepted counts


def read_golden(path: Path) -> dict[str, Any]:
    """The file as written by ``write_golden``; raises what ``read_accepted`` raises."""
    return read_accepted(path, "shapes", "dlplora bench counters --accept")


def versions() -> dict[str, str]:
    """Packages that decide which operators run."""
    import transformers

    return {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}


def write_golden(path: Path, shape: str, cells: Cells, *, whole: bool) -> None:
    """Replace the counts of one shape; ``whole`` says that methods not in ``cells`` are gone."""
    known = read_golden(path)["shapes"] if path.is_file() else {}
    kept = {} if whole else known.get(shape, {})
    named = {cell.partition("/")[0] for cell in cells}
    merged = {**{cell: value for cell, value in kept.items() if cell.partition("/")[0] not in named}, **cells}
    shapes = {**known, shape: dict(sorted(merged.items()))}
    lines = [
        f'  "{name}": {{\n' + ",\n".join(f'   "{cell}": {json.dumps(value)}' for cell, value in body.items()) + "\n  }"
        for name, body in sorted(shapes.items())
    ]
    head = f'{{\n "format": {FORMAT},\n "versions": {json.dumps(versions())},\n "shapes": {{\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, head + ",\n".join(lines) + "\n }\n}\n")


def differences(golden: Mapping[str, Any], shape: str, cells: Cells, *, whole: bool) -> list[str]:
    """What differs from the accepted counts, a line each; empty if nothing does."""
    known: Cells = golden["shapes"].get(shape, {})
    lines = [f"{cell}: not in the golden file" for cell in cells if cell not in known]
    lines += [f"{cell}: in the golden file, not counted now" for cell in known if whole and cell not in cells]
    for cell, phases in cells.items():
        for phase, now in phases.items():
            before = known.get(cell, {}).get(phase, now)
            changed = [f"{key} {before.get(key)} became {now[key]}" for key in now if before.get(key) != now[key]]
            if changed:
                lines.append(f"{cell}: {phase}: {', '.join(changed)}")
    if lines and golden.get("versions") != versions():
        lines.append(f"note: accepted with {golden.get('versions')}, counted with {versions()}; other versions run other operators")
    return lines
