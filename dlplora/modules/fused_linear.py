"""The fused layer: a linear module plus the weighted deltas of all experts, ``y = base(x) + sum_e w_e s_e B_e A_e x``.

Routing weights belong to the request, not to the layer: they live in a ``RoutingState`` that a ``RoutingSlot`` holds for the
time of a ``with`` block. Shapes: B rows, T tokens, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlplora.errors import RoutingError
from dlplora.kernels import dense, factor, folded, reference
from dlplora.kernels.backends import select_backend
from dlplora.modules.lora_bank import BankEntry

Gate = Callable[[Tensor], Tensor]
"""Token-level gate: layer input (B, T, I) -> routing weights (B, T, E)."""


class RoutingState:
    """Routing weights of one request, and what the layers folded from them.

    Args:
        weights: (E,) static, (B, E) per row, or (B, T, E) per token; float32.
        backend: ``auto`` or a backend's name; ``state.backend`` is the one in use.
        rank: Largest rank in the bank, for the choice of ``auto``.
        width: Experts a row may keep in folded buffers; None takes what ``weights`` keep now. Give the largest number
            that re-routing may keep, so that the buffers never have to grow.

    Raises:
        RoutingError: If the weights are not finite, or the backend cannot serve them.
    """

    def __init__(self, weights: Tensor, backend: str = "auto", *, rank: int = 1, width: int | None = None) -> None:
        if weights.ndim not in (1, 2, 3):
            raise RoutingError(f"routing weights must be (E,), (B, E) or (B, T, E), got shape {tuple(weights.shape)}.")
        if not bool(torch.isfinite(weights).all()):
            raise RoutingError("routing weights hold NaN or infinite values; check the router and its temperature.")
        self.weights = weights.float()
        self.backend = select_backend(backend, self.weights, weights.shape[-1], rank)
        self.is_zero = not bool(self.weights.any())
        self._rank = rank
        self._requested = backend
        self._width = width
        self._plans: dict[int, folded.FoldedPlan] = {}
        self._layers: dict[int, FusedLinear] = {}

    @property
    def num_rows(self) -> int:
        """Rows the weights were made for; 1 for static weights."""
        return 1 if self.weights.ndim == 1 else self.weights.shape[0]

    def per_row(self) -> Tensor:
        """Static or per-row weights as (B, E) with B = 1 for static ones."""
        return self.weights.reshape(-1, self.weights.shape[-1])

    def folded_plan(self, layer: FusedLinear) -> folded.FoldedPlan:
        """The layer's folded buffers, made at first use and kept."""
        plan = self._plans.get(id(layer))
        if plan is None:
            rows = self.per_row()
            width = max(folded.kept_width(rows), self._width or 1)
            shared = rows[:1] if rows.shape[0] > 1 and bool((rows == rows[:1]).all()) and self._width is None else rows
            plan = folded.fold(layer.lora_a, layer.lora_b, shared * layer.scaling, width)
            self._plans[id(layer)] = plan
            self._layers[id(layer)] = layer
        return plan

    def update_rows(self, rows: Tensor, weights: Tensor) -> None:
        """Replace the weights of some rows in place; folded buffers keep their addresses if they are wide enough.

        Args:
            rows: Row indices (N,), int64.
            weights: New routing weights (N, E).

        Raises:
            RoutingError: If the state is not per row, or the weights are not finite.
        """
        if self.weights.ndim != 2:
            raise RoutingError(f"only per-row weights (B, E) can be updated, this state has shape {tuple(self.weights.shape)}.")
        if not bool(torch.isfinite(weights).all()):
            raise RoutingError("routing weights hold NaN or infinite values; check the router and its temperature.")
        self.weights[rows] = weights.to(self.weights)
        self.is_zero = False
        wanted = folded.kept_width(weights)
        for key, plan in list(self._plans.items()):
            if wanted > plan.width or plan.a_sel.shape[0] != self.num_rows:
                del self._plans[key]  # folded again, wider, at the next forward
                continue
            layer = self._layers[key]
            plan.update_rows(layer.lora_a, layer.lora_b, rows, weights.to(layer.scaling) * layer.scaling)

    def expand(self, times: int) -> RoutingState:
        """The state for ``times`` copies of each row (beams, ``num_return_sequences``)."""
        if self.weights.ndim == 1 or times == 1:
            return self
        return RoutingState(self.weights.repeat_interleave(times, dim=0), self._requested, rank=self._rank, width=self._width)


