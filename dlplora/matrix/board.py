"""Assignment of cells to workers by small files in a shared folder, without a server.

* ``claims/CELL.N``: attempt N is taken. The file is created atomically and once (a hard link to a finished file), so only one worker gets
  it.
* ``beats/CELL.N``: a counter that the holder increments. A worker that sees the same number for a whole lease, by its own monotonic clock,
  takes attempt N + 1. Clocks of different machines are never compared, and setting a clock has no effect.
* ``ended/CELL.N``: the attempt failed (with the reason) or was given back.
* ``done/CELL``: the cell is finished, and which attempt's files count. It is created once, like a claim. A worker that was taken for dead
  and continues finds this file, or its successor's claim, and gives up.

Links and renames are atomic on local disks and on NFS; no file is ever locked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dlplora.documents import read_json
from dlplora.errors import ConfigError

CLAIMS, BEATS, ENDED, DONE = "claims", "beats", "ended", "done"
BEATS_A_LEASE = 6
"""Heartbeats per lease; a holder must miss all of them to lose its cell."""
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True, slots=True)
class State:
    """Status of a cell."""

    kind: Literal["free", "running", "done", "failed"]
    attempt: int
    """Attempt of the holder or of the failure; for a free cell the attempt to claim."""


class LostError(Exception):
    """Another worker has the cell now; nothing of this attempt counts."""


def publish_once(path: Path, content: dict[str, Any]) -> bool:
    """Write a JSON file atomically, unless one of that name exists.

    Returns:
        Whether it is ours.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(content, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, path)
            return True
        except FileExistsError:
            return os.stat(temporary).st_nlink == 2  # NFS: the answer to the first try was lost, the second found our own link
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
        return _create_once(path, temporary.read_bytes())
    except OSError as error:
        if error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _create_once(path: Path, content: bytes) -> bool:
    """The same on file systems without hard links; a kill in between may leave the file cut off, which readers expect."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
    return True


class Board:
    """The folder, as one worker sees it.

    Args:
        folder: Shared by all workers.
        lease_s: How long a counter may stay unchanged; the same for all workers.
        clock: Seconds that never run backwards.
    """

    def __init__(self, folder: Path, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.lease_s, self.clock = folder, lease_s, clock
        self._seen: dict[tuple[str, int], tuple[bytes, float]] = {}
        # Claims and ends never vanish, so only new names are looked at; a finished cell may be reopened.
        self._names: dict[str, set[str]] = {CLAIMS: set(), ENDED: set(), DONE: set()}
        self._claimed: dict[str, int] = {}
        self._ends: dict[str, set[int]] = {}
        for name in (CLAIMS, BEATS, ENDED, DONE):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def states(self, cells: Iterable[str], *, look_for_dead: bool = False) -> dict[str, State]:
        """Status of every cell.

        Args:
            cells: Which.
            look_for_dead: Read the counters of running cells; a cell is free if this object saw the same counter for a whole lease.
        """
        for cell, attempt in self._new(ENDED):  # before the claims: an end that is seen has its claim
            self._ends.setdefault(cell, set()).add(attempt)
        for cell, attempt in self._new(CLAIMS):
            self._claimed[cell] = max(attempt, self._claimed.get(cell, -1))
        self._names[DONE] = set(os.listdir(self.folder / DONE))
        return {cell: self._state(cell, look_for_dead) for cell in cells}

    def _new(self, kind: str) -> Iterator[tuple[str, int]]:
        """(cell, attempt) of files that were not there at the last call."""
        new = set(os.listdir(self.folder / kind)) - self._names[kind]
        self._names[kind] |= new
        for name in new:
            cell, _, number = name.rpartition(".")
            if not name.startswith(".") and number.isdigit():
                yield cell, int(number)

    def _state(self, cell: str, look_for_dead: bool) -> State:
        last = self._claimed.get(cell, -1)
        if cell in self._names[DONE]:
            return State("done", last)
        if last < 0:
            return State("free", 0)
        if last in self._ends.get(cell, ()):
            return State("failed", last) if self.end_of(cell, last).get("kind") == "failed" else State("free", last + 1)
        dead = look_for_dead and self._stands_still(cell, last)
        return State("free", last + 1) if dead else State("running", last)

    def _stands_still(self, cell: str, attempt: int) -> bool:
        now, counter = self.clock(), self.counter(cell, attempt)
        known = self._seen.get((cell, attempt))
        if known is None or known[0] != counter:
            self._seen[cell, attempt] = (counter, now)
            return False
        return now - known[1] > self.lease_s

    def counter(self, cell: str, attempt: int) -> bytes:
        """The counter's text; empty before the first beat."""
        try:
            return (self.folder / BEATS / f"{cell}.{attempt}").read_bytes()
        except FileNotFoundError:
            return b""

    def num_deaths(self, cell: str) -> int:
        """Attempts before the last one that ended without a word, as far as ``states`` has seen; those before a failure no longer count."""
        last, ended = self._claimed.get(cell, 0), self._ends.get(cell, set())
        failed = max((one for one in ended if one < last and self.end_of(cell, one).get("kind") == "failed"), default=-1)
        return sum(one not in ended for one in range(failed + 1, last))

    def claim(self, cell: str, attempt: int, worker: str) -> Lease | None:
        """Claim an attempt; None if another worker claimed it first or the cell is done."""
        if not publish_once(self.folder / CLAIMS / f"{cell}.{attempt}", {"worker": worker}):
            return None
        lease = Lease(self, cell, attempt, worker)
        if self.is_done(cell):  # it was finished between our look and our claim
            lease.release()
            return None
        try:
            lease.beat()
        except LostError:  # this process stood still between claim and first beat for longer than a lease
            return None
        return lease

    def reopen(self, cell: str) -> None:
        """Make a finished cell free again; its last attempt counts as given back."""
        attempts = [int(path.suffix[1:]) for path in (self.folder / CLAIMS).glob(f"{cell}.*")]
        if attempts:
            publish_once(self.folder / ENDED / f"{cell}.{max(attempts)}", {"kind": "released", "reason": "what it had made is gone"})
        (self.folder / DONE / cell).unlink(missing_ok=True)

    def is_done(self, cell: str) -> bool:
        """Whether the cell is finished."""
        return (self.folder / DONE / cell).exists()

    def holder(self, cell: str, attempt: int) -> str:
        """Who claimed an attempt, in words; also of a file that was cut off."""
        return str(self._read(CLAIMS, f"{cell}.{attempt}").get("worker", "an unknown worker"))

    def end_of(self, cell: str, attempt: int) -> dict[str, Any]:
        """How an attempt ended: ``kind`` (``failed`` or ``released``) and ``reason``; empty if the file was cut off."""
        return self._read(ENDED, f"{cell}.{attempt}")

    def _read(self, kind: str, name: str) -> dict[str, Any]:
        try:
            return read_json(self.folder / kind / name)
        except ConfigError:
            return {}

    def result(self, cell: str) -> dict[str, Any]:
        """What was written when the cell was finished.

        Raises:
            ConfigError: If the file was cut off; only file systems without hard links can do that.
        """
        path = self.folder / DONE / cell
        try:
            return read_json(path)
        except ConfigError as error:
            raise ConfigError(f"{path} is damaged; remove it, and a worker finishes the cell again.") from error


