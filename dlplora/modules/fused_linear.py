"""The fused layer: a linear module plus the weighted deltas of all experts, ``y = base(x) + sum_e w_e s_e B_e A_e x``.

Routing weights belong to the request, not to the layer: they live in a ``RoutingState`` that a ``RoutingSlot`` holds for the
time of a ``with`` block. Shapes: B rows, T tokens, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlplora.errors import AdapterError, RoutingError
from dlplora.kernels import dense, factor, reference
from dlplora.kernels.backends import PlanFacts, select_backend
from dlplora.kernels.cost_model import Work
from dlplora.kernels.folded import FoldedPlan
from dlplora.kernels.merged import MergedPlan
from dlplora.modules.input_layout import InputGrid, Layout
from dlplora.modules.lora_bank import BankEntry
from dlplora.modules.precision import dtype_name

Gate = Callable[[Tensor], Tensor]
"""Token-level gate: layer input (B, T, I) -> routing weights (B, T, E)."""
PLANNED = ("folded", "merged", "triton")
"""Backends whose layers hold buffers made from a plan."""


class RoutingState:
    """Routing weights of one request, and which backend serves them.

    Args:
        weights: (E,) static, (B, E) per row, or (B, T, E) per token; float32.
        backend: ``auto`` or a backend's name; ``state.backend`` is the one in use.
        width: Experts a row may keep; None takes what ``weights`` keep now. Give the largest number that re-routing may keep, so
            that the layers' buffers never have to grow.
        reroutes: Whether rows may be routed again, each for itself.
        work: What the plan will be used for, for the choice of ``auto``.

    Raises:
        RoutingError: If the weights are not finite, keep more than ``width``, or the backend cannot serve them.
    """

    def __init__(
        self, weights: Tensor, backend: str = "auto", *, width: int | None = None, reroutes: bool = False, work: Work | None = None
    ) -> None:
        if weights.ndim not in (1, 2, 3):
            raise RoutingError(f"routing weights must be (E,), (B, E) or (B, T, E), got shape {tuple(weights.shape)}.")
        facts = PlanFacts.of(weights, width=width, reroutes=reroutes)
        if not facts.finite:
            raise RoutingError("routing weights hold NaN or infinite values; check the router and its temperature.")
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
        self.plan_rows = 1 if self.backend == "merged" else facts.plan_rows
        # Rows that may be routed again must not change the path through the layers when their weights are no longer zero.
        self.is_zero = facts.zero and not reroutes
        self.version = 0
        """Counts updates, so that a layer's plan is known to be stale."""
        self._options: dict[str, Any] = {"backend": backend, "width": width, "reroutes": reroutes, "work": work}
        self._slot: RoutingSlot | None = None

    @property
    def is_planned(self) -> bool:
        """Whether layers hold buffers made from these weights."""
        return self.backend in PLANNED and not self.is_zero

    def per_row(self) -> Tensor:
        """Static or per-row weights as (B, E) with B = 1 for static ones."""
        return self.weights.reshape(-1, self.weights.shape[-1])

    def update_rows(self, rows: Tensor, weights: Tensor) -> None:
        """Replace the weights of some rows in place; the layers' buffers keep their addresses. Rows that stay as they are cost nothing.

        Args:
            rows: Row indices (N,), int64.
            weights: New routing weights (N, E).

        Raises:
            RoutingError: If the state is not per row, or the weights are not finite or keep more experts than the plan has room for.
        """
        if self.weights.ndim != 2:
            raise RoutingError(f"only per-row weights (B, E) can be updated, this state has shape {tuple(self.weights.shape)}.")
        if self.backend == "merged" and self.num_rows > 1:
            raise RoutingError(
                f"backend 'merged' cannot serve {self.num_rows} rows that are routed apart. "
                "Backends that can: reference, dense, folded, triton."
            )
        weights = weights.to(self.weights)
        # One transfer for both checks and for the rows that change: whoever keeps one expert, with weight one, often keeps the same.
        changed = (self.weights[rows] != weights).any(dim=-1).long()
        finite, kept, *differs = torch.cat(
            [torch.isfinite(weights).all().long()[None], (weights != 0).sum(-1).max()[None], changed]
        ).tolist()
        if not finite:
            raise RoutingError("routing weights hold NaN or infinite values; check the router and its temperature.")
        fixed = self._options["width"]
        if fixed is not None and kept > self.width:
            raise RoutingError(_too_many(kept, fixed))
        if not any(differs):
            return
        if not all(differs) and not self.is_zero:  # of zero weights no plan was written
            some = torch.tensor([place for place, differ in enumerate(differs) if differ], device=rows.device)
            rows, weights = rows[some], weights[some.to(weights.device)]
        self.is_zero = False
        self.kept = max(self.kept, kept)
        self.weights[rows] = weights
        self.version += 1
        if self.backend not in PLANNED:
            return
        if kept > self.width or self.plan_rows != self.num_rows:
            # Nobody said how wide plans may get, or that rows would part: the next plan is another one.
            self.width, self.plan_rows = max(kept, self.width), self.num_rows
            rows, weights = torch.arange(self.num_rows, device=self.weights.device), self.weights
        if self._slot is not None:
            self._slot.rewrite(self, rows, weights)

    def expand(self, times: int) -> RoutingState:
        """The state for ``times`` copies of each row (beams, ``num_return_sequences``)."""
        if self.weights.ndim == 1 or times == 1:
            return self
        return RoutingState(self.weights.repeat_interleave(times, dim=0), **self._options)


