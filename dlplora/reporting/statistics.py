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


def corpus_bleu(sums: Sequence[float] | NDArray[Any]) -> float:
    """BLEU, 0 to 100, of summed counts; exponential smoothing as sacreBLEU's default.

    Source: sacreBLEU's ``compute_bleu``, which is what ``corpus_bleu`` ends in.
    """
    from sacrebleu.metrics import BLEU

    numbers = [int(value) for value in sums]
    return float(BLEU.compute_bleu(numbers[2:6], numbers[6:10], numbers[0], numbers[1], smooth_method="exp").score)


def _resampled_counts(num: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """How often each question is drawn in each bootstrap sample, (resamples, n)."""
    return np.random.default_rng(seed).multinomial(num, np.full(num, 1.0 / num), size=resamples)


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
    return float(np.std([corpus_bleu(row) for row in sums], ddof=1))


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


def paired_bootstrap(differences: Sequence[Array], resamples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Mean over tasks of the mean paired difference, with a 95 % interval, and a two-sided p-value; questions are resampled within
    their tasks.

    Args:
        differences: For each of k tasks, first minus second, question by question, (n_k,).

    Returns:
        Lower end, upper end, p-value (share of resamples, centred on zero, at least as far out; never below 1 / resamples).

    Source: Koehn 2004 (W04-3250) for the paired bootstrap; the centred p-value is that of Efron and Tibshirani 1993, section 16.4.
    """
    observed = float(np.mean([np.mean(values) for values in differences]))
    means = np.zeros(resamples)
    for index, values in enumerate(differences):
        array = np.asarray(values, dtype=np.float64)
        means += _resampled_counts(len(array), resamples, seed + index) @ array / len(array)
    means /= len(differences)
    low, high = np.quantile(means, (ALPHA / 2, 1 - ALPHA / 2))
    extreme = int((np.abs(means - observed) >= abs(observed) - 1e-12).sum())
    return float(low), float(high), max(extreme, 1) / resamples


def paired_bleu_bootstrap(
    first: Sequence[NDArray[np.int64]], second: Sequence[NDArray[np.int64]], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """As ``paired_bootstrap`` for the mean over tasks of corpus BLEU.

    Args:
        first, second: For each of k tasks the counts of every answer, (n_k, 10).
    """

    def mean_bleu(draws: Sequence[NDArray[np.int64]]) -> float:
        sides = [(corpus_bleu(draw @ a), corpus_bleu(draw @ b)) for draw, a, b in zip(draws, first, second, strict=True)]
        return float(np.mean([ours - theirs for ours, theirs in sides]))

    observed = mean_bleu([np.ones(len(a), dtype=np.int64) for a in first])
    drawn = [_resampled_counts(len(a), resamples, seed + index) for index, a in enumerate(first)]
    means = np.array([mean_bleu([task[row] for task in drawn]) for row in range(resamples)])
    low, high = np.quantile(means, (ALPHA / 2, 1 - ALPHA / 2))
    extreme = int((np.abs(means - observed) >= abs(observed) - 1e-12).sum())
    return float(low), float(high), max(extreme, 1) / resamples


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
    value = float(friedmanchisquare(*scores).pvalue)
    return value if math.isfinite(value) else None


def win_tie_loss(first: Sequence[Array], second: Sequence[Array]) -> tuple[int, int, int]:
    """Tasks on which the first method is better, equal and worse by the mean of the questions' scores."""
    differences = [float(np.mean(a) - np.mean(b)) for a, b in zip(first, second, strict=True)]
    wins = sum(value > 1e-12 for value in differences)
    losses = sum(value < -1e-12 for value in differences)
    return wins, len(differences) - wins - losses, losses