class Lease:
    """One attempt at one cell, held by this process; ``kept_alive`` raises the counter in a thread.

    Args:
        board: The board.
        cell: The cell.
        attempt: Its attempt.
        worker: Who holds it.
    """

    def __init__(self, board: Board, cell: str, attempt: int, worker: str) -> None:
        self.board, self.cell, self.attempt, self.worker = board, cell, attempt, worker
        self.lost = ""
        """Why nothing of this attempt counts any more; empty as long as it does."""
        self._count = 0

    @property
    def name(self) -> str:
        """``CELL.ATTEMPT``, as the files are called."""
        return f"{self.cell}.{self.attempt}"

    def check(self) -> None:
        """Raise if another worker has the cell.

        Raises:
            LostError: With the reason.
        """
        successor = self.board.folder / CLAIMS / f"{self.cell}.{self.attempt + 1}"
        if not self.lost and successor.exists():
            self.lost = f"taken over by {self.board.holder(self.cell, self.attempt + 1)}"
        if not self.lost and self.board.is_done(self.cell):
            self.lost = "finished by another worker"
        if self.lost:
            raise LostError(self.lost)

    def beat(self) -> None:
        """Raise the counter; of fixed width and written in place, so that a full disk does not stop it.

        Raises:
            LostError: If another worker has the cell.
        """
        self.check()
        self._count += 1
        handle = os.open(self.board.folder / BEATS / self.name, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(handle, b"%016d\n" % self._count, 0)
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def kept_alive(self, when_lost: Callable[[], None]) -> Any:
        """Raise the counter in a thread for the time of the block.

        Args:
            when_lost: Called in that thread, once, if another worker has the cell, or if no heartbeat could be written for most of a lease.
        """
        stop = threading.Event()
        thread = threading.Thread(target=self._keep, args=(stop, when_lost), name=f"beat-{self.name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _keep(self, stop: threading.Event, when_lost: Callable[[], None]) -> None:
        last = self.board.clock()
        while not stop.wait(self.board.lease_s / BEATS_A_LEASE):
            try:
                self.beat()
                last = self.board.clock()
            except LostError:
                when_lost()
                return
            except OSError as error:
                if self.board.clock() - last > self.board.lease_s * 2 / 3:
                    self.lost = f"no heartbeat could be written ({error.strerror or error}: {error.filename or self.board.folder})"
                    when_lost()
                    return

    def finish(self, result: dict[str, Any]) -> None:
        """Mark the cell as finished.

        Args:
            result: What readers of the cell need to know.

        Raises:
            LostError: If another worker has the cell, or has finished it.
        """
        self.check()
        if not publish_once(self.board.folder / DONE / self.cell, {"worker": self.worker, **result}):
            self.lost = "finished by another worker"
            raise LostError(self.lost)

    def fail(self, reason: str) -> None:
        """End the attempt; the cell is not tried again without an explicit request."""
        publish_once(self.board.folder / ENDED / self.name, {"kind": "failed", "reason": " ".join(reason.split()), "worker": self.worker})

    def release(self) -> None:
        """Give the cell back, so that no worker has to wait for the lease to expire."""
        publish_once(self.board.folder / ENDED / self.name, {"kind": "released", "worker": self.worker})
