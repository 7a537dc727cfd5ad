"""Fold a plan once, then pay for one LoRA of rank K * R however many experts there are.

Routing weights of a prompt or sentence are constant between sentence ends, so the kept experts are gathered into fixed buffers
when the plan is made. A later plan is written into the same buffers: their addresses never change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class FoldedPlan:
    """Kept experts of each row, weights and scaling folded in.

    Args:
        a_sel: (B, K * R, I).
        b_sel: (B, O, K * R), multiplied by routing weight and scaling in float32, then cast.
        width: K, experts a row can keep.
    """

    a_sel: Tensor
    b_sel: Tensor
    width: int

    def update_rows(self, lora_a: Tensor, lora_b: Tensor, rows: Tensor, weights: Tensor) -> None:
        """Write new plans for some rows in place.

        Args:
            lora_a: (E, R, I). lora_b: (E, O, R).
            rows: Row indices (N,).
            weights: Routing weight times scaling (N, E) with at most ``width`` non-zero entries a row.
        """
        a_rows, b_rows = _gather(lora_a, lora_b, weights, self.width)
        self.a_sel[rows] = a_rows
        self.b_sel[rows] = b_rows


def kept_width(weights: Tensor) -> int:
    """The largest number of non-zero weights in a row, at least 1."""
    return max(1, int((weights != 0).sum(dim=-1).max()))


def _gather(lora_a: Tensor, lora_b: Tensor, weights: Tensor, width: int) -> tuple[Tensor, Tensor]:
    # Indices of the non-zero weights first, in ascending order of expert, so that equal plans have equal buffers.
    order = torch.sort((weights == 0).to(torch.int8), dim=-1, stable=True).indices[:, :width]
    kept = weights.gather(1, order).to(torch.promote_types(lora_b.dtype, torch.float32))
    rows = weights.shape[0]
    a_sel = lora_a[order].flatten(1, 2)
    b_sel = (lora_b[order].to(kept.dtype) * kept[:, :, None, None]).to(lora_b.dtype)
    return a_sel, b_sel.permute(0, 2, 1, 3).reshape(rows, lora_b.shape[1], -1)


def fold(lora_a: Tensor, lora_b: Tensor, weights: Tensor, width: int | None = None) -> FoldedPlan:
    """Gather the kept experts of each row into new buffers.

    Args:
        lora_a: (E, R, I). lora_b: (E, O, R).
        weights: Routing weight times scaling (B, E).
        width: K; None takes the largest number of kept experts in a row.
    """
    width = kept_width(weights) if width is None else min(width, lora_a.shape[0])
    return FoldedPlan(*_gather(lora_a, lora_b, weights, width), width)


def apply(x: Tensor, plan: FoldedPlan) -> Tensor:
    """The delta of a folded plan; a plan of one row serves every row of ``x`` with 2-D products.

    Args:
        x: (B, T, I).
        plan: Buffers of B rows, or of one row shared by all.

    Returns:
        (B, T, O) in the dtype of ``x``.
    """
    inner = x.to(plan.a_sel.dtype)
    if plan.a_sel.shape[0] == 1:
        return ((inner @ plan.a_sel[0].T) @ plan.b_sel[0].T).to(x.dtype)
    return torch.bmm(torch.bmm(inner, plan.a_sel.mT), plan.b_sel.mT).to(x.dtype)


def fused_delta(x: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor) -> Tensor:
    """Fold and apply in one call, for (E,) and (B, E) weights; the same operation as ``reference.fused_delta``."""
    return apply(x, fold(lora_a, lora_b, weights.reshape(-1, weights.shape[-1])))
