"""Failures in the engine's thread, which serves all requests and must keep running."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from dlplora.errors import DLPLoRAError, GenerationError, one_line

FAILURES = (
    DLPLoRAError, RuntimeError, OSError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, MemoryError,
    ImportError,
)  # fmt: skip
"""Errors of a step, a request or a call."""
_SHOWN = 200


def shown(error: Exception) -> DLPLoRAError:
    """The text of an error for a client: our errors unchanged, of others the first line, which names no place in the code."""
    if isinstance(error, DLPLoRAError):
        return error
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return GenerationError(f"the model failed: {one_line(first)[:_SHOWN]}")


def settle(function: Callable[[], Any], future: Future[Any]) -> None:
    """Call a function and pass its result or error to the waiting thread."""
    try:
        future.set_result(function())
    except FAILURES as error:  # its caller's; other requests go on
        future.set_exception(error)
    finally:  # another error ends the thread; the caller must not wait for ever
        if not future.done():
            future.set_exception(GenerationError("the server failed."))
