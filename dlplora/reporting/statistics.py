"""Errors, paired tests and corrections for results tables; needs NumPy, SciPy, statsmodels and sacreBLEU, and no deep-learning package.

The questions of a suite are the sample: the same questions are asked of every method, so methods are compared in pairs. With several
seeds the mean over seeds of a question's score is one observation, since the seeds of one question are not independent questions.
Shapes: n questions, k tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLEU_STATS = 10
"""Numbers kept of one answer: length, reference length, and for n-grams of 1 to 4 the matches and the totals."""
RESAMPLES = 1000
ALPHA = 0.05
POWER = 0.8


def mean_stderr(values: Sequence[float] | Array) -> float | None:
    """Standard error of a mean (sample deviation over root n); None for fewer than two values."""
    array = np.asarray(values, dtype=np.float64)
    return None if len(array) < 2 else float(array.std(ddof=1) / math.sqrt(len(array)))


@lru_cache(maxsize=1)
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


def bleu_statistics(prediction: str, reference: str) -> list[int]:
    """The ``BLEU_STATS`` counts of one answer, whose sums over a corpus give the corpus BLEU."""
    score = _bleu().sentence_score(prediction, [reference])
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def corpus_bleu(sums: Any) -> Array:
    """BLEU, 0 to 100, of summed counts (..., 10), with exponential smoothing.

    Source: sacreBLEU's default ``corpus_bleu``; vectorised, because a bootstrap scores thousands of corpora.
    """
    numbers = np.asarray(sums, dtype=np.float64)
    length, wanted, right, total = numbers[..., 0], numbers[..., 1], numbers[..., 2:6], numbers[..., 6:10]
    halvings = np.cumsum((right == 0) & (total > 0), axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(right > 0, right / total, 0.5**halvings / total)
        logs = np.where(total > 0, np.log(precision), -np.inf).mean(axis=-1)
        brevity = np.where(length < wanted, np.where(length > 0, 1.0 - wanted / length, -np.inf), 0.0)
        score = 100.0 * np.exp(logs + brevity)
    return np.asarray(np.where(right.any(axis=-1), score, 0.0))


@lru_cache(maxsize=64)
def _resampled_counts(num: int, resamples: int, seed: int) -> Array:
    """How often each question is drawn in each bootstrap sample, (resamples, n); remembered, since every metric uses the same draws.

    Whole numbers as float64: products of integer matrices are slow, and sums below 2**53 are exact.
    """
    drawn = np.random.default_rng(seed).multinomial(num, np.full(num, 1.0 / num), size=resamples).astype(np.float64)
    drawn.flags.writeable = False
    return drawn


def bleu_stderr(stats: Sequence[Sequence[int]], resamples: int = RESAMPLES, seed: int = 0) -> float | None:
    """Bootstrap standard error of a corpus BLEU over questions.

    Args:
        stats: ``bleu_statistics`` of every answer, (n, 10).
        resamples: Bootstrap samples.
        seed: Of the resampling.
    """
    counts = np.asarray(stats, dtype=np.int64)
    if len(counts) < 2:
        return None
    sums = _resampled_counts(len(counts), resamples, seed) @ counts
    return float(np.std(corpus_bleu(sums), ddof=1))


def exact_mcnemar(first: Sequence[float] | Array, second: Sequence[float] | Array) -> float:
    """Two-sided p-value that both methods are right equally often on the same questions.

    With one seed the scores are 0 or 1 and this is McNemar's exact test; with means over seeds it is the sign test on which of the
    two is better at a question.

    Args:
        first, second: Scores of the two methods, question by question, (n,).
    """
    from scipy.stats import binomtest

    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return 1.0 if wins + losses == 0 else float(binomtest(wins, wins + losses, 0.5).pvalue)


def bootstrap_means(tasks: Sequence[Array], resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Bootstrap distributions of the mean over questions of every task, for several methods on the same draws.

    Args:
        tasks: For each of k tasks the scores of m methods, (n_k, m); questions are drawn within their task.
        resamples: Bootstrap samples R.
        seed: Of the draws.

    Returns:
        Task by task, (k, R, m); their mean over tasks is the distribution of the aggregate.
    """
    return np.stack([_resampled_counts(len(task), resamples, seed + index) @ task / len(task) for index, task in enumerate(tasks)])


