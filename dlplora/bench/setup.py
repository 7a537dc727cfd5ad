"""Definition of a timed system, and what all systems are built from: one base model, one pool, artifacts of realistic size.

Shapes: B rows, T tokens, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlplora.bench.model_shapes import first_experts, write_adapter
from dlplora.bench.timing import dtype_of
from dlplora.methods.base import FusionMethod, MethodContext
from dlplora.methods.registry import MethodSpec, build_method
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.router import MiniMLPRouter
from dlplora.tasks.nano import nano_suite
from dlplora.tasks.types import Item
from dlplora.types import PromptBatch


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One system with its settings."""

    system: str
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
        return f"{self.system} ({told})" if told else self.system


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts of equal length, all different, and how many tokens to generate."""

    prompts: PromptBatch
    new_tokens: int

    def options(self, pad_id: int) -> dict[str, Any]:
        """Greedy decoding of exactly that many tokens."""
        return {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens, "do_sample": False, "pad_token_id": pad_id}


@dataclass(frozen=True, kw_only=True)
class BenchSystem:
    """Something that generates.

    Args:
        entry: What it is.
        modules: What holds its tensors.
        generate: Workload and further options of ``generate`` -> token ids (B, T).
        granularity: How often routing may change; empty for what does not route.
        route: Routing alone, if it comes before the first token; returns the routing weights (B, E), or None.
        count_reroutes: How often rows are re-routed at their sentence ends while a workload is generated.
        max_batch: Rows it can serve at once.
        compilable: Whether a compiled decoding step makes sense for it.
        backend: Kernel backends that serve a workload.
    """

    entry: Entry
    modules: tuple[nn.Module, ...]
    generate: Callable[..., Tensor]
    granularity: str = ""
    route: Callable[[Workload], Tensor | None] | None = None
    count_reroutes: Callable[[Workload], int] | None = None
    max_batch: int | None = None
    compilable: bool = False
    backend: Callable[[Workload], str] = lambda workload: ""


@dataclass(frozen=True, kw_only=True)
class BenchSetup:
    """What systems are built from.

    Args:
        model, tokenizer: The base model; never changed.
        bank: The largest pool.
        folder: For files; the caller removes it.
        asset: Role and preset -> folder of a trained artifact that fits base model and pool; None if the pool is a random one.
    """

    model: Any
    tokenizer: Any
    bank: AdapterBank
    folder: Path
    asset: Callable[[str, str], Path] | None = None

    @property
    def dtype_name(self) -> str:
        """Name of the base model's dtype."""
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
        """What a method may use: trained artifacts where they fit, otherwise untrained ones of the same size."""
        embedding = self.model.get_input_embeddings()
        bank = self.pool(experts)
        bare = MethodContext(tokenizer=self.tokenizer, embedding=embedding, device=self.model.device, few_shot=_few_shot(bank.names))
        roles = build_method(spec).artifact_roles
        if self.asset is not None and experts == self.bank.num_experts:
            found = {role: self.asset(role, spec.name) for role in roles}
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
    """A router of the default size with random weights, about as confident as a trained one."""
    router = MiniMLPRouter(names, embedding=embedding)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            scale = 4.0 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        router.temperature.fill_(0.05)
    router.save(folder)
    return folder