def _too_many(kept: int, width: int) -> str:
    return (
        f"a row keeps {kept} experts, the plan has room for {width}: the method keeps more than its `max_kept` says. "
        "Correct it, or use backend=dense."
    )


class RoutingSlot:
    """Where the layers of one model find the routing state of the running request. One request at a time per model.

    Layers that hold a plan keep its buffers between requests: a request of the same size is written into them in place.
    """

    def __init__(self) -> None:
        self.state: RoutingState | None = None
        self.gate_backend = "dense"
        """Backend of layers whose gate decides."""
        self.layers: list[FusedLinear] = []
        self._written: tuple[RoutingState, int] | None = None

    @contextmanager
    def bind(self, state: RoutingState) -> Iterator[RoutingState]:
        """Hold ``state`` for the time of the block; the previous one comes back afterwards, also after an error."""
        previous = self.state
        try:
            self._hold(state)
            yield state
        finally:
            self._hold(previous)

    def switch(self, state: RoutingState) -> None:
        """Hold another state for the rest of the block that ``bind`` opened."""
        self._hold(state)

    def _hold(self, state: RoutingState | None) -> None:
        """Make ``state`` the one that layers read, and write its plan unless the layers hold it already."""
        if self.state is not None:
            self.state._slot = None
        if state is not None:
            if state.is_planned and self._written != (state, state.version):
                self._written = None  # an error half way leaves no plan that counts
                for layer in self.layers:
                    layer.write_plan(state)
                self._written = (state, state.version)
            state._slot = self
        self.state = state

    def rewrite(self, state: RoutingState, rows: Tensor, weights: Tensor) -> None:
        """Write new weights (N, E) of some rows into the plans of all layers."""
        for layer in self.layers:
            layer.write_plan(state, rows, weights)
        self._written = (state, state.version)

    def release(self, layers: Iterable[FusedLinear]) -> None:
        """Forget layers that are no longer in the model."""
        gone = {id(layer) for layer in layers}
        self.layers = [layer for layer in self.layers if id(layer) not in gone]


def _sizes(base: Any) -> tuple[int, int]:
    """(I, O) of a linear-like module, read from its attributes; the weight is never touched."""
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return int(base.in_features), int(base.out_features)
    if hasattr(base, "nf") and hasattr(base, "nx"):  # transformers Conv1D
        return int(base.nx), int(base.nf)
    raise RoutingError(f"{type(base).__name__} is not a linear module: it has no in_features and out_features.")


