"""Static merges of weight deltas: SVD, TIES, DARE and magnitude pruning, one merged adapter for all prompts.

Every expert's delta ``dW_e = s_e B_e A_e`` (O, I) is formed in float32 with its own scaling, the deltas are merged by PEFT's
functions, and the result is factored by SVD into one adapter, so that it runs through the fused layer like any other. Definitions:

* ``svd``: ``sum_e w_e dW_e``, truncated to the rank of one adapter.
* ``magnitude_prune``: the same sum over deltas with their smallest entries set to zero (``density`` is kept), nothing truncated.
* ``ties``: keep the largest entries, elect a sign per entry, average the deltas that agree with it (Yadav et al., arXiv:2306.01708).
* ``dare_linear``, ``dare_ties``: drop entries at random, divide by ``density``, then sum, or merge as TIES (Yu et al., arXiv:2311.03099).

Deviations from PEFT 0.21 ``add_weighted_adapter``, with reasons:

* PEFT's plain ``ties``/``dare``/``magnitude_prune`` act on A and B separately, with square roots of the weights. The papers, and this
  module, act on the deltas.
* PEFT gives the merged adapter the alpha of its rank, which rsLoRA sources turn into a scaling of sqrt(rank). Ours has scaling 1.
* PEFT draws DARE's masks from the global generator, in the order of the adapters. Ours depend only on seed, expert and module.
* The signs of TIES are elected without weights, as in PEFT. An expert of weight zero is left out, like one that is not listed in PEFT.
* Without ``svd_rank`` nothing is truncated: the merged adapter then has rank min(I, O), which costs more than one LoRA. Set it for
  large base models.
* Signs are elected without weights, so TIES is linear in non-zero weights and passes check T12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dlplora.errors import ConfigError
from dlplora.methods.base import FusionMethod, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank, BankEntry
from dlplora.modules.seeds import derive_seed
from dlplora.types import PromptBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """Settings shared by the merges; a merge ignores settings that its definition does not use."""

    weight: float | None = None
    """Weight of every expert; null is 1 / N for sums and 1 for TIES, which averages by itself."""
    density: float = 0.5
    """Share of entries kept."""
    majority_sign_method: Literal["total", "frequency"] = "total"
    """How TIES elects a sign: by the sum of the entries, or by the number of experts."""
    svd_rank: int | None = None
    """Rank of the merged adapter; null keeps everything (``svd``: the largest rank of the pool)."""

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ConfigError(f"'density' must be in (0, 1], got {self.density}.")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ConfigError(f"'svd_rank' must be at least 1, got {self.svd_rank}.")


def deltas_of(entry: BankEntry) -> Tensor:
    """``s_e B_e A_e`` of every expert for one module, float32 (E, O, I)."""
    return entry.scaling[:, None, None] * (entry.lora_b.float() @ entry.lora_a.float())


def factored(delta: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) with ``B A`` the best rank-R approximation of ``delta`` (O, I); exact for R None."""
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    keep = len(s) if rank is None else min(rank, len(s))
    root = s[:keep].sqrt()
    return (root[:, None] * vt[:keep]).float(), (u[:, :keep] * root).float()


