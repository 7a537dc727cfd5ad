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


def crossed(scores: np.ndarray) -> st.Differences:
    """One method to another on one task, from differences (n, S)."""
    return st.crossed_difference(scores.mean(axis=0)[None], np.array([[scores.mean(axis=1).var(ddof=1) / len(scores)]]), [len(scores) - 1])


def test_with_one_seed_a_difference_is_tested_as_by_the_paired_t_test() -> None:
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(2).normal(0.2, 1.0, (400, 1))
    theirs = ttest_1samp(values[:, 0], 0.0)
    ours = crossed(values)
    assert ours.p_values()[0] == pytest.approx(theirs.pvalue)
    low, high = theirs.confidence_interval(0.95)
    assert [float(end[0]) for end in ours.interval()] == pytest.approx([low, high])
    assert [float(end[0]) for end in ours.interval(0.1)] == [pytest.approx(max(low, -0.1)), 0.1]


def test_seeds_that_answer_alike_everywhere_are_tested_as_by_the_t_test_over_seeds() -> None:
    from scipy.stats import ttest_1samp

    seeds = np.array([-20.25, -44.0, -15.375])  # exact match of a multi-task adapter against dlp: one bad seed
    ours = crossed(np.tile(seeds, (50, 1)))
    assert ours.p_values()[0] == pytest.approx(ttest_1samp(seeds, 0.0).pvalue)
    assert ours.p_values()[0] == pytest.approx(0.095, abs=0.002)
    assert float(ours.interval()[1][0]) > 0


def test_the_variance_of_a_difference_is_that_of_drawing_questions_and_seeds() -> None:
    """Simulation: effects of 40 questions and 3 seeds, both drawn again; the mean estimated variance is the variance of the mean."""
    rng = np.random.default_rng(5)
    means, variances, wrong = [], [], 0
    for _ in range(2000):
        scores = rng.normal(0, 0.5, (40, 1)) + rng.normal(0, 0.1, (1, 3)) + rng.normal(0, 0.05, (40, 3))
        found = crossed(scores)
        means.append(found.mean[0])
        variances.append(found.question_variance[0] + found.seed_variance[0])
        wrong += found.p_values()[0] < 0.05
    assert np.mean(variances) == pytest.approx(np.var(means), rel=0.08)
    assert 0.02 <= wrong / 2000 <= 0.07  # 5 % by construction


def test_missing_seeds_and_equal_methods() -> None:
    by_seed = np.array([[0.5, np.nan, 0.5], [np.nan, np.nan, np.nan], [0.0, 0.0, 0.0]])
    found = st.crossed_difference(by_seed, np.zeros((1, 3)), [9])
    assert found.mean[[0, 2]].tolist() == [0.5, 0.0]
    assert np.isnan(found.mean[1])
    assert np.isnan(found.p_values()).all()  # nothing varies


def test_standard_errors_of_questions_and_seeds_add_up() -> None:
    assert st.combined_stderr([0.03, 0.04], [0.2, 0.6]) == pytest.approx(math.sqrt((0.03**2 + 0.04**2) / 2 + 0.2**2))
    assert st.combined_stderr([0.03], [0.2]) == pytest.approx(0.03)
    assert st.combined_stderr([], [0.2, 0.6]) == pytest.approx(0.2)
    assert st.combined_stderr([], [0.2]) is None


def test_bleu_bootstrap() -> None:
    good = np.array([st.bleu_statistics(wanted, wanted) for _, wanted in PAIRS] * 6)
    poor = np.array([st.bleu_statistics(said, wanted) for said, wanted in PAIRS] * 6)
    (drawn,) = st.bootstrap_bleu([np.stack([good, poor], axis=1)], 400)
    assert drawn[:, 0] == pytest.approx(np.full(400, 100.0))
    rng = np.random.default_rng(3)
    theirs = []
    for _ in range(400):
        rows = rng.integers(0, len(poor), len(poor))
        said, wanted = zip(*[PAIRS[i % len(PAIRS)] for i in rows], strict=True)
        theirs.append(sacrebleu.corpus_bleu(list(said), [list(wanted)]).score)
    assert drawn[:, 1].std() == pytest.approx(np.std(theirs), rel=0.15)


def test_holm_by_hand() -> None:
    assert st.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert st.holm({}) == {}
    from statsmodels.stats.multitest import multipletests

    drawn = np.random.default_rng(0).random(30) ** 3
    assert list(st.holm({str(i): p for i, p in enumerate(drawn)}).values()) == pytest.approx(list(multipletests(drawn, method="holm")[1]))


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
