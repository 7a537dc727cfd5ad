"""Pairwise comparison of methods on the questions that all of them answered, over the seeds that they share.

A difference has two sources of error: the sample of questions and the seeds (``statistics.crossed_difference``).
Shapes: n questions of a task, m methods, S seeds, k tasks, R bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlplora.reporting import statistics
from dlplora.reporting.methods import without_clones
from dlplora.reporting.samples import TaskOutcomes
from dlplora.reporting.schema import AGGREGATES, Record
from dlplora.reporting.statistics import Array, Differences

Loader = Callable[[Record], Mapping[str, TaskOutcomes] | None]
MAIN_METRIC = {"mcq": "acc", "gen": "exact_match"}
"""The metric that decides right or wrong, by kind of task."""
PRIMARY = "mean_score"
"""The primary metric: mean over all tasks of a task's main metric. Every other aggregate is descriptive."""
COMPARED = (PRIMARY, *AGGREGATES)
"""Aggregates that methods are compared on."""

REFERENCE_METHOD = "dlp"
"""What other methods are compared with."""
BOUND = {"bleu": 100.0}
"""Largest possible difference of a metric; of all others 1."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One method against the reference, on one aggregate or one task's metric."""

    difference: float
    """Method minus reference on the seeds that both have, in the units of the aggregate."""
    low: float
    high: float
    """95 % interval."""
    p: float
    p_holm: float
    """Corrected for the number of methods compared."""

    @property
    def significant(self) -> bool:
        """Whether the difference is one, at 5 % over all methods of the table."""
        return self.p_holm < statistics.ALPHA


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of several methods, seed by seed and question by question."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    ran: NDArray[np.bool_]
    """Which method has which seed, (m, S)."""
    kinds: Mapping[str, str]
    """Task -> kind, in the suite's order."""
    values: Mapping[str, Mapping[str, Array]]
    """Task -> metric -> (n, m, S), 0 where a method lacks the seed."""
    bleu: Mapping[str, NDArray[np.int64]]
    """Task -> n-gram counts (n, m, S, 10), 0 likewise."""
    known: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False, compare=False)
    """Bootstrap distributions and verdicts already computed; every table and the page ask for the same ones."""

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
    """Join the outcomes of complete runs; a method is included if all its runs kept outcomes of the same questions.

    Args:
        records: Of one suite and protocol.
        load: Gives the outcomes of a record, or None.
    """
    groups: dict[str, dict[int, Mapping[str, TaskOutcomes]]] = {}
    without: set[str] = set()
    for record in records:
        outcomes = load(record)
        if outcomes is None or set(outcomes) != set(record.suite_tasks):
            without.add(record.method_name)
        else:
            groups.setdefault(record.method_name, {})[record.seed] = outcomes
    complete = {name: runs for name, runs in groups.items() if name not in without}
    if not complete:
        return Scores(methods=(), seeds=(), ran=np.zeros((0, 0), dtype=bool), kinds={}, values={}, bleu={})
    template = next(iter(next(iter(complete.values())).values()))
    complete = {name: runs for name, runs in complete.items() if all(_same_questions(run, template) for run in runs.values())}
    seeds = tuple(sorted({seed for runs in complete.values() for seed in runs}))
    cells = {(m, s): runs[seed] for m, runs in enumerate(complete.values()) for s, seed in enumerate(seeds) if seed in runs}
    ran = np.zeros((len(complete), len(seeds)), dtype=bool)
    for cell in cells:
        ran[cell] = True
    kinds = {task: row.kind for record in records for task, row in record.tasks.items()}

    def stacked(parts: Mapping[tuple[int, int], Any]) -> Any:
        first = next(iter(parts.values()))
        out = np.zeros((len(first), *ran.shape, *first.shape[1:]), dtype=first.dtype)
        for (method, seed), part in parts.items():
            out[:, method, seed] = part
        return out

    tasks = [task for task in records[0].suite_tasks if task in template]
    values = {
        task: {metric: stacked({cell: run[task].metrics[metric] for cell, run in cells.items()}) for metric in template[task].metrics}
        for task in tasks
    }
    counts = {task: {cell: run[task].bleu for cell, run in cells.items()} for task in tasks}
    bleu = {task: stacked(parts) for task, parts in counts.items() if all(part is not None for part in parts.values())}
    return Scores(methods=tuple(complete), seeds=seeds, ran=ran, kinds={task: kinds[task] for task in tasks}, values=values, bleu=bleu)


def _same_questions(run: Mapping[str, TaskOutcomes], template: Mapping[str, TaskOutcomes]) -> bool:
    return set(run) == set(template) and all(
        np.array_equal(run[task].questions, theirs.questions) and set(run[task].metrics) == set(theirs.metrics)
        for task, theirs in template.items()
    )


