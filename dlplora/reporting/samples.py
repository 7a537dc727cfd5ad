"""Outcomes of single questions, stored next to a record as Parquet, so that methods can be compared in pairs.

One row per question. The question itself is not stored: tasks are versioned and their questions can be generated again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlplora.atomic import replacing
from dlplora.config import short
from dlplora.documents import parse_json
from dlplora.errors import RecordError

METRICS = ("acc", "acc_norm", "exact_match", "rouge1", "rouge2", "rougeL")
"""Metrics with a value per question; a task's value is their mean."""


@dataclass(kw_only=True)
class Outcome:
    """What happened with one question."""

    task: str
    question: int
    """Index of the question in the task's test split."""
    metrics: Mapping[str, float]
    """Those of ``METRICS`` that the task has."""
    choice: int | None = None
    """Option of the largest log-likelihood, for multiple choice."""
    answer: str | None = None
    """Text generated, for generation."""
    bleu: Sequence[int] | None = None
    """``statistics.bleu_statistics`` of the answer."""
    routing: Sequence[tuple[int, Mapping[str, float]]] | None = None
    """(characters generated so far, kept experts and their weights) for the prompt and every re-route; None where gates decide."""


@dataclass(kw_only=True)
class TaskOutcomes:
    """The outcomes of one task in columns, ordered by question."""

    questions: NDArray[np.int64]
    metrics: dict[str, NDArray[np.float64]]
    bleu: NDArray[np.int64] | None = None
    choice: list[int | None] = field(default_factory=list)
    answer: list[str | None] = field(default_factory=list)
    routing: list[str | None] = field(default_factory=list)
    source: str = "outcomes"
    """File they were read from, for errors."""

    def parsed_routing(self, text: str) -> list[tuple[int, dict[str, float]]]:
        """One entry of ``routing``: characters generated so far, and the kept experts with their weights.

        Raises:
            RecordError: If the text is not what ``write_samples`` writes.
        """
        steps = parse_json(text, f"{self.source}: column 'routing'", error=RecordError)
        try:
            found = [(at, weights) for at, weights in steps]
            fits = all(type(at) is int and all(type(one) in (int, float) for one in weights.values()) for at, weights in found)
        except (TypeError, ValueError, AttributeError):
            fits = False
        if not fits:
            raise RecordError(f"{self.source}: column 'routing' must hold [[characters, {{expert: weight}}], ...], got {short(text)}.")
        return found


def write_samples(path: str | Path, outcomes: Sequence[Outcome]) -> None:
    """Write the outcomes of one run, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = sorted(outcomes, key=lambda one: (one.task, one.question))
    columns: dict[str, Any] = {
        "task": pa.array([one.task for one in rows]).dictionary_encode(),
        "question": pa.array([one.question for one in rows], pa.int32()),
        **{name: pa.array([one.metrics.get(name) for one in rows], pa.float32()) for name in METRICS},
        "choice": pa.array([one.choice for one in rows], pa.int16()),
        "answer": pa.array([one.answer for one in rows], pa.string()),
        "bleu": pa.array([None if one.bleu is None else list(one.bleu) for one in rows], pa.list_(pa.int32())),
        "routing": pa.array([_routing_text(one) for one in rows], pa.string()).dictionary_encode(),
    }
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def _routing_text(outcome: Outcome) -> str | None:
    if outcome.routing is None:
        return None
    return json.dumps([[at, dict(weights)] for at, weights in outcome.routing], ensure_ascii=False, separators=(",", ":"))


def read_samples(path: str | Path, *, texts: bool = True) -> dict[str, TaskOutcomes]:
    """The outcomes of one run by task.

    Args:
        path: Parquet file.
        texts: Whether answers and routing are wanted; statistics need neither.

    Raises:
        RecordError: If the file is missing, damaged, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = ["task", "question", *METRICS, "bleu"]
    try:
        # a file is small and there are hundreds: threads cost more than they save
        with pq.ParquetFile(path) as file:
            table = file.read(columns=[*numbers, *(("choice", "answer", "routing") if texts else ())], use_threads=False)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise RecordError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    missing = [name for name in numbers if name not in table.column_names]
    if missing:
        raise RecordError(f"{path}: column '{missing[0]}' is missing.")
    tasks = table["task"].combine_chunks().dictionary_decode() if pa.types.is_dictionary(table["task"].type) else table["task"]
    names = np.asarray(tasks.to_pylist(), dtype=object)
    starts = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist(), len(names)] if len(names) else [0]
    found: dict[str, TaskOutcomes] = {}
    for start, stop in pairwise(starts):
        found[str(names[start])] = _task_outcomes(table.slice(start, stop - start), texts)
        found[str(names[start])].source = str(path)
    return found


def _task_outcomes(table: Any, texts: bool) -> TaskOutcomes:
    metrics = {name: table[name].to_numpy().astype(np.float64) for name in METRICS if table[name].null_count < table.num_rows}
    bleu = None
    if table["bleu"].null_count == 0:
        flat = table["bleu"].combine_chunks().flatten().to_numpy()
        bleu = flat.reshape(table.num_rows, -1).astype(np.int64)
    outcomes = TaskOutcomes(questions=table["question"].to_numpy().astype(np.int64), metrics=metrics, bleu=bleu)
    if texts:
        outcomes.choice, outcomes.answer = table["choice"].to_pylist(), table["answer"].to_pylist()
        outcomes.routing = table["routing"].to_pylist()
    return outcomes
