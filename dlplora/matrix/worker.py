"""One worker: takes cells until none is left, on any machine that sees the folder."""

from __future__ import annotations

import _thread
import os
import random
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from dlplora.config import require_writable
from dlplora.errors import DLPLoRAError
from dlplora.interruption import DISK_ERRORS
from dlplora.matrix.board import Board, Lease, LostError, State
from dlplora.matrix.cells import CellRunner
from dlplora.matrix.plan import Cell, Plan, require_same_code, require_same_profiles
from dlplora.matrix.profiles import subjects_of
from dlplora.matrix.staging import Staging
from dlplora.progress import duration

Say = Callable[[str], None]
AMONG = 4
"""A worker draws from the first quarter of the available cells, so that few workers claim the same one."""
POLL_S = 1.0
"""First pause of an idle worker; the following ones are longer."""
GIVEN_UP = "UncompletedJobError"
"""Submitit's error for a job that it does not queue again; it says nothing against the cell."""
TAKEN = signal.SIGALRM
"""Raised by the heartbeat thread in the main thread, never sent by another process. SIGINT is ignored in a shell background job."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a worker takes on."""

    max_cells: int | None = None
    """Cells it does before it ends."""
    max_memory_gb: float | None = None
    """Cells that are predicted to need more are left to others."""
    retry_failed: bool = False
    """Whether cells that have failed before this worker began are tried again."""
    device: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Status of the plan when a worker ended."""

    num_done_here: int
    num_done: int
    num_failed: int
    num_left: int
    """Cells that were neither: they need a failed one, are too large for this worker, or others work on them."""


class TakenOver(KeyboardInterrupt):
    """The current cell belongs to another worker; a ``KeyboardInterrupt``, so that trainings stop as after Ctrl-C."""


def name_of_this_worker() -> str:
    """Host, process and a random part."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"


def work(plan: Plan, say: Say, limits: Limits | None = None) -> Tally:
    """Do cells until none is left that this worker could do.

    Args:
        plan: The plan.
        say: Told what happens.
        limits: What it takes on; None is everything.

    Raises:
        DLPLoRAError: If plan, profiles or packages do not fit.
        KeyboardInterrupt: If it was interrupted; the cell in work was given back, with its resume files.
    """
    require_same_code(plan)
    require_writable(plan.folder, "the plan's folder")
    subjects = {one.name: one for one in subjects_of(plan.header.request, plan.folder)}
    require_same_profiles(plan, {name: one.hash() for name, one in subjects.items()})
    limits = limits or Limits()
    runner = CellRunner(plan, subjects, limits.device)
    try:
        return _Worker(plan, runner, say, limits).run()
    finally:
        runner.close()


