"""Failures in the engine's thread, which serves all requests and must keep running, and what clients are told of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import PurePath
from typing import Any

from dlplora.errors import DLPLoRAError, GenerationError, MethodError, one_line

FAILURES = (
    DLPLoRAError, RuntimeError, OSError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, MemoryError,
    ImportError,
)  # fmt: skip
"""Errors of a step, a request or a call."""
_SHOWN = 200
_ABSOLUTE = re.compile(r"(?<![\w.)\]])(?:[A-Za-z]:)?[/\\][^\s'\"`,;:()]+")


def shown(error: Exception) -> DLPLoRAError:
    """The text of an error for a client: our errors unchanged, of others the first line, which names no place in the code."""
    if isinstance(error, DLPLoRAError):
        return error
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return GenerationError(f"the model failed: {one_line(first)[:_SHOWN]}")


def without_paths(text: str, roots: Iterable[str] = ()) -> str:
    """A text in which absolute paths are cut to their last part.

    Args:
        text: For a client.
        roots: Folders that are cut as a whole, whatever characters they hold.

    >>> without_paths("cannot read /srv/my pool/x.json: see /etc/y, and/or z", ["/srv/my pool"])
    'cannot read my pool/x.json: see y, and/or z'
    """
    for root in sorted(filter(None, roots), key=len, reverse=True):
        text = text.replace(root, PurePath(root).name)
    return _ABSOLUTE.sub(lambda found: PurePath(found[0].replace("\\", "/")).name, text)


def refused_reload(error: Exception) -> str:
    """Why a pool was not loaded again, and what to do."""
    reason = one_line(error) if isinstance(error, DLPLoRAError) else one_line(f"{type(error).__name__}: {error}")
    if isinstance(error, MethodError):
        todo = (
            "Put a router that was trained for the new pool (`dlplora fit --config router`) in the place of --router and reload again, "
            "or start the server with a method that needs no trained router, such as --method lorauter."
        )
    else:
        todo = "Correct the pool and reload again."
    return f"the pool was not reloaded, and the old one stays in use: {reason.rstrip('.')}. {todo}"


def settle(function: Callable[[], Any], future: Future[Any]) -> None:
    """Call a function and pass its result or error to the waiting thread."""
    try:
        future.set_result(function())
    except FAILURES as error:  # its caller's; other requests go on
        future.set_exception(error)
    finally:  # another error ends the thread; the caller must not wait for ever
        if not future.done():
            future.set_exception(GenerationError("the server failed."))
