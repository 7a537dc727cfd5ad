"""Methods compared in pairs on the questions they all answered.

A question's score is its mean over the seeds of a method (for BLEU: n-gram counts summed over seeds), so questions are the sample.
Shapes: n questions of a task, m methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlplora.reporting import statistics
from dlplora.reporting.samples import TaskOutcomes
from dlplora.reporting.schema import AGGREGATES, Record

Loader = Callable[[Record], Mapping[str, TaskOutcomes] | None]
RESAMPLES = 2000
MAIN_METRIC = {"mcq": "acc", "gen": "exact_match"}
"""The metric that decides right or wrong, by kind of task."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One method against the reference, on one aggregate."""

    difference: float
    """Method minus reference, in the units of the aggregate."""
    low: float
    high: float
    """95 % bootstrap interval."""
    p: float
    p_holm: float
    """Corrected for the number of methods compared."""

    @property
    def significant(self) -> bool:
        """Whether the difference is one, at 5 % over all methods of the table."""
        return self.p_holm < statistics.ALPHA


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of several methods, question by question."""

    methods: tuple[str, ...]
    kinds: Mapping[str, str]
    """Task -> kind, in the suite's order."""
    values: Mapping[str, Mapping[str, NDArray[np.float64]]]
    """Task -> metric -> (n, m)."""
    bleu: Mapping[str, NDArray[np.int64]]
    """Task -> n-gram counts (n, m, 10)."""
    drawn: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False, compare=False)
    """Bootstrap distributions and verdicts already computed; every comparison of an aggregate reads the same draws."""

    def of(self, methods: Sequence[str]) -> Scores:
        """The scores of some of the methods; those without outcomes are left out."""
        if set(self.methods) <= set(methods):
            return self
        kept = [name for name in methods if name in self.methods]
        columns = [self.methods.index(name) for name in kept]
        values = {task: {metric: array[:, columns] for metric, array in metrics.items()} for task, metrics in self.values.items()}
        bleu = {task: counts[:, columns] for task, counts in self.bleu.items()}
        return Scores(methods=tuple(kept), kinds=self.kinds, values=values, bleu=bleu)

    def tasks(self, kind: str) -> list[str]:
        """Tasks of one kind."""
        return [task for task, its_kind in self.kinds.items() if its_kind == kind]


