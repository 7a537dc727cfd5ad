"""Compare records of this machine with the committed records of the same cells: suite, protocol, method, parameters and seed.

Package version, pool and artifacts may differ. A router trained on another kind of CPU differs in the last bits; the comparison shows
whether the published figures still hold. Records are compared question by question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dlplora.config import PACKAGE_ROOT
from dlplora.reporting import tables
from dlplora.reporting.comparison import MAIN_METRIC
from dlplora.reporting.samples import TaskOutcomes
from dlplora.reporting.schema import AGGREGATES, Record
from dlplora.reporting.store import OutcomeReader, load_all

Verdict = Literal["equal", "within", "differs", "new"]
TOLERATED_SHARE = 0.01
"""Share of the questions that may change between right and wrong."""
TOLERATED_POINTS = 1.0
"""How far each of the table's scores (accuracy, exact match, BLEU, ROUGE; 0 to 100) may move."""
SCORE_EPSILON = 1e-6
"""Scores of one question that differ by less are equal; they are stored in float32."""
SHOWN = (("MCQ %", "mcq_acc", 6), ("exact %", "gen_exact_match", 8), ("BLEU", "gen_bleu", 6), ("ROUGE-L", "gen_rougeL", 8))
"""Columns of the printed table and their widths; the last gives way to a column for the seed."""
MEANS = (("MCQ %", "mcq_acc", 12), ("exact %", "gen_exact_match", 12))
"""Those that are shown as means over all seeds as well."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One record and the committed one of its cell."""

    record: Record
    verdict: Verdict
    """``new``: there is no committed record to compare with."""
    num_questions: int = 0
    num_changed: int = 0
    """Questions with another answer or another score."""


def committed_results() -> Path | None:
    """The results folder of the clone that this package runs from; None for an installation without one."""
    folder = PACKAGE_ROOT.parent / "results"
    return folder if (folder / "runs").is_dir() else None


def committed_records(root: Path, records: Sequence[Record]) -> list[Record]:
    """The committed records of the protocols of some records, by name and content."""
    protocols = {(record.protocol_name, record.protocol_hash) for record in records}  # nano_linear differs in its adapters alone
    suites = dict.fromkeys(record.suite for record in records)
    return [one for suite in suites for one in load_all(root, suite)[0] if (one.protocol_name, one.protocol_hash) in protocols]


def compare(records: Sequence[Record], results: Path, committed: Sequence[Record], root: Path) -> list[Comparison]:
    """Compare every record with the committed one of its cell.

    Args:
        records: Of this machine; limited ones are compared on the questions they have.
        results: Results folder of ``records``.
        committed: The committed records.
        root: Results folder of ``committed``.

    Raises:
        RecordError: If outcomes of single questions are missing or damaged.
    """
    ours, theirs = OutcomeReader(results), OutcomeReader(root)
    known: dict[tuple[str, str, str, int], Record] = {}
    for one in sorted(committed, key=lambda one: one.created):
        known[_experiment(one)] = one
    found = []
    for record in records:
        reference = known.get(_experiment(record))
        here, there = ours(record), None if reference is None else theirs(reference)
        if reference is None or here is None or there is None:
            found.append(Comparison(record=record, verdict="new"))
        else:
            found.append(_compared(record, reference, here, there))
    return found


def _experiment(record: Record) -> tuple[str, str, str, int]:
    return record.protocol_hash, record.method_name, record.method_hash, record.seed


def _compared(record: Record, reference: Record, here: dict[str, TaskOutcomes], there: dict[str, TaskOutcomes]) -> Comparison:
    num, changed, flipped = 0, 0, 0
    for task, outcomes in here.items():
        counts = _changes(outcomes, there.get(task), MAIN_METRIC[record.tasks[task].kind])
        num, changed, flipped = num + len(outcomes.questions), changed + counts[0], flipped + counts[1]
    verdict: Verdict = "differs"
    if changed == 0:
        verdict = "equal"
    elif flipped <= math.ceil(TOLERATED_SHARE * num) and (record.limit is not None or _shift(record, reference) <= TOLERATED_POINTS):
        verdict = "within"
    return Comparison(record=record, verdict=verdict, num_questions=num, num_changed=changed)


