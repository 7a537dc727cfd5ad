"""The fused layer: a linear module plus the weighted deltas of all experts, ``y = base(x) + sum_e w_e s_e B_e A_e x``.

Routing weights belong to the request and not to the layer: the layer gets the ``RoutingState`` of the running call from its
``RoutingSlot``. Shapes: B rows, T tokens, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlplora.errors import AdapterError, RoutingError
from dlplora.kernels import dense, factor, reference
from dlplora.modules.input_layout import InputGrid, Layout
from dlplora.modules.lora_bank import BankEntry
from dlplora.modules.precision import dtype_name
from dlplora.modules.routing_slot import RoutingSlot, current_state
from dlplora.modules.routing_state import RoutingState

Gate = Callable[[Tensor], Tensor]
"""Token-level gate: layer input (B, T, I) -> routing weights (B, T, E)."""
RankGate = Callable[[Tensor, Tensor], Tensor]
"""From a layer's input (B, T, I) and its routing weights, broadcastable to (B, T, E), to weights of single ranks (B, T, E, R)."""
GATE_OBSERVER: ContextVar[Callable[[FusedLinear, Tensor], None] | None] = ContextVar("dlplora_gate_observer", default=None)
"""Called with a layer and what its gate answered, for the gates of this thread or task; statistics use it."""
NOT_BOUND = (
    "no routing weights are bound: use generate(), pass routing=WEIGHTS to the call, or call the model inside "
    "`with model.routing(weights):`."
)


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
        block: Which of a row's routing weights are this layer's; None: all of them, in every layer the same. A method whose weights differ
            from layer to layer answers with one block of E after another (``RequestRouter``).
        rank_gate: Turns this layer's weights into weights of the adapters' single ranks; None: all ranks of an adapter alike.
        path: Module path in the base model, for errors.
        layout: How the base model hands rows and tokens to this layer.
        grid: Rows and tokens of the running forward pass; kept up to date for layers whose layout is ``flat``.
        key: The name of this layer's buffers in ``RoutingState.buffers``.
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
        self.block: slice | None = None
        self.rank_gate: RankGate | None = None
        self.key = slot.add(self)

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
        """A gate is the method's: it is held, not registered, so that it is no part of the base model's state."""
        if name == "gate":
            self.__dict__["gate"] = value
        else:
            super().__setattr__(name, value)

    @property
    def reads_buffers(self) -> bool:
        """Whether the layer reads buffers; one that sums factors reads the routing weights themselves."""
        return self.combine == "delta"

    def scaled(self, weights: Tensor) -> Tensor:
        """Routing weights (N, E) times scaling, on the layer's device.

        Raises:
            RoutingError: If the weights are for another number of experts.
        """
        if weights.shape[-1] != self.lora_a.shape[0]:
            raise RoutingError(self._wrong_experts(weights.shape[-1]))
        return weights.to(self.scaling.device) * self.scaling

    def _wrong_experts(self, number: int) -> str:
        return f"routing weights are for {number} experts, the bank has {self.lora_a.shape[0]}."

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus fused delta, (B, T, O) for ``x`` (B, T, I).

        Args:
            x: (B, T, I), or any other shape (..., I). Rows that are routed separately must then be recognisable: (B, ..., I), or (B * T, I)
            in a
                layer whose layout is ``flat``.

        Raises:
            RoutingError: If no routing weights are bound and no gate is installed, their rows do not fit the batch, or rows are routed
                apart and it is not known which vectors of ``x`` are whose.
        """
        if self.gate is not None:
            if x.ndim == 3:
                return self.base(x) + self._gated(x, x, self.gate)
            return self._gated_any_shape(x, self.gate)
        state = current_state(self.slot)
        if state is None:
            raise RoutingError(NOT_BOUND)
        if state.is_zero:
            return self.base(x)
        if state.observer is not None:
            state.observer(self.path, x)
        if x.ndim != 3 or self.layout == "other":
            return self._forward_any_shape(x, state)
        self._check(x, state)
        if state.backend == "merged":
            return state.buffers[self.key].output(x)
        return self.base(x) + self._delta(x, state)

    def _forward_any_shape(self, x: Tensor, state: RoutingState) -> Tensor:
        """As ``forward``, for inputs that are not (B, T, I)."""
        if state.backend == "merged":  # all rows are routed alike
            return state.buffers[self.key].output(x)
        y = self.base(x)
        rows = self._rows(x, state.num_rows)
        if rows is not None:
            self._check(rows, state)
            return y + self._delta(rows, state).reshape(y.shape)
        weights = self._own(state.per_row())
        if not bool((weights == weights[:1]).all()):
            raise RoutingError(
                f"layer '{self.path}' got an input of shape {tuple(x.shape)}, in which the rows of the batch cannot be told apart "
                f"({state.num_rows} rows, routed differently). Use batches of one row, or adapters without this layer."
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

    def _gated(self, x: Tensor, rows: Tensor, gate: Gate) -> Tensor:
        """The delta of ``rows`` (B, T, I), which is ``x`` or a view of it, under a gate."""
        weights = gate(rows)
        if rows is not x and weights.shape[:2] != rows.shape[:2]:
            raise RoutingError(
                f"layer '{self.path}' got an input of shape {tuple(x.shape)}, its gate weights {tuple(weights.shape[:2])} rows and "
                "tokens. Use adapters without this layer, or a method that routes whole prompts."
            )
        observer = None if torch.compiler.is_compiling() else GATE_OBSERVER.get()
        if observer is not None:
            observer(self, weights)
        return self._token_delta(rows, weights, self.slot.gate_backend)

    def _gated_any_shape(self, x: Tensor, gate: Gate) -> Tensor:
        """As ``forward`` under a gate, for inputs that are not (B, T, I)."""
        rows = self._rows(x, self.grid.rows if self.grid.fits(x) else 1 if x.ndim < 3 else x.shape[0])
        assert rows is not None
        y = self.base(x)
        return y + self._gated(x, rows, gate).reshape(y.shape)

    def _own(self, weights: Tensor) -> Tensor:
        """This layer's part of routing weights (..., E)."""
        return weights if self.block is None else weights[..., self.block]

    def _token_delta(self, x: Tensor, weights: Tensor, backend: str) -> Tensor:
        if self.combine == "factor":
            return factor.fused_delta(x, self.lora_a, self.lora_b, weights, self.scaling)
        kernel = reference if backend == "reference" else dense
        if self.rank_gate is not None:
            ranks = self.rank_gate(x, reference.per_token(weights))
            return kernel.fused_delta(x, self.lora_a, self.lora_b, ranks * self.scaling[:, None])
        return kernel.fused_delta(x, self.lora_a, self.lora_b, weights * self.scaling)

    def _check(self, x: Tensor, state: RoutingState) -> None:
        if x.ndim == 3 and state.num_rows not in (1, x.shape[0]):
            raise RoutingError(f"routing weights were made for {state.num_rows} rows, the batch has {x.shape[0]}.")
        known = state.num_experts == self.lora_a.shape[0] if self.block is None else state.num_experts >= self.block.stop
        if not known:
            raise RoutingError(self._wrong_experts(state.num_experts))
        if state.weights.ndim == 3 and x.ndim == 3 and state.weights.shape[1] not in (1, x.shape[1]):
            raise RoutingError(f"routing weights were made for {state.weights.shape[1]} tokens, the batch has {x.shape[1]}.")

    def _delta(self, x: Tensor, state: RoutingState) -> Tensor:
        if state.backend == "folded" and self.combine == "delta":
            return state.buffers[self.key].delta(x)
        if state.backend == "triton" and self.combine == "delta":
            return state.buffers[self.key].delta(x, self.lora_a, self.lora_b)
        return self._token_delta(x, self._own(state.weights), state.backend)