def task_means(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Method -> task -> mean over seeds of its main metric, for the tasks that every run of the method has."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.method_name, []).append(record)
    found: dict[str, dict[str, float]] = {}
    for method, runs in groups.items():
        rows = {task: [run.tasks.get(task) for run in runs] for task in runs[0].suite_tasks}
        values = {task: [row.metrics.get(MAIN_METRIC[row.kind]) if row else None for row in several] for task, several in rows.items()}
        found[method] = {}
        for task, scores in values.items():
            known = [score for score in scores if score is not None]
            if len(known) == len(runs):
                found[method][task] = sum(known) / len(known)
    return found


def collect(records: Sequence[Record], load: Loader) -> Scores:
    """Bring the outcomes of complete runs together; a method takes part if every run of it kept outcomes of the same questions.

    Args:
        records: Of one suite and protocol.
        load: Gives the outcomes of a record, or None.
    """
    groups: dict[str, list[Mapping[str, TaskOutcomes]]] = {}
    without: set[str] = set()
    for record in records:
        outcomes = load(record)
        if outcomes is None or set(outcomes) != set(record.suite_tasks):
            without.add(record.method_name)
        else:
            groups.setdefault(record.method_name, []).append(outcomes)
    complete = {name: runs for name, runs in groups.items() if name not in without}
    if not complete:
        return Scores(methods=(), kinds={}, values={}, bleu={})
    template = next(iter(complete.values()))[0]
    complete = {name: runs for name, runs in complete.items() if all(_same_questions(run, template) for run in runs)}
    known = {task: row.kind for record in records for task, row in record.tasks.items()}
    kinds = {task: known[task] for task in records[0].suite_tasks}
    values = {task: _means(list(complete.values()), task, template[task].metrics) for task in kinds}
    bleu = {
        task: np.stack([sum_counts([run[task].bleu for run in runs]) for runs in complete.values()], axis=1)
        for task in kinds
        if all(run[task].bleu is not None for runs in complete.values() for run in runs)
    }
    return Scores(methods=tuple(complete), kinds=kinds, values=values, bleu=bleu)


def _same_questions(run: Mapping[str, TaskOutcomes], template: Mapping[str, TaskOutcomes]) -> bool:
    return all(
        np.array_equal(run[task].questions, theirs.questions) and set(run[task].metrics) == set(theirs.metrics)
        for task, theirs in template.items()
    )


def _means(groups: Sequence[Sequence[Mapping[str, TaskOutcomes]]], task: str, metrics: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    return {
        metric: np.stack([np.mean([run[task].metrics[metric] for run in runs], axis=0) for runs in groups], axis=1) for metric in metrics
    }


def sum_counts(counts: Sequence[NDArray[np.int64] | None]) -> NDArray[np.int64]:
    """Sum of the counts of several seeds, (n, 10)."""
    return np.asarray(np.sum([one for one in counts if one is not None], axis=0), dtype=np.int64)


def distribution(scores: Scores, key: str, resamples: int = RESAMPLES) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Observed metric of every task (k, m) and its bootstrap distribution (k, R, m); None if a task lacks the metric.

    The aggregate is the mean over tasks of either.
    """
    if (key, resamples) not in scores.drawn:
        scores.drawn[key, resamples] = _distribution(scores, key, resamples)
    return scores.drawn[key, resamples]  # type: ignore[no-any-return]


def _distribution(scores: Scores, key: str, resamples: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    kind, metric = AGGREGATES[key]
    tasks = scores.tasks(kind)
    if metric == "bleu":
        if not tasks or any(task not in scores.bleu for task in tasks):
            return None
        counts = [scores.bleu[task] for task in tasks]
        return np.stack([statistics.corpus_bleu(task.sum(axis=0)) for task in counts]), statistics.bootstrap_bleu(counts, resamples)
    if not tasks or any(metric not in scores.values[task] for task in tasks):
        return None
    values = [scores.values[task][metric] for task in tasks]
    return np.stack([task.mean(axis=0) for task in values]), statistics.bootstrap_means(values, resamples)


def against(scores: Scores, key: str, reference: str | None = None, resamples: int = RESAMPLES) -> dict[str, Verdict]:
    """Every other method against one of them on an aggregate; empty if it cannot be compared.

    Args:
        scores: Of all methods.
        key: One of ``AGGREGATES``.
        reference: Method to compare with; None is the best one.
        resamples: Bootstrap samples.
    """
    found = distribution(scores, key, resamples) if scores.methods else None
    if found is None or (reference is not None and reference not in scores.methods):
        return {}
    asked = ("against", key, reference, resamples)
    if asked not in scores.drawn:
        observed, drawn = (part.mean(axis=0) for part in found)
        base = int(np.argmax(observed)) if reference is None else scores.methods.index(reference)
        scores.drawn[asked] = _verdicts(scores.methods, base, observed, drawn)
    return scores.drawn[asked]  # type: ignore[no-any-return]


def _verdicts(
    methods: Sequence[str], base: int, observed: NDArray[np.float64], drawn: NDArray[np.float64], right: NDArray[np.float64] | None = None
) -> dict[str, Verdict]:
    """Every other method against one, from observed values (m,) and draws (R, m); p-values by McNemar's where ``right`` (n, m) is given."""
    rows = {}
    for index, name in enumerate(methods):
        if index != base:
            difference = float(observed[index] - observed[base])
            low, high, p = statistics.paired_difference(difference, drawn[:, index] - drawn[:, base])
            rows[name] = (difference, low, high, p if right is None else statistics.exact_mcnemar(right[:, index], right[:, base]))
    corrected = statistics.holm({name: row[3] for name, row in rows.items()})
    return {name: Verdict(difference=row[0], low=row[1], high=row[2], p=row[3], p_holm=corrected[name]) for name, row in rows.items()}


def by_task(scores: Scores, reference: str, resamples: int = RESAMPLES) -> dict[tuple[str, str], dict[str, Verdict]]:
    """(Task, metric) -> every other method against one, corrected by Holm over the methods.

    Right or wrong (accuracy, exact match) is tested by McNemar's exact test, the sign test where there are several seeds; BLEU and ROUGE by
    the paired bootstrap. Intervals are the bootstrap's.
    """
    found: dict[tuple[str, str], dict[str, Verdict]] = {}
    if reference not in scores.methods:
        return found
    base = scores.methods.index(reference)
    for key, (kind, metric) in AGGREGATES.items():
        both = distribution(scores, key, resamples)
        for number, task in enumerate(scores.tasks(kind)) if both is not None else ():
            right = scores.values[task][metric] if metric == MAIN_METRIC[kind] else None
            found[task, metric] = _verdicts(scores.methods, base, both[0][number], both[1][number], right)  # type: ignore[index]
    return found


def ties_with_best(scores: Scores, key: str) -> set[str]:
    """Methods that are not significantly worse than the best one of an aggregate."""
    return {name for name, verdict in against(scores, key).items() if not verdict.significant}


def main_scores(scores: Scores) -> list[NDArray[np.float64]]:
    """Right-or-wrong scores of every task, (n, m) each, in the suite's order."""
    return [scores.values[task][MAIN_METRIC[kind]] for task, kind in scores.kinds.items()]


def ranking(scores: Scores) -> tuple[dict[str, float], float | None, float | None]:
    """Mean rank of every method over the tasks, Nemenyi's critical difference, and Friedman's p-value."""
    if len(scores.methods) < 2:
        return {}, None, None
    means = np.array([task.mean(axis=0) for task in main_scores(scores)]).T  # (m, tasks)
    ranks = statistics.average_ranks(means)
    ordered = dict(sorted(zip(scores.methods, map(float, ranks), strict=True), key=lambda pair: pair[1]))
    return ordered, statistics.critical_difference(len(scores.methods), means.shape[1]), statistics.friedman_p(means)


def task_wins(scores: Scores, reference: str) -> dict[str, tuple[int, int, int, int, int]]:
    """For every other method: tasks won, tied and lost against the reference, and how many of the wins and losses are significant by
    the exact McNemar test, corrected for the tasks by Holm."""
    base = scores.methods.index(reference)
    found = {}
    for index, name in enumerate(scores.methods):
        if index == base:
            continue
        pairs = {str(number): (task[:, index], task[:, base]) for number, task in enumerate(main_scores(scores))}
        corrected = statistics.holm({number: statistics.exact_mcnemar(*pair) for number, pair in pairs.items()})
        sure = [np.sign(np.mean(pairs[number][0] - pairs[number][1])) for number, p in corrected.items() if p < statistics.ALPHA]
        ours, theirs = [pair[0] for pair in pairs.values()], [pair[1] for pair in pairs.values()]
        found[name] = (*statistics.win_tie_loss(ours, theirs), sum(sign > 0 for sign in sure), sum(sign < 0 for sign in sure))
    return found
