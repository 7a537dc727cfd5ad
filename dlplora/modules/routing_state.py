"""Routing weights of one request, the backend that serves them, and the buffers computed from them.

Shapes: B rows, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dlplora.errors import NotFiniteError, RoutingError
from dlplora.kernels.backends import RoutingFacts, select_backend
from dlplora.kernels.cost_model import Work
from dlplora.modules.layer_buffers import Lease

BUFFERED = ("folded", "merged", "triton")
"""Backends with layers that read buffers made from routing weights."""
NOT_FINITE = "routing weights hold NaN or infinite values; check the router and its temperature."


class StateKeeper(Protocol):
    """What a state needs of the slot that uses it."""

    def rewrite(self, state: RoutingState, rows: Tensor, weights: Tensor) -> None:
        """Bring the state's buffers in line with new weights (N, E) of some rows."""
        ...


class RoutingState:
    """Routing weights of one request, and which backend serves them.

    A state serves one request at a time. It holds the layers' buffers from its first use until ``release``, or until it is dropped.

    Args:
        weights: (E,) static, (B, E) per row, or (B, T, E) per token; float32.
        backend: ``auto`` or a backend's name; ``state.backend`` is the one in use.
        width: Experts a row may keep; None takes what ``weights`` keep now. Give the largest number that re-routing may keep, so
            that the layers' buffers never have to grow.
        reroutes: Whether single rows may be routed again.
        work: What the weights will be used for, for the choice of ``auto``.

    Attributes:
        buffers: Buffers by the layers' keys; empty while the state holds none.
        observer: Called with the path and the input of every layer that runs under the state, unless all weights are zero; None: no
            call. For methods that read activations: unlike a hook on the model, it belongs to one request.

    Raises:
        RoutingError: If the weights are not finite, keep more than ``width``, or the backend cannot serve them.
    """

    def __init__(
        self, weights: Tensor, backend: str = "auto", *, width: int | None = None, reroutes: bool = False, work: Work | None = None
    ) -> None:
        if weights.ndim not in (1, 2, 3):
            raise RoutingError(f"routing weights must be (E,), (B, E) or (B, T, E), got shape {tuple(weights.shape)}.")
        facts = RoutingFacts.of(weights, width=width, reroutes=reroutes)
        if not facts.finite:
            raise NotFiniteError(NOT_FINITE)
        if width is not None and facts.kind != "token" and facts.width > max(width, 1):
            raise RoutingError(_too_many(facts.width, width))
        self.backend = select_backend(backend, facts, work)
        self.weights = weights.float()
        if reroutes and facts.kind == "row":
            self.weights = self.weights.clone()  # re-routing writes into it
        self.num_rows = facts.rows
        """Rows the weights were made for; 1 for static weights."""
        self.num_experts = facts.experts
        self.width = facts.width
        self.kept = facts.kept
        """Experts that the fullest row keeps or, before a re-route, kept."""
        self.weight_rows = 1 if self.backend == "merged" else facts.weight_rows
        # Rows that may be routed again must not change the path through the layers when their weights are no longer zero.
        self.is_zero = facts.zero and not reroutes
        self.buffers: dict[str, Any] = {}
        self.observer: Callable[[str, Tensor], None] | None = None
        self._options: dict[str, Any] = {"backend": backend, "width": width, "reroutes": reroutes, "work": work}
        self._slot: StateKeeper | None = None
        self._lease: Lease | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is the state of another request and gets its own buffers."""
        return {**self.__dict__, "buffers": {}, "_slot": None, "_lease": None}

    @property
    def has_buffers(self) -> bool:
        """Whether layers read buffers made from these weights."""
        return self.backend in BUFFERED and not self.is_zero

    def per_row(self) -> Tensor:
        """Static or per-row weights as (B, E) with B = 1 for static ones."""
        return self.weights.reshape(self.weights.shape[:-1].numel(), self.weights.shape[-1])

    def is_ready_for(self, slot: StateKeeper) -> bool:
        """Whether the layers of a model can run under this state unchanged."""
        return self._slot is slot and (self._lease is not None or not self.has_buffers)

    def hold(self, slot: StateKeeper, lease: Lease | None) -> None:
        """Keep the buffers that the layers of a model read; called by the slot."""
        self._slot, self._lease = slot, lease
        self.buffers = {} if lease is None else lease.buffers.by_layer

    def release(self) -> None:
        """Release the buffers; the next use gets new ones and writes them again."""
        self.buffers, self._lease = {}, None

    def write(self, rows: Tensor | None, weights: Tensor) -> None:
        """Write weights (N, E) of some rows, or of all, into the buffers that the state holds."""
        if self._lease is not None:
            self._lease.buffers.write(weights, rows, self.kept)

    def update_rows(self, rows: Tensor, weights: Tensor) -> None:
        """Replace the weights of some rows in place; the layers' buffers keep their addresses. Unchanged rows cost nothing.

        Args:
            rows: Row indices (N,), int64.
            weights: New routing weights (N, E).

        Raises:
            RoutingError: If the state is not per row, or the weights are not finite or keep more experts than the buffers have room for.
        """
        if self.weights.ndim != 2:
            raise RoutingError(f"only per-row weights (B, E) can be updated, this state has shape {tuple(self.weights.shape)}.")
        if self.backend == "merged" and self.num_rows > 1:
            raise RoutingError(
                f"backend 'merged' cannot serve {self.num_rows} rows that are routed differently. "
                "Backends that can: reference, dense, folded, triton."
            )
        weights = weights.to(self.weights)
        # One transfer for both checks and for the rows that change: a row that keeps one expert, with weight one, often keeps the same.
        sound, differs = torch.isfinite(weights).all(dim=-1), (self.weights[rows] != weights).any(dim=-1)
        facts = torch.cat([weights.count_nonzero(dim=-1), sound, differs]).tolist()
        num = len(facts) // 3
        kept, finite, changed = max(facts[:num], default=0), all(facts[num : 2 * num]), facts[2 * num :]
        if not finite:
            raise NotFiniteError(NOT_FINITE)
        fixed = self._options["width"]
        if fixed is not None and kept > self.width:
            raise RoutingError(_too_many(kept, fixed))
        if not any(changed):
            return
        if not all(changed) and not self.is_zero:  # zero weights were not written
            some = torch.tensor([place for place, has_changed in enumerate(changed) if has_changed], device=rows.device)
            rows, weights = rows[some], weights[some.to(weights.device)]
        self.is_zero = False
        self.kept = max(self.kept, kept)
        self.weights[rows] = weights
        if self.backend not in BUFFERED:
            return
        if kept > self.width or self.weight_rows != self.num_rows:
            # No width was given, or rows that shared weights now differ: other buffers are needed.
            self.width, self.weight_rows = max(kept, self.width), self.num_rows
            self.release()
        if self._slot is not None:
            self._slot.rewrite(self, rows, weights)

    def expand(self, times: int) -> RoutingState:
        """The state for ``times`` copies of each row (beams, ``num_return_sequences``)."""
        if self.weights.ndim == 1 or times == 1:
            return self
        return RoutingState(self.weights.repeat_interleave(times, dim=0), **self._options)


def _too_many(kept: int, width: int) -> str:
    return (
        f"a row keeps {kept} experts, the buffers have room for {width}: the method keeps more than its `max_kept` says. "
        "Correct it, or use backend=dense."
    )
