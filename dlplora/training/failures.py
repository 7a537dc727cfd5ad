"""Failures of a training that are neither user errors nor bugs: a missing package, a full disk."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf.errors import OmegaConfBaseException

from dlplora.errors import ConfigError, DLPLoRAError
from dlplora.training.config_check import first_reason

PARSER_TEXTS = ("Problem with given class_path", "Does not validate against", "Parser key")
"""Beginnings of the configuration parser's message when a class cannot be made."""


def configuration_error(error: BaseException) -> DLPLoRAError | None:
    """The user's error in an exception, as one line; None if there is none.

    The parser wraps what a constructor raises in errors of its own, several deep.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for one in chain:
        if isinstance(one, DLPLoRAError):
            return one
    for one in chain:
        if isinstance(one, ModuleNotFoundError):
            return ConfigError(f"the configuration needs a package that is not installed: {' '.join(str(one).split())}")
    text = str(error)
    if isinstance(error, OmegaConfBaseException):  # of a file that an option names, which the parser reads by itself
        return ConfigError(first_reason(text))
    return ConfigError(first_reason(text)) if text.startswith(PARSER_TEXTS) else None


@contextmanager
def writers_without_tracebacks() -> Iterator[None]:
    """Inside, a thread that cannot write (TensorBoard's, when the disk is full) prints no traceback.

    The training raises the same error at its next event, and the command line prints it.
    """
    original = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            original(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = original
