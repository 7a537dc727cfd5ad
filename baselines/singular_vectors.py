"""Merges of singular vectors: TSV-M, Iso-C and KnOTS with TIES, one merged adapter. Shapes: E experts, K values kept of each.

* ``tsv`` (Task Singular Vectors, arXiv:2412.00081): the largest K singular triples of every ``dW_e = U_e S_e V_e``; the ``U_e`` are
  concatenated as columns and the ``V_e`` as rows, and each is replaced by the nearest matrix with orthonormal columns or rows (``Z = P S
  Q`` becomes ``P Q``); ``dW = U' diag(S_1 .. S_E) V'``. K is ``min(I, O) / E`` (``space: full``, as the released code has it for whole
  matrices). In core space the matrices have the sum of the ranks as their size, so K is the mean rank: adapters of one rank lose nothing
  (``space: core``), and the method reduces to the orthogonalisation. Where the ranks add up to more than ``min(I, O)``, as on the nano
  pool (26 x 8 > 128), both settings are the same.
* ``iso_c`` (Isotropic merging, arXiv:2502.04959): ``sum_e dW_e = U S V``, then every singular value becomes their mean.
  ``mean_over: nonzero`` (the default, and what core space gives) takes the mean over values that are not zero; ``full`` divides by
  ``min(I, O)``, most of which are zero for a few low-rank adapters.
* ``knots_ties`` (KnOTS, arXiv:2410.19735): ``[dW_1 .. dW_E] = U S [V_1 .. V_E]``, TIES on the ``S V_e``, ``dW = U TIES(S V_1, ..)``.

All are computed in core space (``core_space.CoreSpace``), which does not change the result: singular vectors transform with the bases.

Deviations: TSV keeps no more triples than an adapter has (the released code fills up with vectors of singular value zero, which are
arbitrary but take part in the orthogonalisation), and at least one. Iso writes its mean to the values that are not zero (the
released code to all; singular vectors of zeros are arbitrary). KnOTS trims per module, as ``ties`` (released code: one vector of all
parameters); its released configurations search the density and the weight on validation data, ours are those of ``ties``.
A weight multiplies an expert's singular values (TSV), its delta (Iso) or its part (KnOTS); each is 1 unless set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dlplora.errors import ConfigError
from dlplora.methods.base import Metadata
from dlplora.modules.lora_bank import BankEntry

from .core_space import CoreSpace, not_zero
from .merges import StaticMerge, Ties


@dataclass(frozen=True, kw_only=True, slots=True)
class SingularConfig:
    """What these merges share."""

    weight: float = 1.0
    """Weight of every expert."""
    svd_rank: int | None = None
    """Rank of the merged adapter; null keeps everything."""

    def __post_init__(self) -> None:
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ConfigError(f"'svd_rank' must be at least 1, got {self.svd_rank}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TSVConfig(SingularConfig):
    """TSV's settings."""

    space: Literal["full", "core"] = "full"
    """The size that is divided among the experts: the layer's, or the core's, which cuts nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IsoConfig(SingularConfig):
    """Iso-C's settings."""

    mean_over: Literal["nonzero", "full"] = "nonzero"
    """Which singular values the mean is taken over: those that are not zero, or all ``min(I, O)``."""


class TSV(StaticMerge):
    """Task singular vectors, merged."""

    name = "tsv"
    metadata = Metadata(title="TSV-M", paper="https://arxiv.org/abs/2412.00081", granularity="none", exempt=("T3",))
    Config = TSVConfig

    def factors(self, entry: BankEntry, weights: Tensor, names: Sequence[str], module: str, rank: int | None) -> tuple[Tensor, Tensor]:
        """A and B of the orthogonalised triples."""
        space = CoreSpace.of(entry)
        size = min(space.cores.shape[1:] if self.config.space == "core" else (space.left.shape[0], space.right.shape[1]))
        share = max(1, size // len(names))
        left, values, right = [], [], []
        for core, own_rank, weight in zip(space.cores, entry.ranks, weights.to(space.cores), strict=True):
            u, s, vt = torch.linalg.svd(core, full_matrices=False)
            keep = min(share, own_rank)
            left.append(u[:, :keep])
            values.append(weight * s[:keep])
            right.append(vt[:keep])
        core = (_orthogonal(torch.cat(left, dim=1)) * torch.cat(values)) @ _orthogonal(torch.cat(right))
        return space.factors(core, rank)


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with all non-zero singular values replaced by one (Procrustes)."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    real = not_zero(s, matrix.shape)
    return u[:, real] @ vt[real]


class IsoC(StaticMerge):
    """The sum of the deltas with a flat spectrum."""

    name = "iso_c"
    metadata = Metadata(title="Iso-C", paper="https://arxiv.org/abs/2502.04959", granularity="none", exempt=("T2", "T3", "T12"))
    Config = IsoConfig

    def factors(self, entry: BankEntry, weights: Tensor, names: Sequence[str], module: str, rank: int | None) -> tuple[Tensor, Tensor]:
        """A and B of the flattened sum."""
        space = CoreSpace.of(entry)
        u, s, vt = torch.linalg.svd(torch.einsum("e,epq->pq", weights.to(space.cores), space.cores), full_matrices=False)
        real = not_zero(s, space.cores.shape[1:])
        count = int(real.sum()) if self.config.mean_over == "nonzero" else min(space.left.shape[0], space.right.shape[1])
        return space.factors(s[real].sum() / max(1, count) * (u[:, real] @ vt[real]), rank)


class KnotsTies(Ties):
    """TIES on the parts of a joint singular value decomposition."""

    name = "knots_ties"
    metadata = Metadata(title="KnOTS, TIES", paper="https://arxiv.org/abs/2410.19735", granularity="none", exempt=("T2", "T3"))

    def factors(self, entry: BankEntry, weights: Tensor, names: Sequence[str], module: str, rank: int | None) -> tuple[Tensor, Tensor]:
        """A and B of ``U TIES(S V_e)``."""
        space = CoreSpace.of(entry)
        joined = space.cores.transpose(0, 1).flatten(1)  # [M_1 .. M_E] (P, E Q) has the U and S of [dW_1 .. dW_E]
        u, s, _ = torch.linalg.svd(joined, full_matrices=False)
        u = u[:, not_zero(s, joined.shape)]
        parts = (u.T @ space.cores) @ space.right  # S V_e = U^T dW_e, in the coordinates of the inputs (E, K, I)
        merged = self.combine(parts, weights.to(parts), names, module)
        if rank is None:
            return merged.float(), (space.left @ u).float()
        return CoreSpace(space.left @ u, torch.eye(merged.shape[1]).to(merged), parts).factors(merged, rank)
