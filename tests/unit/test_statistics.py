"""Statistics of the tables against sacreBLEU, statsmodels, simulation and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sacrebleu

from dlplora.reporting import statistics as st

PAIRS = [
    ("the cat sees the hat .", "the cat sees the hat ."),
    ("a dog ran home", "the dog ran home quickly"),
    ("", "nothing was said"),
    ("we sell red apples and pears", "we sell green apples and red pears today"),
    ("one two three four five six", "one two three five four six"),
]


def test_bleu_of_summed_counts_is_sacrebleus_corpus_bleu() -> None:
    sums = np.sum([st.bleu_statistics(said, wanted) for said, wanted in PAIRS], axis=0)
    theirs = sacrebleu.corpus_bleu([said for said, _ in PAIRS], [[wanted for _, wanted in PAIRS]]).score
    assert float(st.corpus_bleu(sums)) == pytest.approx(theirs, abs=1e-9)


def test_bleu_error_is_that_of_resampled_corpora() -> None:
    rng = np.random.default_rng(7)
    drawn = [rng.integers(0, len(PAIRS), len(PAIRS)) for _ in range(400)]
    scores = [
        sacrebleu.corpus_bleu([PAIRS[i][0] for i in rows], [[PAIRS[i][1] for i in rows]]).score for rows in drawn
    ]  # the definition: score whole corpora of resampled sentences
    ours = st.bleu_stderr([st.bleu_statistics(said, wanted) for said, wanted in PAIRS], resamples=2000)
    assert ours == pytest.approx(float(np.std(scores, ddof=1)), rel=0.15)


def test_standard_error_of_a_mean() -> None:
    assert st.mean_stderr([0.0, 1.0, 1.0, 0.0]) == pytest.approx(math.sqrt(1 / 3) / 2)
    assert st.mean_stderr([1.0]) is None


def test_mcnemar_is_statsmodels_exact_test() -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    rng = np.random.default_rng(0)
    first, second = (rng.random((2, 80)) < [[0.8], [0.6]]).astype(float)
    only_first, only_second = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    both, neither = int((first * second).sum()), int(((1 - first) * (1 - second)).sum())
    wanted = mcnemar([[both, only_first], [only_second, neither]], exact=True).pvalue
    assert st.exact_mcnemar(first, second) == pytest.approx(wanted)
    assert st.exact_mcnemar(first, first) == 1.0


@pytest.mark.parametrize(
    "sums", [[0, 4, 0, 0, 0, 0, 0, 0, 0, 0], [3, 3, 2, 0, 0, 0, 3, 2, 1, 0], [9, 7, 6, 3, 0, 0, 9, 8, 7, 6], [4, 9, 4, 3, 2, 1, 4, 3, 2, 1]]
)
def test_corners_of_bleu_are_sacrebleus(sums: list[int]) -> None:
    from sacrebleu.metrics import BLEU

    theirs = BLEU.compute_bleu(sums[2:6], sums[6:], sums[0], sums[1], smooth_method="exp").score
    assert float(st.corpus_bleu(sums)) == pytest.approx(theirs, abs=1e-9)


def difference(tasks: list[np.ndarray], resamples: int = 4000, seed: int = 0) -> tuple[float, float, float]:
    """Interval and p-value of method 0 minus method 1."""
    drawn = st.bootstrap_means(tasks, resamples, seed).mean(axis=0)
    return st.paired_difference(float(np.mean([task[:, 0].mean() - task[:, 1].mean() for task in tasks])), drawn[:, 0] - drawn[:, 1])


def beside_nothing(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.zeros_like(values)], axis=1)


def test_paired_bootstrap_finds_what_is_there_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    clear = [rng.normal(0.5, 1.0, 200) for _ in range(3)]
    low, high, p = difference([beside_nothing(task) for task in clear])
    assert low < np.mean([task.mean() for task in clear]) < high
    assert p < 0.001
    misses = [difference([beside_nothing(rng.normal(0.0, 1.0, 50)) for _ in range(2)], 500, seed)[2] < 0.05 for seed in range(200)]
    assert 0.01 <= np.mean(misses) <= 0.12  # 5 % by construction, over 200 draws
    assert difference([np.zeros((10, 2))]) == (0.0, 0.0, 1.0)


def test_paired_bootstrap_interval_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(2).normal(0.2, 1.0, 400)
    low, high, _ = difference([beside_nothing(values)])
    error = values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_bleu_bootstrap() -> None:
    good = np.array([st.bleu_statistics(wanted, wanted) for _, wanted in PAIRS] * 6)
    poor = np.array([st.bleu_statistics(said, wanted) for said, wanted in PAIRS] * 6)
    (drawn,) = st.bootstrap_bleu([np.stack([good, poor], axis=1)], 400)
    assert drawn[:, 0] == pytest.approx(np.full(400, 100.0))
    observed = 100 - float(st.corpus_bleu(poor.sum(axis=0)))
    low, high, p = st.paired_difference(observed, drawn[:, 0] - drawn[:, 1])
    assert 0 < low < observed < high
    assert p == 1 / 400


def test_holm_by_hand() -> None:
    assert st.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert st.holm({}) == {}


def test_detectable_difference_is_found_four_times_in_five() -> None:
    disagreement, num = 0.2, 600
    difference = st.detectable_difference(num, disagreement)
    rng = np.random.default_rng(3)
    wins = (disagreement + difference) / 2
    found = 0
    for _ in range(400):
        draw = rng.choice(3, size=num, p=[wins, disagreement - wins, 1 - disagreement])
        first, second = (draw == 0).astype(float), (draw == 1).astype(float)
        found += st.exact_mcnemar(first, second) < 0.05
    assert 0.72 <= found / 400 <= 0.86  # the exact test is a little conservative


def test_ranks_and_critical_difference_are_demsars() -> None:
    scores = np.array([[0.9, 0.8, 0.7], [0.9, 0.6, 0.5], [0.1, 0.2, 0.3]])
    assert st.average_ranks(scores) == pytest.approx([3.5 / 3, 5.5 / 3, 3.0])
    # Demšar 2006, section 3.2.2: four classifiers, fourteen data sets: q = 2.569, CD = 1.25.
    assert st.critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)
    assert st.friedman_p(scores[:2]) is None


def test_win_tie_loss() -> None:
    first, second = [np.array([1.0, 1.0]), np.array([0.0]), np.array([0.5])], [np.array([1.0, 0.0]), np.array([1.0]), np.array([0.5])]
    assert st.win_tie_loss(first, second) == (1, 1, 1)
