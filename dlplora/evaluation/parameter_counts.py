"""Number of trained parameters of each method, counted on the method bound to the embedded base model and its pool."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dlplora.errors import MethodError
from dlplora.inference.loading import load_backbone, nano_asset
from dlplora.methods.base import MethodContext
from dlplora.methods.registry import MethodSpec, build_method, discovered_specs
from dlplora.modules.lora_bank import AdapterBank


def nano_parameter_counts() -> tuple[int, dict[str, int | None]]:
    """``(experts of the embedded pool, trained parameters by name)`` for everything that ``method=NAME`` may name.

    Routers, gates and trained copies of adapters count, and so does the one adapter of a method that replaces the pool (multi-task
    LoRA); the pool's adapters, given to every method, do not. None for a method that cannot be bound to the embedded assets.
    """
    model, tokenizer = load_backbone(None)
    bank = AdapterBank.from_pool(nano_asset("pool"))
    context = MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings())
    return bank.num_experts, {name: _count(spec, bank, context) for name, spec in discovered_specs().items()}


def _count(spec: MethodSpec, bank: AdapterBank, context: MethodContext) -> int | None:
    method = build_method(spec)
    own_adapter = "all_tasks_adapter" in method.metadata.needs
    if not method.metadata.trainable and not own_adapter:
        return 0  # preparing it would merge or index the pool for nothing
    with tempfile.TemporaryDirectory() as scratch:
        stand_ins = type(method).example_artifacts(Path(scratch), bank, context)
        shipped = {role: nano_asset(role) for role in method.artifact_roles if nano_asset(role).is_dir() and role != "trained"}
        bound = MethodContext(tokenizer=context.tokenizer, embedding=context.embedding, artifacts={**stand_ins, **shipped})
        try:
            used = method.prepare(bank, bound)
        except MethodError:
            return None
    adapter = sum(entry.lora_a.numel() + entry.lora_b.numel() for entry in used.modules.values()) if own_adapter else 0
    return adapter + sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
