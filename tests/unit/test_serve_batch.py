"""Slots and chunks of prompts: every request keeps its keys, no slot is lost, nobody starves."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the server's packages are not installed: pip install -e '.[serve]'")
from dlplora.serve.batch import Batch


class Slots:
    """Remembers whose tokens are in which slot."""

    def __init__(self, num: int) -> None:
        self.slots, self.held = num, [{} for _ in range(num)]

    def move(self, source: int, target: int, length: int) -> None:
        self.held[target].update({place: self.held[source][place] for place in range(length)})

    def write(self, slot: int, row: Any, count: int) -> None:
        self.held[slot].update({place: (row.job.number, place) for place in range(row.cached, row.cached + count)})


def request(number: int, tokens: int) -> Any:
    return SimpleNamespace(job=SimpleNamespace(number=number), pending=[0] * tokens, cached=0)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 40))
def test_requests_keep_their_tokens_whoever_joins_and_leaves(seed: int, budget: int) -> None:
    dice, cache = random.Random(seed), Slots(6)
    batch: Any = Batch(cache)  # type: ignore[arg-type]
    ages: dict[int, int] = {}
    for number in range(60):
        if len(batch) < 5 and number < 40:
            batch.join(request(number, dice.randint(1, 30)))
        chosen = batch.next_chunk(budget)
        assert bool(chosen) == bool(batch.prompts)
        if chosen:
            assert len(chosen) * max(count for _, count in chosen) <= max(budget, 1)
            assert min(batch.prompts, key=lambda row: row.job.number) is chosen[0][0], "the oldest prompt always goes on"
        order = batch.arrange(chosen)
        assert batch.prompts[: len(order)] == [row for row, _ in order]
        for place, (row, count) in enumerate(order):
            assert 0 < count <= len(row.pending)
            cache.write(len(batch.rows) + place, row, count)
            row.cached, row.pending = row.cached + count, row.pending[count:]
        ended = [not row.pending for row, _ in order]
        assert ended == sorted(ended, reverse=True)
        batch.begin_decoding(sum(ended))
        for row in dice.sample(batch.everyone, dice.randint(0, min(2, len(batch)))):
            batch.leave(row)
        for slot, row in enumerate(batch.everyone):
            assert [cache.held[slot][place] for place in range(row.cached)] == [(row.job.number, place) for place in range(row.cached)]
            ages[row.job.number] = ages.get(row.job.number, 0) + 1


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([60, 60, 60, 60, 60], 256, [60, 60, 60, 60]),
        ([60, 70, 50], 256, [60, 70, 50]),
        ([4000, 60, 70], 256, [70, 60, 70]),  # a long one does not keep the others waiting
        ([4000, 3000, 70], 256, [128, 128]),
        ([4000], 256, [256]),
        ([60, 4000, 20, 40], 256, [60, 60, 40]),  # a long one begins beside the others
        ([1, 1, 1], 2, [1, 1]),
    ],
)
def test_chunks(lengths: list[int], budget: int, expected: list[int]) -> None:
    batch: Any = Batch(Slots(8))  # type: ignore[arg-type]
    for number, length in enumerate(lengths):
        batch.join(request(number, length))
    assert [count for _, count in batch.next_chunk(budget)] == expected
