"""Values of the forward pass that a thread is running."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any


class PerThread(threading.local):
    """Attributes with a value of their own in every thread, which a copied or unpickled model starts again.

    Gates use it for what one hook or layer leaves for the next within a forward pass. ``threading.local`` and not a context
    variable, because ``torch.compile`` can trace the former only.

    Args:
        defaults: Attribute -> function that makes its first value in a thread.
    """

    def __init__(self, **defaults: Callable[[], Any]) -> None:
        self._defaults = defaults
        for name, make in defaults.items():
            setattr(self, name, make())

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread:
        return PerThread(**self._defaults)

    def __reduce__(self) -> Any:
        return _restore, (self._defaults,)


def _restore(defaults: dict[str, Callable[[], Any]]) -> PerThread:
    return PerThread(**defaults)


def nothing() -> None:
    """A default: no value yet."""
