"""Standard errors, paired tests and corrections for results tables; needs NumPy, SciPy and sacreBLEU, and no deep-learning package.

All methods answer the same questions, so they are compared in pairs. Two factors vary: the sample of questions, and the seed that trained
experts, router and gates. They are crossed (every seed answers every question), so a difference has a variance component for each.
Shapes: n questions, k tasks, m methods, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """The ``BLEU_STATS`` counts of one answer; their sums over a corpus give the corpus BLEU."""
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


def bootstrap_bleu(tasks: Sequence[NDArray[np.int64]], resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Bootstrap distributions of corpus BLEU over questions, on the same draws for everything on the other axes.

    Args:
        tasks: For each of k tasks the counts (n_k, ..., 10); questions are drawn within their task.
        resamples: Bootstrap samples R.
        seed: Of the draws.

    Returns:
        Task by task, (k, R, ...); their mean over tasks is the distribution of the aggregate.
    """
    scores = []
    for index, task in enumerate(tasks):
        counts = _resampled_counts(len(task), resamples, seed + index)
        sums = (counts @ task.reshape(len(task), -1).astype(np.float64)).reshape(resamples, *task.shape[1:])
        scores.append(corpus_bleu(sums))
    return np.stack(scores)


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Mean differences of m methods to a reference, with the two sources of their variance; every array is (m,)."""

    mean: Array
    """Mean over seeds of the mean over tasks; NaN for a method that has no seed of the reference."""
    question_variance: Array
    """Variance of the mean from the draw of questions."""
    seed_variance: Array
    """Variance of the mean from the seeds; 0 for a single one, which says nothing about others."""
    freedom: Array
    """Degrees of freedom of the summed variance (Satterthwaite)."""

    def interval(self, bound: float = math.inf) -> tuple[Array, Array]:
        """95 % interval by Student's t, (m,) and (m,).

        Args:
            bound: Largest possible difference, beyond which no interval reaches: 1 for fractions, 100 for BLEU.
        """
        from scipy.special import stdtrit

        reach = stdtrit(self.freedom, 1 - ALPHA / 2) * np.sqrt(self.question_variance + self.seed_variance)
        return np.maximum(self.mean - reach, -bound), np.minimum(self.mean + reach, bound)

    def p_values(self) -> Array:
        """Two-sided p-values that the difference is zero, (m,); NaN where nothing varies."""
        from scipy.special import stdtr

        error = np.sqrt(self.question_variance + self.seed_variance)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = 2 * stdtr(self.freedom, -np.abs(self.mean) / error)
        return np.asarray(np.where(error > 0, found, np.nan))


def crossed_difference(by_seed: Array, question_parts: Array, question_freedom: Sequence[float]) -> Differences:
    """Differences with variance from questions and from seeds.

    The variance of a mean over both is the sum of a part from either: seeds are few, so a bootstrap over them would never draw a worse seed
    than the worst of three; Student's t with the degrees of freedom of the sum allows for that. The part that both share (seed by question)
    is counted twice, which makes the interval a little too wide.

    Args:
        by_seed: Mean difference of every seed, (m, S), NaN where a method or the reference lacks the seed.
        question_parts: Variance from questions of the mean over seeds, one part per task, (k, m); their sum is the aggregate's variance.
        question_freedom: Degrees of freedom of each part, k numbers.

    Source: Satterthwaite 1946 for the degrees of freedom; crossed random effects by moments, as in a mixed model with a random effect of
    the seed and one of the question.
    """
    shared = np.isfinite(by_seed).sum(axis=1)
    filled = np.where(np.isfinite(by_seed), by_seed, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(shared > 0, filled.sum(axis=1) / shared, np.nan)
        spread = np.where(np.isfinite(by_seed), by_seed - mean[:, None], 0.0)
        seeds = np.where(shared > 1, (spread**2).sum(axis=1) / (shared - 1) / shared, 0.0)
        questions = np.nan_to_num(question_parts).sum(axis=0)
        freedoms = np.maximum(np.asarray(question_freedom, dtype=np.float64), 1.0)[:, None]
        squares = (np.nan_to_num(question_parts) ** 2 / freedoms).sum(axis=0) + seeds**2 / np.maximum(shared - 1, 1)
        # rounding errors are not a variance
        questions, seeds = (np.where(part < 1e-20, 0.0, part) for part in (questions, seeds))
        freedom = np.where(squares > 0, (questions + seeds) ** 2 / squares, 1.0)
    mean = np.where(np.abs(mean) < 1e-12, 0.0, mean)
    return Differences(mean=mean, question_variance=questions, seed_variance=seeds, freedom=np.maximum(freedom, 1.0))


def combined_stderr(errors: Sequence[float], values: Sequence[float]) -> float | None:
    """Standard error of a mean over seeds: root of the variance from questions plus the variance from seeds; None if neither is known.

    Args:
        errors: Standard error over questions of each seed that has one.
        values: The value of each seed.
    """
    questions = sum(error**2 for error in errors) / len(errors) if errors else None
    seeds = float(np.var(values, ddof=1)) / len(values) if len(values) > 1 else None
    parts = [part for part in (questions, seeds) if part is not None]
    return math.sqrt(sum(parts)) if parts else None


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number by Holm's step-down method: the i-th smallest of n times n - i, never below a smaller one's."""
    corrected, largest = {}, 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda pair: pair[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


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
    with np.errstate(divide="ignore", invalid="ignore"):  # no task distinguishes any two methods
        value = float(friedmanchisquare(*scores).pvalue)
    return value if math.isfinite(value) else None
