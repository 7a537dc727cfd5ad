"""Progress of long work: a bar on a terminal, plain lines in a file or a pipe.

A file gets one line at the start, one at least every 30 seconds, and one at the end, each flushed. A thread writes them, so slow steps do
not delay them.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

LINE_INTERVAL_S = 30.0
"""Longest silence in a file or a pipe, s."""
BAR_INTERVAL_S = 0.5
"""Time between two drawings of the bar, s."""
BAR_WIDTH = 20


class Progress:
    """Counts finished units of work and shows them. Use it as a context manager.

    Args:
        what: What is being done; every line begins with it.
        total: Units in all; None if not known, and then no time left is shown.
        unit: Name of one unit.
        plural: Name of several; None adds an s.
        done: Units that an earlier run finished; they do not count for the rate.
        brief: Whether the lines at the start and at the end are left to the caller.
        stream: Where to write; None is standard error.
        interval_s: Time between two lines, s; None is that of the kind of stream.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        *,
        unit: str = "step",
        plural: str | None = None,
        done: int = 0,
        brief: bool = False,
        stream: TextIO | None = None,
        interval_s: float | None = None,
    ) -> None:
        self.units = plural or f"{unit}s"
        self.note = ""
        """Shown at the end of a line, for instance the loss."""
        self._brief = brief
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._interval_s = interval_s or (BAR_INTERVAL_S if self._is_terminal else LINE_INTERVAL_S)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._begin(what, total, done)

    def _begin(self, what: str, total: int | None, done: int = 0) -> None:
        self._what, self._total, self._before, self._done, self._start = what, total, done, done, time.monotonic()

    def __enter__(self) -> Progress:
        self._begin(self._what, self._total, self._done)
        if not self._is_terminal and not self._brief:
            size = "" if self._total is None else f", {self._total} {self.units}"
            self._write(f"{self._what}: started{size}{f', {self._done} done before' if self._done else ''}\n")
        self._thread = threading.Thread(target=self._report, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(finished=kind is None)

    @contextmanager
    def phase(self, *, total: int, desc: str, disable: bool = False) -> Iterator[Progress]:
        """Count the units of one part of the work; a replacement for ``tqdm`` with the same arguments.

        Args:
            total: Units of this part.
            desc: Added to what is being done.
            disable: Ignored; to be silent, do not create a ``Progress``.
        """
        whole = self._what
        self._begin(f"{whole}, {desc}", total)
        try:
            yield self
        finally:
            self._begin(whole, None)

    def update(self, count: int = 1) -> None:
        """Add finished units."""
        self._done += count

    def say(self, text: str) -> None:
        """Write a line of its own, above the bar if there is one."""
        self._write(f"{self._erase()}{text}\n")

    def close(self, *, finished: bool = True) -> None:
        """Stop, and say how long it took; a second call does nothing.

        Args:
            finished: False after an error; its message says what happened.
        """
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        told = f"{self._what}: {self._done} {self.units} in {duration(time.monotonic() - self._start)}{self._noted()}\n"
        self._write(self._erase() + (told if finished and not self._brief else ""))

    def line(self) -> str:
        """The state as text: units done, rate, time left, note; before the first unit the time so far."""
        done, elapsed = self._done, max(time.monotonic() - self._start, 1e-9)
        rate = (done - self._before) / elapsed
        if rate <= 0:
            return f"{self._what}: {duration(elapsed)} so far{self._noted()}"
        text = f"{self._what}: {done}{'' if self._total is None else f'/{self._total}'} {self.units}, {rate:.3g} {self.units}/s"
        if self._total is not None:
            text += f", {duration(max(self._total - done, 0) / rate)} left"
        return text + self._noted()

    def _noted(self) -> str:
        return f", {self.note}" if self.note else ""

    def _report(self) -> None:
        while not self._stop.wait(self._interval_s):
            if not self._write(self._bar() if self._is_terminal else self.line() + "\n"):
                return

    def _bar(self) -> str:
        text = self.line()
        if self._total:
            filled = round(BAR_WIDTH * min(self._done / self._total, 1.0))
            text = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {text}"
        return self._erase() + text[: shutil.get_terminal_size().columns - 1]

    def _erase(self) -> str:
        return "\r\x1b[K" if self._is_terminal else ""

    def _write(self, text: str) -> bool:
        """Whether the text could be written; a closed pipe must not end the work."""
        try:
            with self._lock:
                self._stream.write(text)
                self._stream.flush()
        except (OSError, ValueError):  # a broken pipe, a closed stream
            return False
        return True


def duration(seconds: float) -> str:
    """Time as ``m:ss``, or ``h:mm:ss`` from one hour on.

    >>> duration(61.4), duration(3725)
    ('1:01', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
