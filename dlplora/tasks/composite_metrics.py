"""Scores of composites, for the lm-eval YAML files of every suite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlplora.tasks.composite import Part, parse_answers
from dlplora.tasks.text_metrics import text_metrics

TOTALS = ("exact_match", "mcq_exact_match", "gen_exact_match", "rougeL", "answered", "all_correct")
"""Metrics of every composite task; besides, ``exact_match_<task>`` for every task of the suite."""


def composite_metrics(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """Fractions 0 to 1 over the questions of one composite; a question not answered is wrong.

    ``exact_match`` over all of them, ``mcq_`` and ``gen_`` over those of a kind, ``exact_match_<task>`` over those of a task (keys of kinds
    and tasks that a composite lacks are absent), ``rougeL`` the mean F-measure, ``answered`` the share with any answer, ``all_correct``
    whether every answer is right.
    """
    parts = [Part(**part) for part in doc["parts"]]
    answers = parse_answers(results[0], doc["reading"], parts, filled=doc["answer_form"] is not None)
    scores: dict[str, list[float]] = {name: [] for name in ("exact_match", "rougeL", "answered")}
    for part, given in zip(parts, answers, strict=True):
        metrics = text_metrics({"answer": part.answer}, [given or ""])
        right = metrics["exact_match"]
        for key in ("exact_match", f"{part.kind}_exact_match", f"exact_match_{part.task}"):
            scores.setdefault(key, []).append(right)
        scores["rougeL"].append(metrics["rougeL"])
        scores["answered"].append(float(given is not None))
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    return means | {"all_correct": float(means["exact_match"] == 1.0)}
