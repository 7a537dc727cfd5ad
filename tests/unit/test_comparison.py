"""Methods in pairs: who takes part, what is significant, and what the table says of it."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from dlplora.reporting import comparison, store, tables
from dlplora.reporting.columns import by_seeds
from dlplora.reporting.groups import group, latest
from dlplora.reporting.pair_tables import pair_table, pairs_csv
from dlplora.reporting.samples import Outcome
from dlplora.reporting.schema import Record, read_record
from dlplora.reporting.statistics import bleu_statistics
from tests.unit.test_records import make_record

NUM = 60


def outcomes(rates: Mapping[str, float], seed: int = 0) -> list[Outcome]:
    """Right with the given rate; the same luck for every method, so that pairs agree where rates do."""
    luck = np.random.default_rng(0).random((3, NUM)) + 1e-9 * seed
    rows = []
    for index, task in enumerate("ab"):
        rows += [Outcome(task=task, question=i, metrics={"acc": float(luck[index, i] < rates[task])}, choice=0) for i in range(NUM)]
    for i in range(NUM):
        right = luck[2, i] < rates["g"]
        said = "one two three four five" if right else "six seven eight nine"
        row = Outcome(task="g", question=i, metrics={name: float(right) for name in ("exact_match", "rouge1", "rougeL")}, answer=said)
        row.bleu = bleu_statistics(said, "one two three four five")
        rows.append(row)
    return rows


def saved(root: Path, name: str, rates: Mapping[str, float] | None, seed: int = 0) -> Record:
    record = make_record(method_name=name, cell=f"{name}{seed}", seed=seed)
    return read_record(store.save(record, root, None if rates is None else outcomes(rates, seed)))


@pytest.fixture
def scores(tmp_path: Path) -> comparison.Scores:
    records = [
        saved(tmp_path, "dlp", {"a": 0.9, "b": 0.9, "g": 0.8}),
        saved(tmp_path, "dlp", {"a": 0.9, "b": 0.9, "g": 0.8}, seed=1),
        saved(tmp_path, "oracle", {"a": 0.95, "b": 0.9, "g": 0.8}),
        saved(tmp_path, "base", {"a": 0.2, "b": 0.9, "g": 0.0}),
        saved(tmp_path, "untold", None),
    ]
    return comparison.collect(records, lambda record: store.load_samples(store.record_path(record, tmp_path), record, texts=False))


def test_methods_without_outcomes_take_no_part(scores: comparison.Scores) -> None:
    assert scores.methods == ("dlp", "oracle", "base")
    assert scores.seeds == (0, 1)
    assert scores.ran.tolist() == [[True, True], [True, False], [True, False]]
    assert scores.values["a"]["acc"].shape == (NUM, 3, 2)
    assert scores.bleu["g"].shape == (NUM, 3, 2, 10)
    assert scores.bleu["g"][0, :, :, 1].tolist() == [[5, 5], [5, 0], [5, 0]]  # length of the reference


def test_a_method_with_other_questions_takes_no_part(tmp_path: Path) -> None:
    whole = saved(tmp_path, "dlp", {"a": 0.9, "b": 0.9, "g": 0.8})
    record = make_record(method_name="short", cell="short")
    short = read_record(store.save(record, tmp_path, [row for row in outcomes({"a": 1, "b": 1, "g": 1}) if row.question != 3]))
    found = comparison.collect([whole, short], lambda one: store.load_samples(store.record_path(one, tmp_path), one))
    assert found.methods == ("dlp",)


@pytest.mark.parametrize("key", ["mean_score", "mcq_acc", "gen_exact_match", "gen_bleu", "gen_rouge1"])
def test_large_differences_are_significant_and_small_ones_are_not(scores: comparison.Scores, key: str) -> None:
    verdicts = comparison.against(scores, key, "dlp")
    assert set(verdicts) == {"oracle", "base"}
    assert verdicts["base"].significant
    assert verdicts["base"].high < 0
    assert not verdicts["oracle"].significant
    assert comparison.ties_with(scores, key, "oracle") == {"dlp"}


def test_tasks_won_and_ranks(scores: comparison.Scores) -> None:
    assert comparison.task_wins(scores, "dlp")["base"] == (0, 1, 2, 0, 2)
    ranking = comparison.ranking(scores)
    assert list(ranking.ranks)[-1] == "base"
    assert sum(ranking.ranks.values()) == pytest.approx(6.0)
    assert ranking.critical == pytest.approx(2.343 * (3 * 4 / (6 * 3)) ** 0.5, abs=0.01)  # q of Demšar's table 5 for three methods
    assert ranking.friedman is not None


def seeded(root: Path, name: str, rates: Mapping[int, float]) -> None:
    """Runs of several seeds; every seed has its own rate of right answers in all tasks."""
    for seed, rate in rates.items():
        saved(root, name, {"a": rate, "b": rate, "g": rate}, seed)


def compared(root: Path, key: str) -> dict[str, comparison.Verdict]:
    (one,) = group(store.load_all(root)[0], store.OutcomeReader(root))
    return comparison.against(one.scores, key, "dlp")


@pytest.mark.parametrize("key", ["mean_score", "gen_exact_match", "gen_bleu", "gen_rougeL"])
def test_a_difference_carried_by_one_seed_is_not_significant(tmp_path: Path, key: str) -> None:
    seeded(tmp_path, "dlp", {0: 0.9, 1: 0.9, 2: 0.9})
    seeded(tmp_path, "carried", {0: 0.88, 1: 0.1, 2: 0.88})
    seeded(tmp_path, "worse", {0: 0.3, 1: 0.28, 2: 0.32})
    verdicts = compared(tmp_path, key)
    assert verdicts["carried"].difference < -0.2
    assert not verdicts["carried"].significant
    assert verdicts["carried"].high > 0
    assert verdicts["worse"].significant
    assert verdicts["worse"].high < 0


def test_only_seeds_that_both_have_are_compared(tmp_path: Path) -> None:
    seeded(tmp_path, "dlp", {0: 0.9, 1: 0.2})
    seeded(tmp_path, "partly", {0: 0.9})
    seeded(tmp_path, "never", {5: 0.9})
    verdicts = compared(tmp_path, "mean_score")
    assert set(verdicts) == {"partly"}  # the other shares no seed
    assert verdicts["partly"].difference == 0.0
    assert verdicts["partly"].p == 1.0


def test_ranks_compare_methods_on_the_same_seeds(tmp_path: Path) -> None:
    """Seed 1 has bad experts. A mean over both seeds would put the method that lacks it first."""
    seeded(tmp_path, "dlp", {0: 0.95, 1: 0.3})
    seeded(tmp_path, "base", {0: 0.2, 1: 0.2})
    seeded(tmp_path, "lucky", {0: 0.7})
    seeded(tmp_path, "elsewhere", {1: 0.9})
    (one,) = group(store.load_all(tmp_path)[0], store.OutcomeReader(tmp_path))
    ranking = comparison.ranking(one.scores)
    assert (list(ranking.ranks), ranking.seeds) == (["dlp", "lucky", "base"], (0,))
    assert "among 3 methods, seed 0;" in pair_table(one.scores)
    assert comparison.shared_seeds(one.scores, "dlp") == {"dlp": 2, "base": 2, "lucky": 1, "elsewhere": 1}
    seeded(tmp_path / "whole", "dlp", {0: 0.95, 1: 0.3})
    seeded(tmp_path / "whole", "base", {0: 0.2, 1: 0.2})
    (whole,) = group(store.load_all(tmp_path / "whole")[0], store.OutcomeReader(tmp_path / "whole"))
    assert comparison.ranking(whole.scores).seeds == (0, 1)


def test_a_table_has_means_over_the_same_seeds(tmp_path: Path) -> None:
    seeded(tmp_path, "dlp", {0: 0.95, 1: 0.3})
    seeded(tmp_path, "ties", {0: 0.5, 1: 0.1})
    seeded(tmp_path, "lucky", {0: 0.7})
    (one,) = group(store.load_all(tmp_path)[0], store.OutcomeReader(tmp_path))
    first, second = by_seeds(one.records)
    assert {(record.method_name, record.seed) for record in first} == {("dlp", 0), ("dlp", 1), ("ties", 0), ("ties", 1)}
    assert {(record.method_name, record.seed) for record in second} == {("dlp", 0), ("lucky", 0)}  # the reference row on the same experts
    text = tables.page([one], one.suite)
    assert text.count("\n| `dlp` |") == 3  # both tables, and the pairs
    assert "## Seed 0 only" in text
    assert "± one standard error over questions and seeds" in text
    assert "± one standard error over questions." in text


def test_clones_are_compared_but_not_ranked(tmp_path: Path) -> None:
    for name, rate in (("dlp", 0.9), ("dlp_code", 0.9), ("dlp_top1", 0.9), ("base", 0.2), ("oracle", 0.95)):
        seeded(tmp_path, name, {0: rate})
    (one,) = group(store.load_all(tmp_path)[0], store.OutcomeReader(tmp_path))
    ranking = comparison.ranking(one.scores)
    assert set(ranking.ranks) == {"dlp", "base", "oracle"}
    assert ranking.critical == pytest.approx(2.343 * (3 * 4 / (6 * 3)) ** 0.5, abs=0.01)  # three methods, not five
    assert ranking.seeds == (0,)
    text = pair_table(one.scores)
    assert "| `dlp_code` | +0.0 [+0.0, +0.0]" in text
    assert "are not ranked: `dlp_code`, `dlp_top1`." in text
    seeded(tmp_path / "alone", "dlp_code", {0: 0.9})
    seeded(tmp_path / "alone", "base", {0: 0.2})
    (alone,) = group(store.load_all(tmp_path / "alone")[0], store.OutcomeReader(tmp_path / "alone"))
    assert set(comparison.ranking(alone.scores).ranks) == {"dlp_code", "base"}  # its original is not there


def test_the_committed_difference_of_one_bad_seed_is_not_starred() -> None:
    """`multitask_r208` loses 20, 44 and 15 points of exact match to `dlp`, seed by seed."""
    root = Path(__file__).resolve().parents[2] / "results"
    reader = store.OutcomeReader(root)
    wanted = {"dlp", "multitask_r208", "base", "retriever_mixture"}
    known = [record for record in store.load_all(root, "nano")[0] if record.protocol_name == "nano"]
    records = [record for record in latest(known) if record.method_name in wanted]
    verdicts = comparison.against(comparison.collect(records, reader.numbers), "gen_exact_match", "dlp")
    assert verdicts["multitask_r208"].difference == pytest.approx(-0.2654, abs=1e-3)
    assert verdicts["multitask_r208"].p == pytest.approx(0.095, abs=0.005)
    assert not verdicts["multitask_r208"].significant
    assert verdicts["base"].significant
    assert verdicts["retriever_mixture"].significant


def test_the_page_shows_pairs_and_marks_ties(tmp_path: Path) -> None:
    for name, rate in (("dlp", 0.9), ("oracle", 0.91), ("base", 0.2)):
        rows = {task: dataclasses.replace(row, metrics=dict.fromkeys(row.metrics, rate)) for task, row in make_record().tasks.items()}
        store.save(make_record(method_name=name, cell=name, tasks=rows), tmp_path, outcomes(dict.fromkeys("abg", rate)))
    groups = group(store.load_all(tmp_path)[0], store.OutcomeReader(tmp_path))
    page = tables.page(groups, "toy")
    line = next(line for line in page.splitlines() if line.startswith("| `base`") and "[" in line)
    assert line.split("|")[2].strip().endswith("] *")
    assert "*" not in line.split("|")[3]  # other columns are descriptive
    assert "0–0–3 | 0–3" in line
    assert "the family is the 2 other methods" in page
    first = {line.split("`")[1]: line.split("|")[3] for line in reversed(page.splitlines()) if line.startswith("| `")}
    assert first["oracle"].strip().startswith("**")
    assert tables.TIE in first["dlp"]
    assert tables.TIE not in first["base"]
    row = next(line for line in page.splitlines() if line.startswith("| `dlp` |"))
    assert row.count(tables.TIE) == 1  # only the primary metric is tested
    readme = tables.readme_block(groups[0])
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    assert all(len(line.split("|")) - 2 <= 6 for line in rows)
    assert len(rows) - 2 <= 8


def test_every_task_and_metric_is_compared_as_statsmodels_and_sacrebleu_would(scores: comparison.Scores) -> None:
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.multitest import multipletests

    verdicts = comparison.by_task(scores, "dlp")
    assert set(verdicts) == {("a", "acc"), ("b", "acc"), *(("g", metric) for metric in ("exact_match", "bleu", "rouge1", "rougeL"))}
    for task, metric in (("a", "acc"), ("g", "exact_match")):
        columns = dict(zip(scores.methods, scores.values[task][metric][:, :, 0].T, strict=True))  # the seed that all have
        p_values = []
        for name in ("oracle", "base"):
            table = [[np.sum((columns[name] == x) & (columns["dlp"] == y)) for y in (1, 0)] for x in (1, 0)]
            p_values.append(float(mcnemar(table, exact=True).pvalue))
            assert verdicts[task, metric][name].p == pytest.approx(p_values[-1])
            assert verdicts[task, metric][name].difference == pytest.approx(columns[name].mean() - columns["dlp"].mean())
        corrected = multipletests(p_values, method="holm")[1]
        assert [verdicts[task, metric][name].p_holm for name in ("oracle", "base")] == pytest.approx(list(corrected))
    bleu = verdicts["g", "bleu"]["base"]
    assert bleu.significant
    assert bleu.low < bleu.difference < bleu.high < 0
    assert comparison.by_task(scores, "nobody") == {}


def test_the_aggregates_interval_is_that_of_a_plain_loop(scores: comparison.Scores) -> None:
    """Drawn question by question in Python, two tasks, means over tasks."""
    rng = np.random.default_rng(11)
    differences = []
    for _ in range(3000):
        by_task = []
        for task in ("a", "b"):
            rows = rng.integers(0, NUM, NUM)
            values = scores.values[task]["acc"][rows][:, :, 0]
            by_task.append(values[:, scores.methods.index("base")].mean() - values[:, scores.methods.index("dlp")].mean())
        differences.append(np.mean(by_task))
    verdict = comparison.against(scores, "mcq_acc", "dlp")["base"]
    low, high = np.quantile(differences, (0.025, 0.975))
    assert (verdict.low, verdict.high) == pytest.approx((low, high), abs=0.012)


def test_pairs_as_csv(tmp_path: Path) -> None:
    for name, rate in (("dlp", 0.9), ("base", 0.2)):
        saved(tmp_path, name, {"a": rate, "b": 0.9, "g": rate})
    groups = group(store.load_all(tmp_path)[0], store.OutcomeReader(tmp_path))
    rows = list(csv.DictReader(io.StringIO(pairs_csv(groups))))
    assert len(rows) == 2 + 4  # accuracy of two tasks, four metrics of the third
    assert {row["method"] for row in rows} == {"base"}
    (same,) = [row for row in rows if row["task"] == "b"]
    assert (float(same["difference"]), float(same["p"])) == (0.0, 1.0)
