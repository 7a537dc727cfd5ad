"""One call of ``generate``: its routing state, and a view of the model that runs its forward passes under that state.

Hugging Face ``generate`` is a method of the model, so it is called on a view: an object of the same class that shares all modules,
parameters and hooks, with a ``forward`` of its own. The model itself is never changed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from dlplora.errors import GenerationError
from dlplora.modules.routing_slot import RoutingSlot
from dlplora.modules.routing_state import RoutingState


class CompiledTurns:
    """Compiled decode steps share their graphs, so requests that use them take turns."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copied model starts without requests."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the requests of other threads.

        Raises:
            GenerationError: If this thread is already running such a request: it would wait for itself.
        """
        if self._holder == threading.get_ident():
            raise GenerationError("generate() with compiled decode steps was called from inside another one; end that call first.")
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None


class DecodeSetting:
    """What transformers changes on the model itself while it decodes (the kernels of mixture experts, on GPUs).

    The first of the requests that decode at the same time sets it, the last one restores it.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._num_requests = 0
        self._restore = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        """A copied model starts without requests."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start()

    @contextmanager
    def kept(self, change: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Hold the setting for one request; ``change`` is the model's own way to set and restore it."""
        with self._lock:
            if not self._num_requests:
                self._restore.enter_context(change())
            self._num_requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_requests -= 1
                if not self._num_requests:
                    self._restore.close()


class Request:
    """One running call of ``generate``.

    Args:
        slot: Of the model's fused layers.
        turns: Of the model; serialise requests with compiled decode steps.
        decoding: Of the model.

    Attributes:
        state: The state that the next forward pass runs under; None where gates decide.
        before_forward: Called before every forward pass of the decoding loop, and may change ``state``.
        after_last_token: Called when the generation is complete.
    """

    def __init__(self, slot: RoutingSlot, turns: CompiledTurns, decoding: DecodeSetting) -> None:
        self._slot, self._turns, self._decoding = slot, turns, decoding
        self._ends = ExitStack()
        self._has_turn = False
        self.state: RoutingState | None = None
        self.before_forward: Callable[[], None] | None = None
        self.after_last_token: Callable[[], None] | None = None

    def __enter__(self) -> Request:
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.close()

    def owns(self, state: RoutingState) -> RoutingState:
        """Give the state's buffers back when the request ends."""
        self._ends.callback(state.release)
        return state

    def use(self, state: RoutingState, rows: int, copies: int, *, owned: bool) -> None:
        """Run under weights that the caller gave.

        Args:
            rows: Prompts. copies: Rows that each of them becomes.
            owned: Whether the state was made for this request.
        """
        self.state = state.expand(copies) if state.num_rows == rows else state
        for one in (state, self.state):
            if owned or one is not state:
                self.owns(one)

    def take_turn(self) -> None:
        """Be the only request with compiled decode steps from now on."""
        if not self._has_turn:
            self._ends.enter_context(self._turns.turn())
            self._has_turn = True

    def run(self, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """One forward pass of the request."""
        if self.before_forward is not None:
            self.before_forward()
        return self._slot.run(self.state, forward, args, kwargs)

    def generate(self, model: Any, **kwargs: Any) -> Any:
        """``model.generate(**kwargs)`` with every forward pass under the request's state."""
        view = self._view(model)
        found = view.generate(**kwargs)
        if self.after_last_token is not None:
            self.after_last_token()
        if self._has_turn and "_previous_max_cache_length" in vars(view):
            # transformers notes here how long static caches are, so that a shorter request is not compiled again.
            model._previous_max_cache_length = view._previous_max_cache_length
        return found

    def _view(self, model: Any) -> Any:
        view = object.__new__(type(model))
        vars(view).update(vars(model))
        forward, get_compiled_call = model.forward, model.get_compiled_call

        @functools.wraps(forward)
        def routed(*args: Any, **kwargs: Any) -> Any:
            return self.run(forward, args, kwargs)

        def routed_compiled_call(config: Any) -> Callable[..., Any]:
            self.take_turn()
            compiled = get_compiled_call(config)  # of the model, so that all requests share one graph
            return lambda *args, **kwargs: self.run(compiled, args, kwargs)

        view.forward, view.get_compiled_call = routed, routed_compiled_call
        if hasattr(model, "_optimize_model_for_decode"):
            view._optimize_model_for_decode = lambda: self._decoding.kept(model._optimize_model_for_decode)
        return view