class RoutingSlot:
    """Where the layers of one model find the routing state of the running request. One request at a time per model."""

    def __init__(self) -> None:
        self.state: RoutingState | None = None

    @contextmanager
    def bind(self, state: RoutingState) -> Iterator[RoutingState]:
        """Hold ``state`` for the time of the block; the previous one comes back afterwards, also after an error."""
        previous, self.state = self.state, state
        try:
            yield state
        finally:
            self.state = previous


def _sizes(base: Any) -> tuple[int, int]:
    """(I, O) of a linear-like module, read from its attributes; the weight is never touched."""
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return int(base.in_features), int(base.out_features)
    if hasattr(base, "nf") and hasattr(base, "nx"):  # transformers Conv1D
        return int(base.nx), int(base.nf)
    raise RoutingError(f"{type(base).__name__} is not a linear module: it has no in_features and out_features.")


class FusedLinear(nn.Module):
    """A wrapped linear module. Calls ``base`` and never reads its weight, so quantised layers work as they are.

    Args:
        base: Any module with ``in_features`` and ``out_features`` (or a transformers ``Conv1D``).
        entry: The bank's experts for this module.
        slot: Where the routing state is found.

        combine: ``delta``: weighted sum of the experts' deltas. ``factor``: of their A and B apart (``kernels.factor``).

    Attributes:
        gate: A token-level gate; if set, it decides and the slot is not read.
    """

    def __init__(self, base: nn.Module, entry: BankEntry, slot: RoutingSlot, combine: Literal["delta", "factor"] = "delta") -> None:
        super().__init__()
        self.combine = combine
        self.base = base
        self.in_features, self.out_features = _sizes(base)
        self.register_buffer("lora_a", entry.lora_a, persistent=False)
        self.register_buffer("lora_b", entry.lora_b, persistent=False)
        self.register_buffer("scaling", entry.scaling, persistent=False)
        self.lora_a: Tensor
        self.lora_b: Tensor
        self.scaling: Tensor
        self.slot = slot
        self.gate: Gate | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """A gate is the method's: it is held, not registered, so that it is no part of the backbone's state."""
        if name == "gate":
            self.__dict__["gate"] = value
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus fused delta, (B, T, O).

        Raises:
            RoutingError: If no routing weights are bound and no gate is installed, or their rows do not fit the batch.
        """
        if self.gate is not None:
            return self.base(x) + self._token_delta(x, self.gate(x))
        state = self.slot.state
        if state is None:
            raise RoutingError("no routing weights are bound: call the model inside `with model.routing(weights):`, or use generate().")
        out = self.base(x)
        if state.is_zero:
            return out
        return out + self._delta(x, state)

    def _token_delta(self, x: Tensor, weights: Tensor) -> Tensor:
        if self.combine == "factor":
            return factor.fused_delta(x, self.lora_a, self.lora_b, weights, self.scaling)
        return dense.fused_delta(x, self.lora_a, self.lora_b, weights * self.scaling)

    def _delta(self, x: Tensor, state: RoutingState) -> Tensor:
        if x.ndim == 3 and state.num_rows not in (1, x.shape[0]):
            raise RoutingError(f"routing weights were made for {state.num_rows} rows, the batch has {x.shape[0]}.")
        if state.weights.shape[-1] != self.lora_a.shape[0]:
            raise RoutingError(f"routing weights are for {state.weights.shape[-1]} experts, the bank has {self.lora_a.shape[0]}.")
        if self.combine == "factor":
            return self._token_delta(x, state.weights)
        if state.backend == "folded":
            return folded.apply(x, state.folded_plan(self))
        kernel = dense if state.backend == "dense" else reference
        return kernel.fused_delta(x, self.lora_a, self.lora_b, state.weights * self.scaling)
