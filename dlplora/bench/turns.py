"""Several benchmark processes on one device: they prepare side by side and time one after the other.

Compiling a decode step keeps one core busy for half a minute and leaves the device idle, so processes that each time one group
prepare at the same time. A file lock is held shared while preparing and exclusively while timing: whoever times is alone, and nobody times
before all have prepared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlplora.errors import ConfigError


class Turns:
    """Alone on the device, or one of several processes that share a lock file.

    Args:
        path: The file; it is made. None: no other process takes part.
        prepare_seconds: After so many seconds no further system is prepared; None: no limit.

    Raises:
        ConfigError: If the file cannot be made, or this system has no file locks.
    """

    def __init__(self, path: Path | None = None, prepare_seconds: float | None = None) -> None:
        self.prepare_seconds = prepare_seconds
        self._end = None if prepare_seconds is None else time.monotonic() + prepare_seconds
        self._file = None
        if path is None:
            return
        try:
            import fcntl
        except ImportError as error:
            raise ConfigError("benchmark processes that take turns need file locks, which this system lacks.") from error
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be used as a lock: {error.strerror}.") from error
        self._lock, self._shared, self._alone = fcntl.flock, fcntl.LOCK_SH, fcntl.LOCK_EX
        self._lock(self._file, self._shared)

    @property
    def shared(self) -> bool:
        """Whether other processes take part."""
        return self._file is not None

    @property
    def late(self) -> bool:
        """Whether the time for preparing is over."""
        return self._end is not None and time.monotonic() > self._end

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Alone on the device; waits until every other process has prepared, and has finished its own turn."""
        if self._file is None:
            yield
            return
        self._lock(self._file, self._alone)
        try:
            yield
        finally:
            self._lock(self._file, self._shared)

    def close(self) -> None:
        """Let the others go on; a process that ends does the same."""
        if self._file is not None:
            self._file.close()
