"""What other threads hand to the engine's: requests, and functions to call between two steps."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from dlplora.errors import GenerationError
from dlplora.serve.jobs import Finished, Job, QueueFullError

Line = deque[tuple[Callable[[], Any], Future[Any]]]


class Intake:
    """Requests that wait, and functions whose callers wait, until the engine has ended.

    Args:
        max_queue: Requests that may wait.
    """

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self._ready = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._tasks: Line = deque()
        """Called when no request is in a slot."""
        self._calls: Line = deque()
        """Called between two steps."""
        self._closed = False

    @property
    def num_waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    def submit(self, *jobs: Job) -> None:
        """Queue jobs, all or none.

        Raises:
            QueueFullError: If that many cannot wait.
            GenerationError: If the engine is closed.
        """
        with self._ready:
            self._require_open()
            if len(self._waiting) + len(jobs) > self.max_queue:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting, {self.max_queue} may; try again later.")
            self._waiting.extend(jobs)
            self._ready.notify()

    def cancel(self, *jobs: Job) -> None:
        """Stop working on jobs; their slots are free before the next step."""
        with self._ready:
            for job in jobs:
                job.cancelled = True
                if job in self._waiting:
                    self._waiting.remove(job)
                    job.report(Finished("cancelled", len(job.prompt_ids), 0, time.monotonic() - job.submitted, None))
            self._ready.notify()

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a short function in the engine's thread, between two steps, and return its value.

        Raises:
            DLPLoRAError: What it raised.
            GenerationError: If the engine is closed.
        """
        return self._result(self._calls, function)

    def _result(self, line: Line, function: Callable[[], Any]) -> Any:
        future: Future[Any] = Future()
        with self._ready:
            self._require_open()
            line.append((function, future))
            self._ready.notify()
        return future.result()

    def _require_open(self) -> None:
        if self._closed:
            raise GenerationError("the engine is closed.")

    def _wait(self, is_running: Callable[[], bool]) -> bool:
        """Wait for something to do, if no request runs; returns whether the engine is still open."""
        with self._ready:
            while not (self._closed or self._waiting or self._tasks or self._calls or is_running()):
                self._ready.wait()
            return not self._closed

    def _end(self) -> list[Job]:
        """Refuse everything from now on; callers of functions get an error, and the requests that waited are returned."""
        with self._ready:
            self._closed = True
            for _, future in (*self._calls, *self._tasks):
                future.set_exception(GenerationError("the server is shutting down."))
            jobs = list(self._waiting)
            for line in (self._calls, self._tasks, self._waiting):
                line.clear()
        return jobs
