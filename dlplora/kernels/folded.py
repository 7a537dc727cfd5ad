"""Gather the kept experts once; a step then costs one LoRA of rank K * R, however many experts there are.

Routing weights of a prompt or sentence are constant until the next sentence end, so the kept experts are gathered into fixed buffers when
the weights are set. New weights are written into the same buffers, so addresses never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlplora.kernels.allocation import zeros

SHRINK_PLAN = "Use a smaller batch, keep fewer experts per prompt, or backend=dense, which needs no copy."


def kept_width(weights: Tensor) -> int:
    """The largest number of non-zero weights in a row, at least 1."""
    return max(1, int((weights != 0).sum(dim=-1).max()))


def kept_first(weights: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Indices (N, K) and weights (N, K) of the kept experts of each row, in ascending order; the rest is filled with zero weights.

    Equal weights therefore have equal buffers.
    """
    order = torch.sort((weights == 0).to(torch.int8), dim=-1, stable=True).indices[:, :width]
    return order, weights.gather(1, order)


def gather(lora_a: Tensor, lora_b: Tensor, order: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """A (N, K * R, I) and weighted B (N, K * R, O) of the kept experts of each row (``kept_first``); see ``FoldedBuffers``."""
    kept = kept.to(torch.promote_types(lora_b.dtype, torch.float32)).reshape(-1, 1, 1)
    order, rows = order.reshape(-1), len(order)
    b_sel = (lora_b.mT.index_select(0, order) * kept).to(lora_b.dtype)
    return lora_a.index_select(0, order).view(rows, -1, lora_a.shape[2]), b_sel.view(rows, -1, lora_b.shape[1])


class FoldedBuffers(nn.Module):
    """Kept experts of each row, weights and scaling folded in. A module, so that compiled graphs see its buffers as fixed.

    Args:
        rows: B, or 1 for weights that all rows share.
        width: K, experts a row can keep.
        lora_a: (E, R, I), for sizes, dtype and device. lora_b: (E, O, R).

    Attributes:
        a_sel: (B, K * R, I).
        b_sel: (B, K * R, O), multiplied by routing weight and scaling in float32, then cast.
        used: Experts of a row that eager products read; see ``use``.

    Raises:
        AllocationError: If the buffers do not fit into memory.
    """

    a_sel: Tensor
    b_sel: Tensor

    def __init__(self, rows: int, width: int, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__()
        self.width = min(width, lora_a.shape[0])
        self.rank = lora_a.shape[1]
        self.used = self.width
        inner = self.width * lora_a.shape[1]
        for name, size in (("a_sel", lora_a.shape[2]), ("b_sel", lora_b.shape[1])):
            what = f"folded {name[0].upper()} of {rows} rows with {self.width} experts each"
            buffer = zeros((rows, inner, size), dtype=lora_a.dtype, device=lora_a.device, what=what, shrink=SHRINK_PLAN)
            self.register_buffer(name, buffer, persistent=False)
        self._take_views()
        self.eval()

    def _apply(self, *args: Any, **kwargs: Any) -> FoldedBuffers:
        """Moving a module gives it other buffers, of which other views have to be taken."""
        super()._apply(*args, **kwargs)
        self._take_views()
        return self

    def _take_views(self) -> None:
        """Keep the views that depend on the buffers alone, and those that also depend on what is in use."""
        self._by_expert = [buffer.view(-1, self.rank, buffer.shape[2]) for buffer in (self.a_sel, self.b_sel)]
        self._lay_out()

    def _lay_out(self) -> None:
        """Keep the views that eager products read and re-routes write: taking them again costs a small base model 4 % of a decode step."""
        inner = self.used * self.rank
        self._eager = self._factors(inner)
        self._in_use = self.a_sel[:, :inner], self.b_sel[:, :inner]

    def _factors(self, inner: int) -> tuple[Tensor, Tensor]:
        """The first ``inner`` columns: A (B, I, inner) and B (B, inner, O); matrices for weights that all rows share."""
        a_sel, b_sel = self.a_sel[:, :inner].mT, self.b_sel[:, :inner]
        return (a_sel[0], b_sel[0]) if a_sel.shape[0] == 1 else (a_sel, b_sel)

    def write(
        self, lora_a: Tensor, lora_b: Tensor, weights: Tensor, rows: Tensor | None = None, chosen: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Write the weights of all rows, or of some, in place.

        Args:
            lora_a: (E, R, I). lora_b: (E, O, R).
            weights: Routing weight times scaling (N, E) with at most ``width`` non-zero entries a row.
            rows: Row indices (N,), which keep at most ``used`` experts; None for all.
            chosen: ``kept_first`` of the weights, if the caller has it.
        """
        order, kept = kept_first(weights, self.width) if chosen is None else chosen
        if rows is None:
            a_rows, b_rows = gather(lora_a, lora_b, order, kept)
            self.a_sel.copy_(a_rows)
            self.b_sel.copy_(b_rows)
            return
        # Behind the experts in use, B is zero before and after.
        a_rows, b_rows = gather(lora_a, lora_b, order[:, : self.used], kept[:, : self.used])
        a_used, b_used = self._in_use
        a_used.index_copy_(0, rows, a_rows)
        b_used.index_copy_(0, rows, b_rows)

    @staticmethod
    @torch.no_grad()
    def write_all(buffers: Sequence[FoldedBuffers], factors: Sequence[tuple[Tensor, Tensor]], chosen: tuple[Tensor, Tensor]) -> None:
        """Write the same choice for all rows of several layers, without gradients: the bits that ``write`` writes, with fewer operations.

        Their number is what counts with a small base model, not their size.

        Args:
            buffers: Of each layer, of one width.
            factors: A (E, R, I) and B (E, O, R) of each.
            chosen: ``kept_first`` of routing weight times scaling.
        """
        order, kept = chosen
        places = order.reshape(-1)
        for own, (lora_a, lora_b) in zip(buffers, factors, strict=True):
            torch.index_select(lora_a, 0, places, out=own._by_expert[0])
            torch.index_select(lora_b.mT, 0, places, out=own._by_expert[1])
        torch._foreach_mul_([own._by_expert[1] for own in buffers], [kept.reshape(-1, 1, 1)] * len(buffers))

    def use(self, kept: int) -> None:
        """Skip everything after the first ``kept`` experts, which is zero for every row.

        Only on a CPU, and not in compiled products: a captured graph must find the same sizes after the next write.
        """
        if self.a_sel.device.type == "cpu":
            used = min(max(1, kept), self.width)
            if used != self.used:
                self.used = used
                self._lay_out()

    def delta(self, x: Tensor) -> Tensor:
        """The delta (B, T, O) in the dtype of ``x`` (B, T, I); buffers of one row serve every row with 2-D products."""
        a_sel, b_sel = self._factors(self.width * self.rank) if torch.compiler.is_compiling() else self._eager
        inner = x.to(a_sel.dtype)
        if a_sel.ndim == 2:
            return ((inner @ a_sel) @ b_sel).to(x.dtype)
        return torch.bmm(torch.bmm(inner, a_sel), b_sel).to(x.dtype)


def fold(lora_a: Tensor, lora_b: Tensor, weights: Tensor, width: int | None = None) -> FoldedBuffers:
    """Gather the kept experts of each row into new buffers.

    Args:
        lora_a: (E, R, I). lora_b: (E, O, R).
        weights: Routing weight times scaling (B, E).
        width: K; None takes the largest number of kept experts in a row.
    """
    buffers = FoldedBuffers(weights.shape[0], kept_width(weights) if width is None else width, lora_a, lora_b)
    buffers.write(lora_a, lora_b, weights)
    return buffers


def fused_delta(x: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor) -> Tensor:
    """Fold and apply in one call, for (E,) and (B, E) weights; the same operation as ``reference.fused_delta``."""
    return fold(lora_a, lora_b, weights.reshape(-1, weights.shape[-1])).delta(x)
