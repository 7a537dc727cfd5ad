"""Errors that a user can cause. The command line prints their text on one line and exits with code 2.

A good message says what was expected, what was found, where, and what to do. Invariants of our own code use ``assert``; nothing in the
package catches ``Exception``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DLPLoRAError(ValueError):
    """Base of every error that bad input can cause."""


class ConfigError(DLPLoRAError):
    """A configuration file or option is missing, misspelt or contradictory."""


class AdapterError(DLPLoRAError):
    """An adapter folder cannot be read, or cannot be fused exactly."""


class IncompatibleAdapterError(AdapterError):
    """An adapter does not fit the base model or the other adapters of the pool."""


class UnsafeFileError(AdapterError):
    """A file would need unpickling; only safetensors and JSON are read."""


class PoolError(DLPLoRAError):
    """A pool folder is missing, damaged, or made for another base model."""


class RoutingError(DLPLoRAError):
    """Routing weights are missing, of the wrong shape, or not finite."""


class MethodError(DLPLoRAError):
    """A fusion method is unknown, misconfigured, or asked for something it cannot do."""


class UnavailableMethodError(MethodError):
    """A method lacks an optional package, or a folder that was not given and is not shipped."""


class TaskError(DLPLoRAError):
    """A task or suite is unknown, or one of its rows is malformed."""


class GenerationError(DLPLoRAError):
    """A prompt or a decoding option cannot be served."""


class NotFiniteError(GenerationError, RoutingError):
    """Logits, routing weights or a loss are NaN or infinite: something diverged."""


class AllocationError(DLPLoRAError):
    """A tensor does not fit into memory."""


class RecordError(DLPLoRAError):
    """A results record is malformed."""


MAX_LINE = 1500
"""Characters of an error on the terminal."""


def one_line(error: object) -> str:
    """An error as one line for a terminal: white space folded, control characters escaped, and what is too long cut in the middle.

    >>> one_line("cannot read\n  'a\x1b[2Jb'")
    "cannot read 'a\\\\x1b[2Jb'"
    """
    text = " ".join(str(error).split())
    if not text.isprintable():  # a name from a file must not reach the terminal as a control sequence or reverse the line
        text = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
    half = MAX_LINE // 2
    return text if len(text) <= MAX_LINE else f"{text[:half]} [...] {text[-half:]}"


def nearest(word: str, known: Iterable[str]) -> str:
    """A ``did you mean`` hint with the leading space, or an empty string.

    >>> nearest("rnak", ["rank", "alpha"])
    " Did you mean 'rank'?"
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