def _changes(here: TaskOutcomes, there: TaskOutcomes | None, main_metric: str) -> tuple[int, int]:
    """Questions of one task with another answer or score, and those that changed between right and wrong."""
    num = len(here.questions)
    if there is None or not np.isin(here.questions, there.questions).all():
        return num, num
    rows = np.searchsorted(there.questions, here.questions)  # outcomes are ordered by question
    changed = np.array(
        [(here.choice[i], here.answer[i]) != (there.choice[row], there.answer[row]) for i, row in enumerate(rows.tolist())],
        dtype=bool,
    )
    for name, values in here.metrics.items():
        if name not in there.metrics:
            return num, num
        changed |= np.abs(values - there.metrics[name][rows]) > SCORE_EPSILON
    flipped = np.abs(here.metrics[main_metric] - there.metrics[main_metric][rows]) > SCORE_EPSILON
    return int(changed.sum()), int(flipped.sum())


def _shift(record: Record, reference: Record) -> float:
    """The largest difference of a score, in points; infinite if one of the records lacks a score."""
    shifts = []
    for key in AGGREGATES:
        here, there = record.aggregates.get(key), reference.aggregates.get(key)
        if (here is None) != (there is None):
            return math.inf
        if here is not None and there is not None:
            shifts.append(abs(here - there) * _scale(key))
    return max(shifts, default=0.0)


def _scale(key: str) -> float:
    return next(column.scale for column in tables.COLUMNS if column.key == key)


def with_other_seeds(records: Sequence[Record], committed: Sequence[Record]) -> list[Record]:
    """The records, and for every method the committed records of the seeds that it was not evaluated with here."""
    here = {(record.protocol_hash, record.method_name, record.seed) for record in records}
    # a mean over seeds needs all questions of each of them
    methods = {(record.protocol_hash, record.method_name, record.method_hash) for record in records if record.limit is None}
    others = [
        one
        for one in committed
        if (one.protocol_hash, one.method_name, one.method_hash) in methods and (one.protocol_hash, one.method_name, one.seed) not in here
    ]
    return [*records, *others]


def table(comparisons: Sequence[Comparison], committed: Sequence[Record]) -> str:
    """The outcome as text of at most 100 columns: scores of this machine, means over all seeds as in the tables, and the verdict.

    Args:
        comparisons: One a record.
        committed: The committed records; those of other seeds enter the means.
    """
    records = [one.record for one in comparisons]
    everything = with_other_seeds(records, committed)
    means = tables.rows_of(everything).summaries
    seeds = sorted({record.seed for record in records})
    all_seeds = sorted({record.seed for record in everything})
    several = len(seeds) > 1
    shown = SHOWN[:-1] if several else SHOWN
    width = max(len("method"), *(len(record.method_name) for record in records))
    left = f"{'method':<{width}}" + (" seed" if several else "")
    head = left + "".join(f"{title:>{room}}" for title, _, room in (*shown, *MEANS)) + " changed  verdict"
    here = "this machine" if several else f"seed {seeds[0]}, this machine"
    there = f"mean of seeds {', '.join(map(str, all_seeds))}"
    rooms = [sum(room for _, _, room in columns) for columns in (shown, MEANS)]
    lines = [f"{'':<{len(left)}}{here:>{rooms[0]}}{there:>{rooms[1]}}", head]
    for one in comparisons:
        name = f"{one.record.method_name:<{width}}" + (f"{one.record.seed:>5}" if several else "")
        own = "".join(f"{_number(one.record.aggregates.get(key), key):>{room}}" for _, key, room in shown)
        mean = "".join(f"{_with_error(means[one.record.method_name][key], key):>{room}}" for _, key, room in MEANS)
        changed = "" if one.verdict == "new" else str(one.num_changed)
        lines.append(f"{name}{own}{mean}{changed:>8}  {one.verdict}")
    return "\n".join(lines)


def _number(value: float | None, key: str) -> str:
    return "" if value is None else f"{value * _scale(key):.1f}"


def _with_error(summary: tuple[float | None, float | None], key: str) -> str:
    mean, error = summary
    return _number(mean, key) + ("" if error is None else f" ± {_number(error, key)}")


def legend(comparisons: Sequence[Comparison]) -> str:
    """What the columns of ``table`` mean, in lines of at most 100 columns."""
    num = max((one.num_questions for one in comparisons), default=0)
    return "\n".join(
        (
            f"changed: questions (of {num}) with another answer or score than in the committed record.",
            "mean: this run's records and the committed ones of the other seeds, as in nano.md.",
            f"within the tolerance: at most {TOLERATED_SHARE:.0%} of the questions changed between right and wrong,",
            f"  and no score moved by more than {TOLERATED_POINTS:g} point. new: no committed record of this cell.",
        )
    )