class _Worker:
    def __init__(self, plan: Plan, runner: CellRunner, say: Say, limits: Limits) -> None:
        self.plan, self.runner, self.say, self.limits = plan, runner, say, limits
        self.name = name_of_this_worker()
        self.board = Board(plan.folder, plan.header.request.lease_s)
        self.staging = Staging(self.board)
        self.cells = {cell.id: cell for cell in plan.cells}
        self.draw = random.Random(self.name)
        self.order = by_rank(plan.cells)
        self.last: Cell | None = None
        self.retried = self._failed() if limits.retry_failed else set()
        self._reopen()

    def _failed(self) -> set[str]:
        return {cell for cell, state in self.board.states(self.cells).items() if state.kind == "failed"}

    def _reopen(self) -> None:
        """Free the finished cells whose files were removed, or belong to another recipe, if something still needs them."""
        done = {cell for cell, state in self.board.states(self.cells).items() if state.kind == "done"}
        self.staging.publish_all(done)
        needed: set[str] = set()
        for cell in reversed(self.plan.cells):  # what needs a cell stands behind it
            if cell.id in done and cell.id in needed and not self.staging.is_there(cell.id):
                self.say(f"{cell.label}: what it had made is gone; it is done again")
                self.board.reopen(cell.id)
                done.remove(cell.id)
            if cell.id not in done:
                needed.update(cell.after)

    def run(self) -> Tally:
        num_here, wait = 0, POLL_S / 2
        while self.limits.max_cells is None or num_here < self.limits.max_cells:
            states = self._states(look_for_dead=False)
            ready = self._ready(states)
            if not ready:
                states = self._states(look_for_dead=True)
                ready = self._ready(states)
            if not ready:
                if not any(state.kind == "running" for state in states.values()):
                    break
                wait = min(wait * 1.5, self.board.lease_s / 4)  # many idle workers must not wear out the file server
                time.sleep(wait)
                continue
            wait = POLL_S / 2
            cell = self._choose(ready)
            lease = self.board.claim(cell.id, states[cell.id].attempt, self.name)
            if lease is not None:
                num_here += self._attempt(cell, lease, states)
        return self._tally(num_here)

    def _states(self, *, look_for_dead: bool) -> dict[str, State]:
        states = self.board.states(self.cells, look_for_dead=look_for_dead)
        self.staging.publish_all({cell for cell, state in states.items() if state.kind == "done"})
        for cell in self.retried:
            if states[cell].kind == "failed":
                states[cell] = State("free", states[cell].attempt + 1)
        return states

    def _ready(self, states: Mapping[str, State]) -> list[Cell]:
        most = self.limits.max_memory_gb
        return [cell for cell in ready_cells(self.order, states) if most is None or (cell.memory_gb or 0) <= most]

    def _choose(self, ready: Sequence[Cell]) -> Cell:
        """A cell like the last one if there is any (its base model is loaded), else one that many others wait for."""
        alike = [cell for cell in ready if self.last and (cell.profile, cell.kind) == (self.last.profile, self.last.kind)]
        return choose(alike or ready, self.draw)

    def _attempt(self, cell: Cell, lease: Lease, states: Mapping[str, State]) -> int:
        """One attempt; 1 if it finished the cell."""
        self.retried.discard(cell.id)
        self.board.states([cell.id])
        deaths = self.board.num_deaths(cell.id)
        if deaths >= self.plan.header.request.max_deaths:
            lease.fail(f"{deaths} workers died during it without an error; too little memory?")
            return 0
        again = f" (attempt {lease.attempt + 1})" if lease.attempt else ""
        self.say(f"{cell.label}{again} …")
        start = time.monotonic()
        try:
            if self.staging.adopted(lease):
                self.say(f"{cell.label}: finished by an earlier attempt")
                return 1
            with _stopping_if_taken(), lease.kept_alive(lambda: _thread.interrupt_main(TAKEN)):
                outcome = self.runner.do(cell, self.staging.begin(lease))
            seconds = time.monotonic() - start
            told = {"seconds": round(seconds, 2), "kind": cell.kind, "profile": cell.profile}
            self.staging.finish(lease, outcome.moves, {**told, **outcome.facts})
        except (LostError, TakenOver) as error:
            return self._given_up(cell, lease.lost or str(error))
        except (DLPLoRAError, MemoryError, RuntimeError, OSError) as error:  # torch raises RuntimeErrors, also for memory
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                self._last_words(lease, error)
                raise
            if type(error).__name__ == GIVEN_UP:  # raised in submitit's handler of the signal before the end of a job
                lease.release()
                raise
            self.runner.close()
            lease.fail(str(error) if isinstance(error, DLPLoRAError) else f"{type(error).__name__}: {error}")
            self.say(f"{cell.label}: failed: {' '.join(str(error).split())}")
            return 0
        except BaseException as error:
            self._last_words(lease, error)
            raise
        self.last = cell
        self.say(f"{cell.label}: {duration(seconds)}")
        return 1

    def _given_up(self, cell: Cell, reason: str) -> int:
        self.runner.close()
        self.say(f"{cell.label}: given up, {reason}")
        return 0

    def _last_words(self, lease: Lease, error: BaseException) -> None:
        """Before the end of the process: give the cell back if this process was stopped or the folder failed, else name the fault."""
        try:
            if isinstance(error, (KeyboardInterrupt, SystemExit, OSError)):
                lease.release()
            else:
                lease.fail(f"{type(error).__name__}: {error}")
        except OSError:
            return  # a folder that takes no files any more; the lease runs out

    def _tally(self, num_here: int) -> Tally:
        states = self.board.states(self.cells)
        kinds = [state.kind for state in states.values()]
        done, failed = kinds.count("done"), kinds.count("failed")
        return Tally(num_done_here=num_here, num_done=done, num_failed=failed, num_left=len(kinds) - done - failed)


@contextmanager
def _stopping_if_taken() -> Iterator[None]:
    """Inside the block the heartbeat's thread can end the cell in work."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TakenOver("taken over by another worker")

    before = signal.signal(TAKEN, stop)
    try:
        yield
    finally:
        signal.signal(TAKEN, before)


def by_rank(cells: Sequence[Cell]) -> list[Cell]:
    """The cells by the length of the longest chain that begins with each, the longest first; unknown lengths count a minute."""
    chain: dict[str, float] = {}
    behind: dict[str, float] = {}
    for cell in reversed(cells):
        chain[cell.id] = (cell.minutes or 1.0) + behind.get(cell.id, 0.0)
        for before in cell.after:
            behind[before] = max(behind.get(before, 0.0), chain[cell.id])
    return sorted(cells, key=lambda cell: -chain[cell.id])


def ready_cells(cells: Sequence[Cell], states: Mapping[str, State]) -> list[Cell]:
    """Cells without a worker and with finished dependencies, in the order given."""
    done = {cell for cell, state in states.items() if state.kind == "done"}
    return [cell for cell in cells if states[cell.id].kind == "free" and done.issuperset(cell.after)]


def choose(ready: Sequence[Cell], draw: random.Random) -> Cell:
    """A random cell of the first ones, so that few workers claim the same one."""
    return draw.choice(ready[: max(8, len(ready) // AMONG)])
