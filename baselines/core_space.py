"""Merges in core space: all deltas are expressed in two small common bases and merged there into one adapter (Core Space,
arXiv:2509.17786).

Let the rows of ``V`` (Q, I) be the right singular vectors of the stacked ``A_e`` and the columns of ``U`` (O, P) the left singular
vectors of the stacked ``s_e B_e``. Every delta is ``s_e B_e A_e = U M_e V`` with a core ``M_e = U^T s_e B_e A_e V^T`` (P, Q), P and Q at
most the sum of the ranks. The cost of merging the cores does not depend on the size of the layer, and the representation is exact: the
mean of the cores, mapped back by U and V, is the mean of the deltas.

* ``avg_core``: the mean. Equals ``avg_delta`` to rounding; its adapter has at most the sum of the ranks.
* ``ties_core``: TIES on the cores (``merges.Ties``).
* ``dare_core``: DARE on the cores, then TIES without trimming (``merges.DareTies``).

Entries of a core are coordinates in the common bases, so TIES and DARE, which act on entries, differ from their versions outside core
space. Adapters of different ranks and targets are supported: a basis has as many vectors as the stack has independent rows, and an adapter
that does not adapt a module has a zero core there.

Deviations: each expert's scaling is multiplied into its B, in the stack too (the released code assumes one scaling). Directions with
singular value zero in the stack are left out. After DARE nothing is trimmed, as in ``dare_ties`` (the released code runs its TIES, trimming
included). Trimming is per module, as in ``ties``. Where the ranks add up to more than the layer's width, as on the nano pool, a basis
spans the whole space; the core is then a rotation of the delta and saves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlplora.methods.base import Metadata
from dlplora.modules.lora_bank import BankEntry

from .merges import DareTies, StaticMerge, Ties, factored

PAPER = "https://arxiv.org/abs/2509.17786"


@dataclass(frozen=True, slots=True)
class CoreSpace:
    """Deltas of one module in common bases; float64.

    Args:
        left: U, orthonormal columns (O, P).
        right: V, orthonormal rows (Q, I).
        cores: One core an expert (E, P, Q).
    """

    left: Tensor
    right: Tensor
    cores: Tensor

    @classmethod
    def of(cls, entry: BankEntry) -> CoreSpace:
        """The common bases of the experts of a module, and their cores."""
        lora_a = entry.lora_a.double()
        lora_b = entry.scaling.double()[:, None, None] * entry.lora_b.double()
        right = _row_basis(lora_a.flatten(0, 1))
        left = _row_basis(lora_b.mT.flatten(0, 1)).T
        return cls(left, right, (left.T @ lora_b) @ (lora_a @ right.T))

    def factors(self, core: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R), float32, with ``B A = U core V``; cut to the largest ``rank`` singular values if one is given."""
        lora_a, lora_b = factored(core, rank)
        return (lora_a.double() @ self.right).float(), (self.left @ lora_b.double()).float()


def not_zero(singular_values: Tensor, shape: Sequence[int]) -> Tensor:
    """Which singular values (K,) of a float64 matrix are more than rounding; boolean (K,)."""
    eps = torch.finfo(singular_values.dtype).eps
    return singular_values > singular_values.max() * max(shape) * eps


def _row_basis(rows: Tensor) -> Tensor:
    """Right singular vectors of a stack (N, D) as orthonormal rows (K, D), K its rank, largest first; at least one."""
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    return right[: max(1, int(not_zero(values, rows.shape).sum()))]


class InCoreSpace(StaticMerge):
    """Mixin that turns a merge of deltas into a merge of cores; put it before the merge class."""

    def factors(self, entry: BankEntry, weights: Tensor, names: Sequence[str], module: str, rank: int | None) -> tuple[Tensor, Tensor]:
        """A and B of ``U combine(cores) V``."""
        space = CoreSpace.of(entry)
        return space.factors(self.combine(space.cores, weights.to(space.cores), names, module), rank)


class AvgCore(InCoreSpace):
    """The mean of the cores."""

    name = "avg_core"
    metadata = Metadata(title="Core space, average", paper=PAPER, granularity="none")

    def combine(self, deltas: Tensor, weights: Tensor, names: Sequence[str], module: str) -> Tensor:
        """The weighted sum."""
        return torch.einsum("e,epq->pq", weights, deltas)


class TiesCore(InCoreSpace, Ties):
    """TIES on the cores."""

    name = "ties_core"
    metadata = Metadata(title="Core space, TIES", paper=PAPER, granularity="none", exempt=("T2", "T3"))


class DareCore(InCoreSpace, DareTies):
    """DARE on the cores, then TIES without trimming."""

    name = "dare_core"
    metadata = Metadata(title="Core space, DARE and TIES", paper=PAPER, granularity="none", exempt=("T2", "T3"))