class StaticMerge(FusionMethod):
    """Shared by the merges of weights; a subclass says how deltas become one (``combine``), or how factors do (``factors``)."""

    Config: ClassVar[type] = MergeConfig
    sums = True
    """Whether the deltas are added up, so that the default weight is 1 / N."""

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """The bank of the one merged expert."""
        super().prepare(bank, context)
        self._seed = context.seed
        share = self.config.weight if self.config.weight is not None else (1.0 / bank.num_experts if self.sums else 1.0)
        return self.merge(bank, torch.full((bank.num_experts,), float(share)))

    def merge(self, bank: AdapterBank, weights: Tensor) -> AdapterBank:
        """One expert merged with ``weights`` (E,)."""
        kept = [index for index, weight in enumerate(weights.tolist()) if weight != 0]
        names = [bank.names[index] for index in kept]
        merged: dict[str, list[Any]] = {}
        for module, entry in bank.modules.items():
            if any(entry.ranks[index] for index in kept):
                lora_a, lora_b = self.factors(entry.index(kept), weights[kept].to(entry.scaling), names, module, self.rank(bank))
            else:
                lora_a, lora_b = entry.lora_a.new_zeros(1, entry.lora_a.shape[2]), entry.lora_b.new_zeros(entry.lora_b.shape[1], 1)
            merged[module] = [(lora_a, lora_b, 1.0)]
            dtype, device = entry.lora_a.dtype, entry.lora_a.device
        return AdapterBank.from_tensors(("merged",), merged, dtype=dtype, device=device)

    @property
    def reported(self) -> Mapping[str, int]:
        """``num_merged``: experts in the merged adapter."""
        return {"num_merged": len(self.expert_names)}

    def rank(self, bank: AdapterBank) -> int | None:
        """Rank of the merged adapter; None truncates nothing."""
        return self.config.svd_rank  # type: ignore[no-any-return]

    def factors(self, entry: BankEntry, weights: Tensor, names: Sequence[str], module: str, rank: int | None) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R), float32, of the one adapter.

        Args:
            entry: The merged experts, for one module.
            weights: Theirs, none of them zero (E,).
            names: Theirs.
            module: Path of the module.
            rank: The largest R wanted; None for all that is there.
        """
        return factored(self.combine(deltas_of(entry), weights, names, module), rank)

    def combine(self, deltas: Tensor, weights: Tensor, names: Sequence[str], module: str) -> Tensor:
        """Deltas (E, O, I) and weights (E,) to one delta (O, I)."""
        raise NotImplementedError

    def dropped(self, deltas: Tensor, names: Sequence[str], module: str) -> list[Tensor]:
        """Each delta with entries dropped at random and the rest divided by the density."""
        from peft.utils.merge_utils import prune

        seed = getattr(self, "_seed", 0)
        kept = []
        for name, delta in zip(names, deltas, strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed("dare", seed, name, module))
                drawn = delta.cpu() if self.config.density == 1.0 else prune(delta.cpu(), self.config.density, "random", rescale=True)
                kept.append(drawn.to(delta.device))
        return kept

    def route(self, prompts: PromptBatch) -> Tensor:
        """Ones (B, 1)."""
        return torch.ones(len(prompts), 1, device=prompts.input_ids.device)


def _elected(deltas: Tensor, weights: Tensor, how: Literal["total", "frequency"]) -> Tensor:
    """The mean of the weighted deltas over the experts that agree with the elected sign."""
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    mask = calculate_majority_sign_mask(deltas, method=how)
    return disjoint_merge(deltas * weights[:, None, None], mask)


class SVDMerge(StaticMerge):
    """Average of the deltas, truncated to one adapter's rank."""

    name = "svd"
    metadata = Metadata(title="SVD of the averaged deltas", granularity="none", exempt=("T12",))

    def rank(self, bank: AdapterBank) -> int | None:
        """The configured rank, or the largest of the pool."""
        return self.config.svd_rank or bank.rank

    def combine(self, deltas: Tensor, weights: Tensor, names: Sequence[str], module: str) -> Tensor:
        """The weighted sum."""
        from peft.utils.merge_utils import task_arithmetic

        return task_arithmetic(list(deltas), weights)


class MagnitudePrune(StaticMerge):
    """Average of deltas with their smallest entries set to zero."""

    name = "magnitude_prune"
    metadata = Metadata(title="Magnitude pruning", granularity="none", exempt=("T2", "T3"))

    def combine(self, deltas: Tensor, weights: Tensor, names: Sequence[str], module: str) -> Tensor:
        """The weighted sum of the pruned deltas."""
        from peft.utils.merge_utils import magnitude_prune, task_arithmetic

        if self.config.density == 1.0:
            return task_arithmetic(list(deltas), weights)
        return magnitude_prune(list(deltas), weights, self.config.density)


class Ties(StaticMerge):
    """Trim, elect sign, merge."""

    name = "ties"
    metadata = Metadata(title="TIES", paper="https://arxiv.org/abs/2306.01708", granularity="none", exempt=("T2", "T3"))
    sums = False

    def combine(self, deltas: Tensor, weights: Tensor, names: Sequence[str], module: str) -> Tensor:
        """TIES over the trimmed deltas."""
        from peft.utils.merge_utils import prune

        density = self.config.density
        trimmed = deltas if density == 1.0 else torch.stack([prune(delta, density, "magnitude") for delta in deltas])
        return _elected(trimmed, weights, self.config.majority_sign_method)


class DareLinear(StaticMerge):
    """Drop and rescale, then average."""

    name = "dare_linear"
    metadata = Metadata(title="DARE, average", paper="https://arxiv.org/abs/2311.03099", granularity="none", exempt=("T2", "T3"))

    def combine(self, deltas: Tensor, weights: Tensor, names: Sequence[str], module: str) -> Tensor:
        """The weighted sum of the thinned deltas."""
        from peft.utils.merge_utils import task_arithmetic

        return task_arithmetic(self.dropped(deltas, names, module), weights)


class DareTies(StaticMerge):
    """Drop and rescale, then TIES without trimming."""

    name = "dare_ties"
    metadata = Metadata(title="DARE, TIES", paper="https://arxiv.org/abs/2311.03099", granularity="none", exempt=("T2", "T3"))
    sums = False

    def combine(self, deltas: Tensor, weights: Tensor, names: Sequence[str], module: str) -> Tensor:
        """TIES over the thinned deltas."""
        return _elected(torch.stack(self.dropped(deltas, names, module)), weights, self.config.majority_sign_method)
