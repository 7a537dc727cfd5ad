"""Write the fused delta into a copy of the base weight; decoding then costs as much as the base model alone.

The base weight is never written. The copy is computed from it each time, so nothing is subtracted again and the base model is unchanged bit
for bit. One copy serves all rows, so they must have the same routing weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlplora.errors import RoutingError
from dlplora.kernels.allocation import zeros
from dlplora.kernels.folded import gather, kept_first, kept_width

SHRINK_MERGED = "Use backend=folded or backend=dense, which keep no copy of the base weights."


def unreadable(base: Any) -> str | None:
    """Why a base module's weight cannot be merged into; None if it can.

    Only plain layers qualify: a subclass may store its weight packed (4-bit, 8-bit) or compute something else with it.
    """
    kind = type(base)
    plain = kind is nn.Linear or (kind.__name__ == "Conv1D" and hasattr(base, "nf"))
    if not plain:
        return f"its base layer is {kind.__module__}.{kind.__name__}, whose weight cannot be read as a plain matrix"
    if not base.weight.is_floating_point():
        return f"its base weight is {base.weight.dtype}"
    return None


def delta_weight(lora_a: Tensor, lora_b: Tensor, chosen: tuple[Tensor, Tensor]) -> Tensor:
    """``sum_e w_e B_e A_e`` of the kept experts of one row (``kept_first``) as a matrix (O, I); float32, or float64 if the factors are."""
    dtype = torch.promote_types(lora_a.dtype, torch.float32)
    a_sel, b_sel = gather(lora_a.to(dtype), lora_b.to(dtype), *chosen)
    return b_sel[0].T @ a_sel[0]


class MergedBuffers(nn.Module):
    """A copy of a base weight with the delta of all rows added.

    Args:
        base: The base module; see ``unreadable``.
        width: K, experts that can be kept.

    Raises:
        RoutingError: If the base weight cannot be read.
        AllocationError: If the copy does not fit into memory.
    """

    weight: Tensor

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        reason = unreadable(base)
        if reason is not None:
            raise RoutingError(f"backend 'merged' cannot serve this layer: {reason}. Backends that can: reference, dense, folded, triton.")
        self._base = (base,)  # inside a tuple, so that nn.Module does not register it
        self.width = width
        self.transposed = type(base) is not nn.Linear  # Conv1D stores (I, O)
        original: Any = base.weight
        copy = zeros(tuple(original.shape), dtype=original.dtype, device=original.device, what="merged weight", shrink=SHRINK_MERGED)
        self.register_buffer("weight", copy, persistent=False)
        self.eval()

    @torch.no_grad()
    def write(
        self, lora_a: Tensor, lora_b: Tensor, chosen: tuple[Tensor, Tensor], rows: Tensor | None = None, fullest: int | None = None
    ) -> None:
        """Write routing weights, in place.

        Args:
            lora_a: (E, R, I). lora_b: (E, O, R).
            chosen: ``kept_first`` of routing weight times scaling (N, E), of rows that are alike.
            rows, fullest: As for ``FoldedStack.write``; there is only one row, of which all is written.
        """
        original: Any = self._base[0].weight
        order, kept = chosen
        delta = delta_weight(lora_a, lora_b, (order[:1], kept[:1]))
        self.weight.copy_(original.to(delta.dtype) + (delta.T if self.transposed else delta))

    def output(self, x: Tensor) -> Tensor:
        """What the base would answer with the merged weight, (B, T, O)."""
        bias: Any = self._base[0].bias
        if not self.transposed:
            return F.linear(x, self.weight, bias)
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def fused_delta(x: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor) -> Tensor:
    """The delta by way of its matrix, for (E,) weights or equal rows (B, E); the same operation as ``reference.fused_delta``.

    Raises:
        RoutingError: If the rows differ.
    """
    rows = weights.reshape(-1, weights.shape[-1])
    if not bool((rows == rows[:1]).all()):
        raise RoutingError("backend 'merged' cannot serve rows that are routed differently; use reference, dense, folded or triton.")
    matrix = delta_weight(lora_a, lora_b, kept_first(rows[:1], kept_width(rows)))
    return (x.to(matrix.dtype) @ matrix.T).to(x.dtype)
