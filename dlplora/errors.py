"""Errors a user can cause. The command line prints their text on one line and exits with code 2.

A good message says what was expected, what came, where, and what to do about it. Invariants of our own code use ``assert``
instead; nothing in the package catches ``Exception``.
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
    """An adapter does not fit the backbone or the other adapters of the pool."""


class UnsafeFileError(AdapterError):
    """A file would need unpickling; only safetensors and JSON are read."""


class PoolError(DLPLoRAError):
    """A pool folder is missing, damaged, or made for another backbone."""


class RoutingError(DLPLoRAError):
    """Routing weights are missing, of the wrong shape, or not finite."""


class MethodError(DLPLoRAError):
    """A fusion method is unknown, misconfigured, or asked for something it cannot do."""


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


def nearest(word: str, known: Iterable[str]) -> str:
    """A ``did you mean`` hint with the leading space, or an empty string.

    >>> nearest("rnak", ["rank", "alpha"])
    " Did you mean 'rank'?"
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
