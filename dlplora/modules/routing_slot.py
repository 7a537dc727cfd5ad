"""How the fused layers of a model find the routing weights of the running request.

Nothing about a request is stored on the model. A forward pass started by ``FusedCausalLM.forward`` or ``generate`` runs under the state of
its own call (``RoutingSlot.run``). A ``with`` block (``RoutingSlot.bind``) applies to the thread and the asyncio task that opened it. If it
is opened in the body of a generator, it applies while the generator runs, not while it is suspended. Blocks of two
interleaved generators therefore never mix.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from dlplora.errors import RoutingError
from dlplora.modules.layer_buffers import BufferedLayer, BufferKind, BufferPool, LayerBuffers
from dlplora.modules.per_thread import PerThread, nothing
from dlplora.modules.routing_state import RoutingState

GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
COROUTINE = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE
OUT_OF_ORDER = (
    "blocks of routing() were not closed in the reverse order in which they were opened, so calls in between may have run under the "
    "other block's weights. Pass routing=WEIGHTS to each call instead."
)


class _Binding:
    """A state that applies to the calls of one context."""

    __slots__ = ("direct", "inside", "parent", "slot", "state")

    def __init__(
        self, slot: RoutingSlot, state: RoutingState, parent: _Binding | None, *, direct: bool = False, inside: FrameType | None = None
    ) -> None:
        self.slot, self.parent = slot, parent
        self.state: RoutingState | None = state
        """None once the block is closed."""
        self.direct = direct
        """Whether it applies to one forward pass only, which cannot be interrupted."""
        self.inside = inside
        """The generator with blocks of its own that was running when this block was opened."""


BOUND: ContextVar[_Binding | None] = ContextVar("dlplora_routing", default=None)
"""The innermost binding of this thread or task, of any model; blocks of generators are not here."""


class RoutingSlot:
    """Gives the layers of one model the routing state of the running call, and lends buffers to states.

    Attributes:
        layers: The fused layers of the model.
        buffers: The pool of their buffers.
        gate_backend: Backend of layers with a gate.
        running: ``running.binding`` is what compiled code reads in this thread.
    """

    def __init__(self) -> None:
        self.layers: list[BufferedLayer] = []
        self.gate_backend = "dense"
        self._num_keys = 0
        self._start()

    def _start(self) -> None:
        self.buffers = BufferPool()
        self.running = PerThread(binding=nothing, num_in_coroutines=int)
        self._owned: dict[FrameType, list[_Binding]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copied model starts without requests."""
        return {key: value for key, value in self.__dict__.items() if key not in {"buffers", "running", "_owned"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    # ------------------------------------------------------------------ layers and their buffers

    def add(self, layer: BufferedLayer) -> str:
        """Make a layer known; returns its key."""
        self.layers.append(layer)
        self._num_keys += 1
        return f"layer_{self._num_keys}"

    def release(self, layers: Iterable[BufferedLayer]) -> None:
        """Forget layers that are no longer in the model."""
        gone = {id(layer) for layer in layers}
        self.layers = [layer for layer in self.layers if id(layer) not in gone]
        self.buffers = BufferPool()

    def prepare(self, state: RoutingState) -> None:
        """Lend a state its buffers and write its weights into them, unless it has them."""
        if state.is_ready_for(self):
            return
        state.release()
        lease = None
        if state.has_buffers:
            kind = BufferKind(
                state.backend, state.weight_rows, state.width, frozenset((layer.lora_a.dtype, layer.lora_a.device) for layer in self.layers)
            )
            lease = self.buffers.lease(kind, partial(LayerBuffers, kind, self.layers))
            lease.buffers.write(state.per_row()[: state.weight_rows], None, state.kept)
        state.hold(self, lease)

    def rewrite(self, state: RoutingState, rows: Tensor, weights: Tensor) -> None:
        """Write new weights (N, E) of some rows into a state's buffers."""
        if state.is_ready_for(self):
            state.write(rows, weights)
        else:
            self.prepare(state)

    # ------------------------------------------------------------------ bindings

    def bind(self, state: RoutingState) -> Bound:
        """A ``with`` block; calls inside it run under ``state``."""
        return Bound(self, state)

    def run(self, state: RoutingState | None, call: Callable[..., Any], args: Iterable[Any], kwargs: dict[str, Any]) -> Any:
        """Call a function that runs the model, under a state; None where gates decide."""
        if state is None:
            return call(*args, **kwargs)
        if not state.is_ready_for(self):
            self.prepare(state)
        running = self.running
        previous = running.binding
        running.binding = binding = _Binding(self, state, BOUND.get(), direct=True)
        token = BOUND.set(binding)
        try:
            return call(*args, **kwargs)
        finally:
            running.binding = previous
            BOUND.reset(token)

    @property
    def state(self) -> RoutingState | None:
        """The state that applies to the caller, or None."""
        binding = self._innermost()
        if self._owned and not (binding is not None and binding.direct):
            frame = self._owning_frame()
            if frame is not None and not (binding is not None and binding.inside is frame):
                return self._owned[frame][-1].state
        return None if binding is None else binding.state

    def _innermost(self) -> _Binding | None:
        binding = BOUND.get()
        while binding is not None and (binding.state is None or binding.slot is not self):
            binding = binding.parent
        return binding

    def _owning_frame(self) -> FrameType | None:
        """The innermost running generator that has opened a block."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame not in self._owned:
            frame = frame.f_back
        return frame


class Bound:
    """A block opened by ``RoutingSlot.bind``.

    Raises:
        RoutingError: At the end of the block, if a block opened later is still open in the same context.
    """

    def __init__(self, slot: RoutingSlot, state: RoutingState) -> None:
        self._slot, self._state = slot, state
        self._binding: _Binding | None = None
        self._owner: FrameType | None = None
        self._in_coroutine = False

    def __enter__(self) -> RoutingState:
        slot = self._slot
        slot.prepare(self._state)
        frame = _opening_frame(sys._getframe(1))
        flags = 0 if frame is None else frame.f_code.co_flags
        inside = slot._owning_frame() if slot._owned else None
        self._binding = binding = _Binding(slot, self._state, BOUND.get(), inside=inside)
        if frame is not None and flags & GENERATOR:
            self._owner = frame
            slot._owned.setdefault(frame, []).append(binding)
            return self._state
        BOUND.set(binding)
        # Compiled code cannot read the task's context. If tasks may be interleaved, it finds no binding and raises.
        self._in_coroutine = bool(flags & COROUTINE)
        slot.running.num_in_coroutines += self._in_coroutine
        slot.running.binding = None if self._in_coroutine else binding
        return self._state

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        slot, binding, owner = self._slot, self._binding, self._owner
        assert binding is not None
        binding.state = None
        self._binding = self._owner = None
        if owner is not None:
            blocks = slot._owned[owner]
            blocks.remove(binding)
            if not blocks:
                del slot._owned[owner]
            return
        innermost = BOUND.get()
        still_open = next((one for one in _chain(innermost) if one.state is not None), None)
        out_of_order = binding in _chain(still_open)
        BOUND.set(_without_closed(innermost))
        slot.running.num_in_coroutines -= self._in_coroutine
        slot.running.binding = None if slot.running.num_in_coroutines > 0 else slot._innermost()
        if out_of_order and kind is None:
            raise RoutingError(OUT_OF_ORDER)


def _chain(binding: _Binding | None) -> list[_Binding]:
    """A binding and those outside of it."""
    found = []
    while binding is not None:
        found.append(binding)
        binding = binding.parent
    return found


def _without_closed(binding: _Binding | None) -> _Binding | None:
    """The innermost open binding; closed bindings further out are removed from the chain."""
    is_open = [one for one in _chain(binding) if one.state is not None]
    for inner, outer in zip(is_open, [*is_open[1:], None], strict=False):
        inner.parent = outer
    return is_open[0] if is_open else None


def _opening_frame(frame: FrameType | None) -> FrameType | None:
    """The function that opens a block in its body.

    Functions under ``contextlib.contextmanager`` are skipped: their block applies where the context manager is used.
    """
    library = contextlib.__file__
    while frame is not None:
        caller = frame.f_back
        inner = frame.f_code.co_filename
        if inner == library or (frame.f_code.co_flags & GENERATOR and caller is not None and caller.f_code.co_filename == library):
            frame = caller
        else:
            break
    return frame


def current_state(slot: RoutingSlot) -> RoutingState | None:
    """The state that a layer runs under. Every layer calls this, so the common case is checked first."""
    if torch.compiler.is_compiling():
        binding = slot.running.binding  # a context variable cannot be traced
        return None if binding is None else binding.state
    binding = BOUND.get()
    if binding is not None and binding.direct and binding.slot is slot:
        return binding.state
    return slot.state