def _parts_of(scores: Scores, key: str) -> list[tuple[str, str]] | None:
    """The (task, metric) pairs that an aggregate is the mean of; None if a task lacks its metric, or there is no task."""
    pairs = [(task, MAIN_METRIC[kind]) for task, kind in scores.kinds.items()]
    if key != PRIMARY:
        kind, metric = AGGREGATES[key]
        pairs = [(task, metric) for task in scores.tasks(kind)]
    there = all(metric in scores.values[task] or (metric == "bleu" and task in scores.bleu) for task, metric in pairs)
    return pairs if pairs and there else None


def _bleu(scores: Scores, task: str) -> tuple[Array, Array]:
    """Corpus BLEU of a task (m, S) and its bootstrap distribution over questions (R, m, S)."""
    if ("bleu", task) not in scores.known:
        counts, index = scores.bleu[task], list(scores.kinds).index(task)
        scores.known["bleu", task] = statistics.corpus_bleu(counts.sum(axis=0)), statistics.bootstrap_bleu([counts], seed=index)[0]
    return scores.known["bleu", task]  # type: ignore[no-any-return]


def _differences(scores: Scores, task: str, metric: str, base: int) -> tuple[Array, Array, int]:
    """Differences to one method on one task: by seed (m, S) with NaN for seeds not shared, variance from questions (m,), and n."""
    asked = ("differences", task, metric, base)
    if asked in scores.known:
        return scores.known[asked]  # type: ignore[no-any-return]
    shared = scores.ran & scores.ran[base]
    num = np.maximum(shared.sum(axis=1), 1)
    if metric == "bleu":
        observed, drawn = _bleu(scores, task)
        by_seed, questions = observed - observed[base], len(scores.bleu[task])
        variance = (((drawn - drawn[:, [base]]) * shared).sum(axis=2) / num).var(axis=0, ddof=1)
    else:
        values = scores.values[task][metric]
        difference, questions = values - values[:, [base]], len(values)
        by_seed = difference.mean(axis=0)
        by_question = (difference * shared).sum(axis=2) / num
        variance = by_question.var(axis=0, ddof=1) / questions if questions > 1 else np.zeros(len(num))
    scores.known[asked] = np.where(shared, by_seed, np.nan), variance, questions
    return scores.known[asked]  # type: ignore[no-any-return]


def _combined(scores: Scores, pairs: Sequence[tuple[str, str]], base: int) -> tuple[Differences, int]:
    """The difference of a mean over tasks, and the number of questions it is computed from."""
    found = [_differences(scores, task, metric, base) for task, metric in pairs]
    by_seed = np.mean([part[0] for part in found], axis=0)
    variances = np.stack([part[1] for part in found]) / len(found) ** 2
    return statistics.crossed_difference(by_seed, variances, [part[2] - 1 for part in found]), sum(part[2] for part in found)


def _verdicts(
    methods: Sequence[str],
    base: int,
    differences: Differences,
    questions: int,
    *,
    bound: float,
    exact: Mapping[str, float] | None = None,
) -> dict[str, Verdict]:
    """Every other method that shares a seed with the reference; p-values are corrected by Holm over them.

    Args:
        methods: Names.
        base: Index of the reference.
        differences: To the reference.
        questions: Behind each difference.
        bound: Largest possible difference.
        exact: p-values of an exact test, by method, that replace those of Student's t.
    """
    low, high = differences.interval(bound)
    rows = {}
    for index, (name, p) in enumerate(zip(methods, differences.p_values(), strict=True)):
        mean = float(differences.mean[index])
        if index == base or np.isnan(mean):
            continue
        if np.isnan(p):  # the same difference at every question and seed: the sign test
            p = 1.0 if mean == 0 else min(1.0, 2 * 0.5**questions)
        rows[name] = (mean, float(low[index]), float(high[index]), float((exact or {}).get(name, p)))
    corrected = statistics.holm({name: row[3] for name, row in rows.items()})
    return {name: Verdict(difference=row[0], low=row[1], high=row[2], p=row[3], p_holm=corrected[name]) for name, row in rows.items()}


def against(scores: Scores, key: str, reference: str) -> dict[str, Verdict]:
    """Every other method against one of them on an aggregate; empty if it cannot be compared.

    Args:
        scores: Of all methods of a table: they are the family of Holm's correction.
        key: One of ``COMPARED``.
        reference: Method to compare with.
    """
    pairs = _parts_of(scores, key) if reference in scores.methods else None
    if pairs is None:
        return {}
    if ("against", key, reference) not in scores.known:
        base = scores.methods.index(reference)
        differences, questions = _combined(scores, pairs, base)
        bound = BOUND.get(pairs[0][1], 1.0)
        scores.known["against", key, reference] = _verdicts(scores.methods, base, differences, questions, bound=bound)
    return scores.known["against", key, reference]  # type: ignore[no-any-return]


