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

WIDENED_NUMEL = 1 << 18
"""Elements of factors up to which a CPU multiplies a single token per row in float32: starting a product in 16 bits takes it longer."""
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
    """A (..., N, K * R, I) and weighted B (..., N, K * R, O) of the kept experts of each row (``kept_first``); see ``FoldedBuffers``.

    Args:
        lora_a: (..., E, R, I). lora_b: (..., E, O, R).
        order, kept: (N, K).
    """
    kept = kept.to(torch.promote_types(lora_b.dtype, torch.float32)).reshape(-1, 1, 1)
    places, rows = order.reshape(-1), len(order)
    a_sel = lora_a.index_select(-3, places)
    b_sel = (lora_b.mT.index_select(-3, places) * kept).to(lora_b.dtype)
    return a_sel.unflatten(-3, (rows, -1)).flatten(-3, -2), b_sel.unflatten(-3, (rows, -1)).flatten(-3, -2)


class FoldedBuffers(nn.Module):
    """Kept experts of each row, weights and scaling folded in. A module, so that compiled graphs see its buffers as fixed.

    Args:
        rows: B, or 1 for weights that all rows share.
        width: K, experts a row can keep.
        lora_a: (E, R, I), for sizes, dtype and device. lora_b: (E, O, R).
        storage: Zeros for ``a_sel`` and ``b_sel``; None allocates them.

    Attributes:
        a_sel: (B, K * R, I).
        b_sel: (B, K * R, O), multiplied by routing weight and scaling in float32, then cast.
        used: Experts of a row that eager products read; see ``use``.

    Raises:
        AllocationError: If the buffers do not fit into memory.
    """

    a_sel: Tensor
    b_sel: Tensor

    def __init__(self, rows: int, width: int, lora_a: Tensor, lora_b: Tensor, storage: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.width = min(width, lora_a.shape[0])
        self.rank = lora_a.shape[1]
        self.used = self.width
        a_sel, b_sel = (one[0] for one in _zeros(1, rows, width, lora_a, lora_b)) if storage is None else storage
        self.register_buffer("a_sel", a_sel, persistent=False)
        self.register_buffer("b_sel", b_sel, persistent=False)
        self._lay_out()
        self.eval()

    def _apply(self, *args: Any, **kwargs: Any) -> FoldedBuffers:
        """Moving a module gives it other buffers, of which other views have to be taken."""
        super()._apply(*args, **kwargs)
        self._lay_out()
        return self

    def _lay_out(self) -> None:
        """Keep the views that eager products read: taking them again costs a small base model 4 % of a decode step."""
        self._eager = a_sel, b_sel = self._factors(self.used * self.rank)
        self._widens = a_sel.device.type == "cpu" and a_sel.itemsize == 2 and max(a_sel.numel(), b_sel.numel()) <= WIDENED_NUMEL

    def _factors(self, inner: int) -> tuple[Tensor, Tensor]:
        """The first ``inner`` columns: A (B, I, inner) and B (B, inner, O); matrices for weights that all rows share."""
        a_sel, b_sel = self.a_sel[:, :inner].mT, self.b_sel[:, :inner]
        return (a_sel[0], b_sel[0]) if a_sel.shape[0] == 1 else (a_sel, b_sel)

    def write(self, lora_a: Tensor, lora_b: Tensor, weights: Tensor, rows: Tensor | None = None) -> None:
        """Write the weights of all rows, or of some, in place.

        Args:
            lora_a: (E, R, I). lora_b: (E, O, R).
            weights: Routing weight times scaling (N, E) with at most ``width`` non-zero entries a row.
            rows: Row indices (N,), which keep at most ``used`` experts; None for all.
        """
        order, kept = kept_first(weights, self.width)
        if rows is None:
            a_rows, b_rows = gather(lora_a, lora_b, order, kept)
            self.a_sel.copy_(a_rows)
            self.b_sel.copy_(b_rows)
            return
        # Behind the experts in use, B is zero before and after.
        a_rows, b_rows = gather(lora_a, lora_b, order[:, : self.used], kept[:, : self.used])
        inner = a_rows.shape[1]
        self.a_sel[:, :inner].index_copy_(0, rows, a_rows)
        self.b_sel[:, :inner].index_copy_(0, rows, b_rows)

    def use(self, kept: int) -> None:
        """Skip everything after the first ``kept`` experts, which is zero for every row.

        Only on a CPU, and not in compiled products: a captured graph must find the same sizes after the next write.
        """
        used = min(max(1, kept), self.width)
        if used != self.used and self.a_sel.device.type == "cpu":
            self.used = used
            self._lay_out()

    def delta(self, x: Tensor) -> Tensor:
        """The delta (B, T, O) in the dtype of ``x`` (B, T, I); buffers of one row serve every row with 2-D products."""
        compiling = torch.compiler.is_compiling()
        a_sel, b_sel = self._factors(self.width * self.rank) if compiling else self._eager
        if self._widens and x.shape[1] == 1 and not compiling:
            a_sel, b_sel = a_sel.float(), b_sel.float()
        inner = x.to(a_sel.dtype)
        if a_sel.ndim == 2:
            return ((inner @ a_sel) @ b_sel).to(x.dtype)
        return torch.bmm(torch.bmm(inner, a_sel), b_sel).to(x.dtype)


class FoldedStack:
    """Buffers of layers of equal sizes that keep the same experts, written together: it is the number of operations that costs.

    Args:
        layers: Buffers of each of the L layers.
        storage: What these are views of: (L, B, K * R, I) and (L, B, K * R, O).
    """

    def __init__(self, layers: Sequence[FoldedBuffers], storage: Sequence[Tensor]) -> None:
        self.layers, self._storage = layers, storage
        self._by_expert = [buffer.view(len(layers), -1, layers[0].rank, buffer.shape[3]) for buffer in storage]

    @classmethod
    def allocate(cls, rows: int, width: int, factors: Sequence[tuple[Tensor, Tensor]]) -> FoldedStack:
        """Empty buffers; arguments as for ``FoldedBuffers``, with A (E, R, I) and B (E, O, R) of each layer.

        Raises:
            AllocationError: If the buffers do not fit into memory.
        """
        storage = _zeros(len(factors), rows, width, *factors[0])
        views = zip(factors, *storage, strict=True)
        return cls([FoldedBuffers(rows, width, lora_a, lora_b, (a, b)) for (lora_a, lora_b), a, b in views], storage)

    def split(self) -> list[FoldedStack]:
        """One stack a layer, over the same buffers."""
        places = range(len(self.layers))
        return [FoldedStack([self.layers[at]], [buffer[at : at + 1] for buffer in self._storage]) for at in places]

    @torch.no_grad()
    def write(self, lora_a: Tensor, lora_b: Tensor, chosen: tuple[Tensor, Tensor], rows: Tensor | None, kept: int) -> None:
        """Write the weights of all rows, or of some, in place: the bits that ``FoldedBuffers.write`` writes.

        Args:
            lora_a: (L, E, R, I). lora_b: (L, E, O, R).
            chosen: ``kept_first`` of routing weight times scaling (N, E).
            rows: Row indices (N,); None for all.
            kept: Experts that the fullest row keeps (``FoldedBuffers.use``).
        """
        order, scales = chosen
        first = self.layers[0]
        before = first.used
        for layer in self.layers:
            layer.use(kept)
        used = first.used
        if rows is None and used == first.width:
            places = order.reshape(-1)
            a_all, b_all = self._by_expert
            torch.index_select(lora_a, 1, places, out=a_all)
            torch.index_select(lora_b.mT, 1, places, out=b_all)
            b_all.mul_(scales.reshape(-1, 1, 1))
            return
        for buffer, values in zip(self._storage, gather(lora_a, lora_b, order[:, :used], scales[:, :used]), strict=True):
            target = buffer[:, :, : values.shape[2]]
            target.copy_(values) if rows is None else target.index_copy_(1, rows, values)
        if used < before and rows is None:  # nobody reads it now; a later write of some rows counts on zeros behind them
            self._storage[1][:, :, used * first.rank : before * first.rank].zero_()


def _zeros(layers: int, rows: int, width: int, lora_a: Tensor, lora_b: Tensor) -> list[Tensor]:
    """Buffers of some layers, (L, B, K * R, I) and (L, B, K * R, O)."""
    experts = min(width, lora_a.shape[0])
    found = []
    for name, size in (("A", lora_a.shape[2]), ("B", lora_b.shape[1])):
        what = f"folded {name} of {rows} rows with {experts} experts each" + (f" in {layers} layers" if layers != 1 else "")
        shape = (layers, rows, experts * lora_a.shape[1], size)
        found.append(zeros(shape, dtype=lora_a.dtype, device=lora_a.device, what=what, shrink=SHRINK_PLAN))
    return found


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
