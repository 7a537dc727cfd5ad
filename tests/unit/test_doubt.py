"""Prompts for which several adapters are kept, counted by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from dlplora.errors import RecordError
from dlplora.reporting import doubt
from dlplora.reporting.comparison import Scores
from dlplora.reporting.doubt import doubt_table, find_doubt
from dlplora.reporting.samples import TaskOutcomes
from tests.unit.test_records import make_record

ONE, TWO, AT_FIRST = [[0, {"x": 1.0}]], [[0, {"x": 0.6, "y": 0.4}]], [[0, {"x": 0.6, "y": 0.4}], [9, {"y": 1.0}]]
LATER = [[0, {"x": 1.0}], [9, {"x": 0.5, "y": 0.5}]]
"""A second adapter after a sentence end does not count: it had no say in the whole answer."""


def outcomes(routing: dict[str, list[Any]]) -> dict[str, TaskOutcomes]:
    return {
        task: TaskOutcomes(questions=np.arange(len(rows)), metrics={}, routing=[json.dumps(row) if row else None for row in rows])
        for task, rows in routing.items()
    }


def right(*methods: list[float]) -> Any:
    return np.array(methods, dtype=float).T[..., None]


def test_what_is_right_where_several_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubt, "FEWEST", 3)
    scores = Scores(
        methods=("dlp", "top1"),
        seeds=(0,),
        ran=np.ones((2, 1), dtype=bool),
        kinds={"a": "mcq", "g": "gen"},
        values={"a": {"acc": right([0, 1, 0, 1], [1, 1, 1, 1])}, "g": {"exact_match": right([1, 1], [0, 1])}},
        bleu={},
    )
    records = [make_record(routing={"fraction_multi": 0.5}), make_record(method_name="top1", routing={"fraction_multi": 0.0})]
    routing = outcomes({"a": [TWO, ONE, AT_FIRST, LATER], "g": [TWO, None]})
    found = find_doubt(records, scores, lambda record: routing, "dlp")
    assert found is not None
    assert (found.num_prompts, found.num_several, found.tasks) == (6, 3, ("a", "g"))
    assert found.right["dlp"] == pytest.approx((1 / 3, 1.0))
    assert found.right["top1"] == pytest.approx((2 / 3, 1.0))
    assert found.changed == {"dlp": (0, 0), "top1": (2, 1)}
    lines = doubt_table(found).splitlines()
    assert lines[0].startswith("`dlp` keeps several adapters for 3 of 6 prompts (50.0 %), in `a`, `g`.")
    assert lines[-2:] == ["| `top1` | 66.7 | 100.0 | 2 | 1 |", "| `dlp` | 33.3 | 100.0 |  |  |"]
    monkeypatch.setattr(doubt, "FEWEST", 4)
    assert find_doubt(records, scores, lambda record: routing, "dlp") is None
    assert find_doubt(records, scores, lambda record: routing, "other") is None
    broken = outcomes({"a": [TWO, ONE, TWO, TWO], "g": [TWO, "x"]})
    with pytest.raises(RecordError, match="column 'routing'"):
        find_doubt(records, scores, lambda record: broken, "dlp")