def bootstrap_bleu(tasks: Sequence[NDArray[np.int64]], resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """As ``bootstrap_means`` for corpus BLEU; ``tasks`` hold the counts of m methods, (n_k, m, 10)."""
    scores = []
    for index, task in enumerate(tasks):
        counts = _resampled_counts(len(task), resamples, seed + index)
        sums = (counts @ task.reshape(len(task), -1).astype(np.float64)).reshape(resamples, *task.shape[1:])
        scores.append(corpus_bleu(sums))
    return np.stack(scores)


def paired_difference(observed: float, drawn: Array) -> tuple[float, float, float]:
    """95 % interval and two-sided p-value of a difference from its bootstrap distribution.

    Args:
        observed: The difference on the sample itself.
        drawn: The same on each bootstrap sample, (R,), both sides on the same draws.

    Returns:
        Lower end, upper end, p-value (share of the draws, centred on zero, at least as far out; never below 1 / R).

    Source: Koehn 2004 (W04-3250) for the paired bootstrap; the centred p-value is that of Efron and Tibshirani 1993, section 16.4.
    """
    low, high = np.quantile(drawn, (ALPHA / 2, 1 - ALPHA / 2))
    extreme = int((np.abs(drawn - observed) >= abs(observed) - 1e-12).sum())
    return float(low), float(high), max(extreme, 1) / len(drawn)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number by Holm's step-down method."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return {}
    return dict(zip(p_values, map(float, multipletests(list(p_values.values()), method="holm")[1]), strict=True))


def detectable_difference(num_questions: int, disagreement: float) -> float:
    """The smallest true difference of two proportions that a paired comparison finds with 80 % power at the 5 % level, as a fraction.

    Args:
        num_questions: Questions that both methods answer.
        disagreement: Expected share of questions on which exactly one of them is right.

    Source: normal approximation of McNemar's test (Connor 1987); solved for the difference.
    """
    from scipy.stats import norm

    z_alpha, z_power = norm.ppf(1 - ALPHA / 2), norm.ppf(POWER)
    low, high = 0.0, disagreement
    for _ in range(60):  # the required n falls with the difference
        middle = (low + high) / 2
        needed = (z_alpha * math.sqrt(disagreement) + z_power * math.sqrt(max(disagreement - middle**2, 0.0))) ** 2
        low, high = (low, middle) if middle > 0 and needed / middle**2 <= num_questions else (middle, high)
    return high


def average_ranks(scores: Array) -> Array:
    """Mean rank of every method over tasks, 1 is best, ties share their ranks.

    Args:
        scores: (methods, tasks), larger is better.
    """
    from scipy.stats import rankdata

    return np.asarray(np.mean(rankdata(-scores, axis=0), axis=1), dtype=np.float64)


def critical_difference(num_methods: int, num_tasks: int) -> float:
    """Nemenyi's critical difference of mean ranks at 5 %.

    Source: Demšar 2006, JMLR 7, section 3.2.2.
    """
    from scipy.stats import studentized_range

    quantile = studentized_range.ppf(1 - ALPHA, num_methods, np.inf) / math.sqrt(2)
    return float(quantile * math.sqrt(num_methods * (num_methods + 1) / (6 * num_tasks)))


def friedman_p(scores: Array) -> float | None:
    """p-value that all methods are equal over tasks; None for fewer than three methods or tasks without any difference.

    Args:
        scores: (methods, tasks).
    """
    from scipy.stats import friedmanchisquare

    if len(scores) < 3 or scores.shape[1] < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # no task tells any two methods apart
        value = float(friedmanchisquare(*scores).pvalue)
    return value if math.isfinite(value) else None


def win_tie_loss(first: Sequence[Array], second: Sequence[Array]) -> tuple[int, int, int]:
    """Tasks on which the first method is better, equal and worse by the mean of the questions' scores."""
    differences = [float(np.mean(a) - np.mean(b)) for a, b in zip(first, second, strict=True)]
    wins = sum(value > 1e-12 for value in differences)
    losses = sum(value < -1e-12 for value in differences)
    return wins, len(differences) - wins - losses, losses