class FusedLinear(nn.Module):
    """A wrapped linear module. Calls ``base`` and never reads its weight, so quantised layers work as they are.

    It is linear-like: ``weight`` and ``bias`` are the base's, and inputs of any shape (..., I) are taken where it is known which row of the
    batch each vector belongs to, or where it does not matter.

    Args:
        base: Any module with ``in_features`` and ``out_features`` (or a transformers ``Conv1D``).
        entry: The bank's experts for this module.
        slot: Where the routing state is found; the layer makes itself known to it.
        combine: ``delta``: weighted sum of the experts' deltas. ``factor``: of their A and B apart (``kernels.factor``).

    Attributes:
        gate: A token-level gate; if set, it decides and the slot is not read.
        path: Module path in the backbone, for errors.
        layout: How the backbone hands rows and tokens to this layer.
        grid: Rows and tokens of the running forward pass; kept up to date for layers whose layout is ``flat``.
        plan: Buffers of the bound plan, a module, for backends that have them.
    """

    def __init__(self, base: nn.Module, entry: BankEntry, slot: RoutingSlot, combine: Literal["delta", "factor"] = "delta") -> None:
        super().__init__()
        self.combine = combine
        self.base = base
        self.in_features, self.out_features = _sizes(base)
        self.register_buffer("lora_a", entry.lora_a, persistent=False)
        # Stored by rank, as the bank does it: the kernels read (E, R, O).
        self.register_buffer("lora_b", entry.lora_b.mT.contiguous().mT, persistent=False)
        self.register_buffer("scaling", entry.scaling, persistent=False)
        self.lora_a: Tensor
        self.lora_b: Tensor
        self.scaling: Tensor
        self.slot = slot
        self.path = ""
        self.layout: Layout = "unknown"
        self.grid = InputGrid()
        self.weight_was_read = False
        self.gate: Gate | None = None
        self.plan: Any = None
        self._plan_kind: tuple[Any, ...] = ()
        slot.layers.append(self)

    def _apply(self, fn: Any, recurse: bool = True) -> FusedLinear:
        """Another dtype is one for base and factors; the scaling stays float32, as in a bank of that dtype.

        Raises:
            AdapterError: If a factor has values that the dtype cannot hold.
        """
        scaling, dtype = self.scaling, self.lora_a.dtype
        super()._apply(fn, recurse)
        self.scaling = scaling.to(self.scaling.device)
        if self.lora_a.dtype != dtype and not all(bool(torch.isfinite(factor).all()) for factor in (self.lora_a, self.lora_b)):
            raise AdapterError(f"layer '{self.path}': an adapter has values that {dtype_name(self.lora_a.dtype)} cannot hold. Use float32.")
        return self

    @property
    def weight(self) -> Tensor:
        """The base's weight, without the experts, as a PEFT layer has it."""
        self.weight_was_read = True
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # type: ignore[return-value]

    def __setattr__(self, name: str, value: Any) -> None:
        """A gate is the method's: it is held, not registered, so that it is no part of the backbone's state."""
        if name == "gate":
            self.__dict__["gate"] = value
        else:
            super().__setattr__(name, value)

    def write_plan(self, state: RoutingState, rows: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Write a state's plan into the layer's buffers, which are made anew only if their sizes do not fit.

        Args:
            state: Its backend must be one of ``PLANNED``.
            rows, weights: Only these rows (N,) and their routing weights (N, E); None for all of the state.

        Raises:
            RoutingError: If the state is for another number of experts, or the base weight cannot be merged into.
            AllocationError: If the buffers do not fit into memory.
        """
        if state.num_experts != self.lora_a.shape[0]:
            raise RoutingError(self._wrong_experts(state))
        if self.combine == "factor":
            return
        kind = (state.backend, state.plan_rows, min(state.width, state.num_experts), self.lora_a.dtype, self.lora_a.device)
        if weights is None:
            weights = state.per_row()[: state.plan_rows]
        if self._plan_kind != kind:
            self.plan = self._new_plan(state)
            self._plan_kind = kind
        self.plan.write(self.lora_a, self.lora_b, weights.to(self.scaling.device) * self.scaling, rows)
        if state.backend == "folded":
            self.plan.use(state.kept)

    def _new_plan(self, state: RoutingState) -> Any:
        if state.backend == "folded":
            return FoldedPlan(state.plan_rows, state.width, self.lora_a, self.lora_b)
        if state.backend == "merged":
            return MergedPlan(self.base, state.width)
        from dlplora.kernels.grouped import GroupedPlan

        return GroupedPlan(state.plan_rows, state.width, self.lora_a, self.lora_b)

    def _wrong_experts(self, state: RoutingState) -> str:
        return f"routing weights are for {state.num_experts} experts, the bank has {self.lora_a.shape[0]}."

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus fused delta, (B, T, O) for ``x`` (B, T, I).

        Args:
            x: (B, T, I), or any other shape (..., I). Rows that are routed apart must then be recognisable: (B, ..., I), or (B * T, I) in a
                layer whose layout is ``flat``.

        Raises:
            RoutingError: If no routing weights are bound and no gate is installed, their rows do not fit the batch, or rows are routed
                apart and it is not known which vectors of ``x`` are whose.
        """
        if self.gate is not None:
            if x.ndim == 3:
                return self.base(x) + self._token_delta(x, self.gate(x), self.slot.gate_backend)
            return self._gated(x, self.gate)
        state = self.slot.state
        if state is None:
            raise RoutingError("no routing weights are bound: call the model inside `with model.routing(weights):`, or use generate().")
        if state.is_zero:
            return self.base(x)
        if x.ndim != 3 or self.layout == "other":
            return self._forward_any_shape(x, state)
        self._check(x, state)
        if state.backend == "merged":
            return self.plan.output(x)
        return self.base(x) + self._delta(x, state)

    def _forward_any_shape(self, x: Tensor, state: RoutingState) -> Tensor:
        """As ``forward``, for inputs that are not (B, T, I)."""
        if state.backend == "merged":  # all rows are routed alike
            return self.plan.output(x)
        y = self.base(x)
        rows = self._rows(x, state.num_rows)
        if rows is not None:
            self._check(rows, state)
            return y + self._delta(rows, state).reshape(y.shape)
        weights = state.per_row()
        if not bool((weights == weights[:1]).all()):
            raise RoutingError(
                f"layer '{self.path}' got an input of shape {tuple(x.shape)}, which does not tell the rows of the batch apart "
                f"({state.num_rows} rows, routed apart). Use batches of one row, or adapters without this layer."
            )
        return y + self._token_delta(x.reshape(1, -1, x.shape[-1]), weights[0], "dense").reshape(y.shape)

    def _rows(self, x: Tensor, num_rows: int) -> Tensor | None:
        """``x`` (..., I) as (B, T, I), or None if it is not known which vectors are whose; one row (B = 1) has them all."""
        if num_rows == 1:
            return x.reshape(1, -1, x.shape[-1])
        if x.ndim > 3 and self.layout != "other":
            return x.flatten(1, -2)
        if self.layout == "flat" and self.grid.rows == num_rows and self.grid.fits(x):
            return x.reshape(num_rows, -1, x.shape[-1])
        return None

    def _gated(self, x: Tensor, gate: Gate) -> Tensor:
        """As ``forward`` under a gate, for inputs that are not (B, T, I)."""
        rows = self._rows(x, self.grid.rows if self.grid.fits(x) else 1 if x.ndim < 3 else x.shape[0])
        assert rows is not None
        weights = gate(rows)
        if weights.shape[:2] != rows.shape[:2]:
            raise RoutingError(
                f"layer '{self.path}' got an input of shape {tuple(x.shape)}, its gate answers for {tuple(weights.shape[:2])} rows and "
                "tokens. Use adapters without this layer, or a method that routes whole prompts."
            )
        y = self.base(x)
        return y + self._token_delta(rows, weights, self.slot.gate_backend).reshape(y.shape)

    def _token_delta(self, x: Tensor, weights: Tensor, backend: str) -> Tensor:
        if self.combine == "factor":
            return factor.fused_delta(x, self.lora_a, self.lora_b, weights, self.scaling)
        kernel = reference if backend == "reference" else dense
        return kernel.fused_delta(x, self.lora_a, self.lora_b, weights * self.scaling)

    def _check(self, x: Tensor, state: RoutingState) -> None:
        if x.ndim == 3 and state.num_rows not in (1, x.shape[0]):
            raise RoutingError(f"routing weights were made for {state.num_rows} rows, the batch has {x.shape[0]}.")
        if state.num_experts != self.lora_a.shape[0]:
            raise RoutingError(self._wrong_experts(state))

    def _delta(self, x: Tensor, state: RoutingState) -> Tensor:
        if state.backend == "folded" and self.combine == "delta":
            return self.plan.delta(x)
        if state.backend == "triton" and self.combine == "delta":
            return self.plan.delta(x, self.lora_a, self.lora_b)
        return self._token_delta(x, state.weights, state.backend)
