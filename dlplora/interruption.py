"""SIGTERM ends a command like Ctrl-C: unfinished work is cleaned up, one line is printed, and the exit code is 143."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG})
"""Errors that say something about a folder and nothing about what is written there."""
DISK_FAILED = 74
"""Exit code of a training that another command started, if it ended with one of them (``EX_IOERR``)."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells have it: 130."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code after SIGTERM: 143."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. A ``KeyboardInterrupt``, so that everything that cleans up after Ctrl-C does so here too."""


def _raise(signum: int, frame: FrameType | None) -> None:
    # While Lightning trains, its handler is installed and calls this one. It stops by itself between two batches, where a resume file
    # can be written; an exception here would end the batch in the middle.
    if signal.getsignal(signal.SIGTERM) is _raise:
        raise Terminated


@contextmanager
def raising_on_sigterm() -> Iterator[None]:
    """Inside the block SIGTERM raises ``Terminated``; outside the main thread, where no handler can be set, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(error: KeyboardInterrupt) -> int:
    """143 after SIGTERM, 130 after Ctrl-C."""
    return int(TERMINATED if isinstance(error, Terminated) else INTERRUPTED)
