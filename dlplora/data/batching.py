"""Which rows form which batch: a pure function of seed and step, so a run can be resumed at any step, bit for bit.

There is no random state. Row p of a task's endless stream, and batch s of a schedule, can each be computed directly.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class TaskStream:
    """The endless, reshuffled stream of one task's rows.

    Every pass over the rows is a new permutation. The stream depends on the task's name and the seed and on nothing else, so
    an expert sees the same rows whether it is trained alone, after others or together with them.

    Args:
        name: Task name.
        num_rows: Rows of the task, at least 1.
        seed: Seed of the run.
    """

    def __init__(self, name: str, num_rows: int, seed: int) -> None:
        self.name = name
        self.num_rows = num_rows
        self._key = [seed, zlib.crc32(name.encode())]
        self._pass = -1
        self._order: np.ndarray[Any, Any] = np.empty(0, dtype=np.int64)

    def row(self, position: int) -> int:
        """Row index at a position of the stream."""
        number, offset = divmod(position, self.num_rows)
        if number != self._pass:
            self._order = np.random.default_rng([*self._key, number]).permutation(self.num_rows)
            self._pass = number
        return int(self._order[offset])


class BatchSchedule:
    """Batches over one or several tasks, each task equally often.

    The stream of the schedule runs through rounds: one row of every task a round, tasks in a new order each time. Batches are cut
    from windows of ``length_group`` batches sorted by length, which saves padding; within a window their order is shuffled.

    Args:
        lengths: Task name -> number of tokens of each of its rows.
        batch_size: Rows per batch.
        seed: Seed of the run.
        length_group: Batches per window; 1 turns sorting off.
    """

    def __init__(self, lengths: Mapping[str, Sequence[int]], batch_size: int, seed: int, length_group: int = 8) -> None:
        self.names = tuple(lengths)
        self.batch_size = batch_size
        self.length_group = length_group
        self._seed = seed
        self._lengths = lengths
        self._streams = [TaskStream(name, len(lengths[name]), seed) for name in self.names]
        self._window = -1
        self._batches: list[list[tuple[str, int]]] = []

    def batch(self, step: int) -> list[tuple[str, int]]:
        """``(task name, row index)`` of every row of batch ``step``, counted from 0."""
        window, offset = divmod(step, self.length_group)
        if window != self._window:
            self._batches = self._cut(window)
            self._window = window
        return self._batches[offset]

    def _cut(self, window: int) -> list[list[tuple[str, int]]]:
        size = self.batch_size * self.length_group
        rows = [self._at(position) for position in range(window * size, (window + 1) * size)]
        if self.length_group == 1:
            return [rows]
        rows.sort(key=lambda row: self._lengths[row[0]][row[1]])  # stable: ties keep the order of the stream
        order = np.random.default_rng([self._seed, len(self.names), window]).permutation(self.length_group)
        return [rows[k * self.batch_size : (k + 1) * self.batch_size] for k in order]

    def _at(self, position: int) -> tuple[str, int]:
        num_tasks = len(self._streams)
        if num_tasks == 1:
            return self.names[0], self._streams[0].row(position)
        number, offset = divmod(position, num_tasks)
        task = int(self._round(number)[offset])
        return self.names[task], self._streams[task].row(number)

    def _round(self, number: int) -> np.ndarray[Any, Any]:
        return np.random.default_rng([self._seed, zlib.crc32(b"rounds"), number]).permutation(len(self._streams))


def parts_by_length(lengths: Sequence[int], count: int) -> list[int]:
    """Cut rows that are sorted by length into batches with as little padding as possible.

    No batch holds more tokens, padding included, than one with an equal share of the rows, each as long as the longest of all: accumulation
    is used to save memory.

    Args:
        lengths: Tokens of each row, ascending; at least ``count`` rows.
        count: Batches.

    Returns:
        Where each batch ends, ascending; the last is the number of rows.
    """
    width, num_rows = np.asarray(lengths), len(lengths)
    bound = -(-num_rows // count) * width[-1]
    least = np.full(num_rows + 1, np.inf)  # tokens of the first j rows in as many batches as were placed
    least[0] = 0
    begins = []
    for _ in range(count):
        totals = np.full((num_rows + 1, num_rows + 1), np.inf)  # [j, i]: the last batch is rows i to j
        for end in range(1, num_rows + 1):
            tokens = (end - np.arange(end)) * width[end - 1]
            totals[end, :end] = np.where(tokens <= bound, least[:end] + tokens, np.inf)
        begins.append(totals.argmin(axis=1))
        least = totals.min(axis=1)
    ends = [num_rows]
    for begin in reversed(begins[1:]):
        ends.append(int(begin[ends[-1]]))
    return ends[::-1]


class StepLoader:
    """What Lightning iterates over: batch ``s`` is ``make(s)``.

    It implements the ``state_dict`` interface of resumable loaders; the state is the next step.

    Args:
        make: Builds one batch from its step; must be pure. Steps go on counting from one epoch to the next.
        num_steps: Batches per epoch.
        epoch: The current epoch, asked when an epoch's first batch is made.
    """

    def __init__(self, make: Callable[[int], Any], num_steps: int, epoch: Callable[[], int] = lambda: 0) -> None:
        self._make = make
        self._num_steps = num_steps
        self._epoch = epoch
        self._next = 0
        self._resumed = False

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[Any]:
        if not self._resumed:
            self._next = 0
        self._resumed = False
        first = self._epoch() * self._num_steps
        while self._next < self._num_steps:
            self._next += 1
            yield self._make(first + self._next - 1)

    def state_dict(self) -> dict[str, int]:
        """The step that comes next."""
        return {"next_step": self._next}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from the step of a saved loader."""
        self._next = int(state["next_step"])
        self._resumed = True
