"""Which request is in which slot, and which prompts are processed next.

Decoding rows are in the first slots, in order, followed by the prompts in progress. Both can thus be read without copying; one row is
copied when a request leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

from dlplora.serve.rows import Row
from dlplora.serve.slots import SlotCache


class Batch:
    """The requests in slots.

    Args:
        cache: With at least one slot more than requests run at once; the last one is used for exchanging two rows.

    Attributes:
        rows: Requests that decode; the place in the list is the slot.
        prompts: Requests with a prompt in progress, in the slots after the rows.
    """

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        self.rows: list[Row] = []
        self.prompts: list[Row] = []

    def __len__(self) -> int:
        return len(self.rows) + len(self.prompts)

    @property
    def everyone(self) -> list[Row]:
        """All requests, by slot."""
        return [*self.rows, *self.prompts]

    def clear(self) -> list[Row]:
        """Free all slots; returns the requests that were in them."""
        found = self.everyone
        self.rows, self.prompts = [], []
        return found

    def join(self, row: Row) -> None:
        """Give a slot to a request with an unprocessed prompt."""
        self.prompts.append(row)

    def leave(self, row: Row) -> None:
        """Free the slot of a request; at most one decoding row and one prompt are moved."""
        if row in self.prompts:
            place, last = self.prompts.index(row), len(self.prompts) - 1
            self._move(self.prompts[last], len(self.rows) + last, len(self.rows) + place)
            self.prompts[place] = self.prompts[last]
            self.prompts.pop()
            return
        place, last = self.rows.index(row), len(self.rows) - 1
        self._move(self.rows[last], last, place)
        self.rows[place] = self.rows[last]
        self.rows.pop()
        if self.prompts:  # the last prompt closes the gap in front of the others
            moved = self.prompts.pop()
            self._move(moved, last + 1 + len(self.prompts), last)
            self.prompts.insert(0, moved)

    def _move(self, row: Row, source: int, target: int) -> None:
        if source != target:
            self.cache.move(source, target, row.cached)

    def next_chunk(self, budget: int) -> list[tuple[Row, int]]:
        """The prompts that are processed next and how many tokens of each, padding included at most ``budget`` tokens.

        The oldest prompt always continues; if it does not fit, it shares the budget with those after it. Of those, in order, the
        prompts are taken that fill at least half of their row of the padded batch.
        """
        waiting = sorted(self.prompts, key=lambda row: row.job.number)
        if not waiting:
            return []
        oldest = waiting[0]
        width = min(len(oldest.pending), budget)
        if width == budget and len(waiting) > 1:
            width = max(1, min(budget // 2, len(waiting[1].pending)))
        chosen = [oldest]
        for row in waiting[1:]:
            whole, rows = max(width, len(row.pending)), len(chosen) + 1
            if rows * width > budget:
                break
            if 2 * len(row.pending) < width:
                continue
            if rows * whole <= budget and min(len(one.pending) for one in chosen) * 2 >= whole:
                width = whole
            chosen.append(row)
        return [(row, min(len(row.pending), width)) for row in chosen]

    def arrange(self, chosen: Sequence[tuple[Row, int]]) -> list[tuple[Row, int]]:
        """Bring chosen prompts to the first slots after the decoding rows, those that end with this chunk first; returns that order."""
        order = sorted(chosen, key=lambda pair: len(pair[0].pending) - pair[1])
        for place, (row, _) in enumerate(order):
            self._exchange(place, self.prompts.index(row))
        return order

    def _exchange(self, one: int, other: int) -> None:
        if one == other:
            return
        first, second, begin = self.prompts[one], self.prompts[other], len(self.rows)
        spare = self.cache.slots - 1
        self._move(first, begin + one, spare)
        self._move(second, begin + other, begin + one)
        self._move(first, spare, begin + other)
        self.prompts[one], self.prompts[other] = second, first

    def begin_decoding(self, count: int) -> None:
        """The first ``count`` prompts are complete."""
        self.rows += self.prompts[:count]
        del self.prompts[:count]