def _task_verdicts(scores: Scores, task: str, metric: str, base: int) -> dict[str, Verdict]:
    """Every other method against one on a single task. Right or wrong with one shared seed: McNemar's exact test; otherwise Student's t."""
    exact = {}
    if metric == MAIN_METRIC[scores.kinds[task]]:
        values, shared = scores.values[task][metric], scores.ran & scores.ran[base]
        for index, name in enumerate(scores.methods):
            if shared[index].sum() == 1:
                seed = int(np.argmax(shared[index]))
                exact[name] = statistics.exact_mcnemar(values[:, index, seed], values[:, base, seed])
    differences, questions = _combined(scores, [(task, metric)], base)
    return _verdicts(scores.methods, base, differences, questions, bound=BOUND.get(metric, 1.0), exact=exact)


def by_task(scores: Scores, reference: str) -> dict[tuple[str, str], dict[str, Verdict]]:
    """(Task, metric) -> every other method against one, corrected by Holm over the methods."""
    if reference not in scores.methods:
        return {}
    base = scores.methods.index(reference)
    pairs = [pair for key in AGGREGATES for pair in _parts_of(scores, key) or ()]
    return {(task, metric): _task_verdicts(scores, task, metric, base) for task, metric in pairs}


def ties_with(scores: Scores, key: str, best: str) -> set[str]:
    """Methods that are not significantly worse than the best one of a column."""
    return {name for name, verdict in against(scores, key, best).items() if not verdict.significant}


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Mean ranks over the tasks, on seeds that every ranked method has."""

    ranks: Mapping[str, float]
    """Method -> mean rank, the best first."""
    seeds: tuple[int, ...]
    critical: float | None
    """Nemenyi's critical difference at 5 %; None if there is nothing to rank."""
    friedman: float | None
    """Friedman's p-value."""


def ranking(scores: Scores) -> Ranking:
    """Rank the methods that are no clone of another, on the seed that most of them have and every further one that these share.

    Means over different seeds are means over different experts, so a method that lacks the seed has no rank.
    """
    ranked = without_clones(scores.methods)
    if len(ranked) < 2:
        return Ranking(ranks={}, seeds=(), critical=None, friedman=None)
    rows = [scores.methods.index(name) for name in ranked]
    commonest = int(np.argmax(scores.ran[rows].sum(axis=0)))
    columns = [row for row in rows if scores.ran[row, commonest]]
    shared = np.flatnonzero(scores.ran[columns].all(axis=0))
    values = [scores.values[task][MAIN_METRIC[kind]][:, columns][:, :, shared] for task, kind in scores.kinds.items()]
    means = np.array([task.mean(axis=(0, 2)) for task in values]).T  # (m, tasks)
    ranks = zip((scores.methods[column] for column in columns), map(float, statistics.average_ranks(means)), strict=True)
    return Ranking(
        ranks=dict(sorted(ranks, key=lambda pair: pair[1])),
        seeds=tuple(scores.seeds[index] for index in shared),
        critical=statistics.critical_difference(len(columns), means.shape[1]),
        friedman=statistics.friedman_p(means),
    )


def shared_seeds(scores: Scores, reference: str) -> dict[str, int]:
    """Method -> number of seeds that it shares with the reference."""
    base = scores.methods.index(reference)
    return dict(zip(scores.methods, map(int, (scores.ran & scores.ran[base]).sum(axis=1)), strict=True))


def task_wins(scores: Scores, reference: str) -> dict[str, tuple[int, int, int, int, int]]:
    """For every other method: tasks won, tied and lost against the reference, and how many of the wins and losses are significant after
    Holm's correction over the tasks."""
    base = scores.methods.index(reference)
    verdicts = {task: _task_verdicts(scores, task, MAIN_METRIC[kind], base) for task, kind in scores.kinds.items()}
    found = {}
    for name in scores.methods:
        own = {task: rows[name] for task, rows in verdicts.items() if name in rows}
        if not own:
            continue
        corrected = statistics.holm({task: verdict.p for task, verdict in own.items()})
        sure = [np.sign(own[task].difference) for task, p in corrected.items() if p < statistics.ALPHA]
        wins, losses = (sum(sign * verdict.difference > 1e-12 for verdict in own.values()) for sign in (1, -1))
        found[name] = (wins, len(own) - wins - losses, losses, sum(sign > 0 for sign in sure), sum(sign < 0 for sign in sure))
    return found
