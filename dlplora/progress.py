"""Progress of long work: a bar on a terminal, plain lines in a file or a pipe.

A file gets one line at the start, one at least every half minute, and one at the end, each flushed. A thread writes them, so that a slow
step does not silence the log.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
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
        stream: Where to write; None is standard error.
        done: Units that an earlier run finished; they do not count for the rate.
        interval_s: Time between two lines, s; None is that of the kind of stream.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        *,
        unit: str = "step",
        plural: str | None = None,
        stream: TextIO | None = None,
        done: int = 0,
        interval_s: float | None = None,
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.units = plural or f"{unit}s"
        self.note = ""
        """Shown at the end of a line, for instance the loss."""
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._interval_s = interval_s or (BAR_INTERVAL_S if self._is_terminal else LINE_INTERVAL_S)
        self._before = self._done = done
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        size = "" if self.total is None else f", {self.total} {self.units}"
        resumed = f", {self._done} done before" if self._done else ""
        if not self._is_terminal:
            self._write(f"{self.what}: started{size}{resumed}\n")
        self._thread = threading.Thread(target=self._report, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(finished=kind is None)

    def update(self, count: int = 1) -> None:
        """Add finished units."""
        self._done += count

    def move_to(self, done: int) -> None:
        """Set the number of finished units."""
        self._done = done

    def say(self, text: str) -> None:
        """Write a line of its own, above the bar if there is one."""
        self._write(f"{self._erase()}{text}\n")

    def close(self, *, finished: bool = True) -> None:
        """Stop, and say how long it took; a second call does nothing.

        Args:
            finished: False after an error, whose message says what happened.
        """
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        seconds = time.monotonic() - self._start
        end = f"{self.what}: {self._done} {self.units} in {duration(seconds)}{self._noted()}\n" if finished else ""
        self._write(self._erase() + end)

    def line(self) -> str:
        """The state as text: steps, rate, time left, note."""
        done, elapsed = self._done, max(time.monotonic() - self._start, 1e-9)
        rate = (done - self._before) / elapsed
        of = "" if self.total is None else f"/{self.total}"
        text = f"{self.what}: {done}{of} {self.units}, {rate:.3g} {self.units}/s"
        if self.total is not None and rate > 0:
            text += f", {duration(max(self.total - done, 0) / rate)} left"
        return text + self._noted()

    def _noted(self) -> str:
        return f", {self.note}" if self.note else ""

    def _report(self) -> None:
        while not self._stop.wait(self._interval_s):
            if not self._write(self._bar() if self._is_terminal else self.line() + "\n"):
                return

    def _bar(self) -> str:
        text = self.line()
        if self.total:
            filled = round(BAR_WIDTH * min(self._done / self.total, 1.0))
            text = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {text}"
        return self._erase() + text[: shutil.get_terminal_size().columns - 1]

    def _erase(self) -> str:
        return "\r\x1b[K" if self._is_terminal else ""

    def _write(self, text: str) -> bool:
        """Whether the text could be written; a reader that has gone must not end the work."""
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
