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
from dlplora.reporting.groups import group
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
    assert scores.values["a"]["acc"].shape == (NUM, 3)
    assert scores.bleu["g"].shape == (NUM, 3, 10)
    assert scores.bleu["g"][0, 0, 1] == 10  # reference length, summed over two seeds
    assert scores.of(["base", "untold", "dlp"]).methods == ("base", "dlp")


def test_a_method_with_other_questions_takes_no_part(tmp_path: Path) -> None:
    whole = saved(tmp_path, "dlp", {"a": 0.9, "b": 0.9, "g": 0.8})
    record = make_record(method_name="short", cell="short")
    short = read_record(store.save(record, tmp_path, [row for row in outcomes({"a": 1, "b": 1, "g": 1}) if row.question != 3]))
    found = comparison.collect([whole, short], lambda one: store.load_samples(store.record_path(one, tmp_path), one))
    assert found.methods == ("dlp",)


@pytest.mark.parametrize("key", ["mcq_acc", "gen_exact_match", "gen_bleu", "gen_rouge1"])
def test_large_differences_are_significant_and_small_ones_are_not(scores: comparison.Scores, key: str) -> None:
    verdicts = comparison.against(scores, key, "dlp")
    assert set(verdicts) == {"oracle", "base"}
    assert verdicts["base"].significant
    assert verdicts["base"].high < 0
    assert not verdicts["oracle"].significant
    assert comparison.ties_with_best(scores, key) == ({"dlp"} if key == "mcq_acc" else {"oracle"})


def test_tasks_won_and_ranks(scores: comparison.Scores) -> None:
    assert comparison.task_wins(scores, "dlp")["base"] == (0, 1, 2, 0, 2)
    ranks, critical, friedman = comparison.ranking(scores)
    assert list(ranks)[-1] == "base"
    assert sum(ranks.values()) == pytest.approx(6.0)
    assert critical == pytest.approx(2.343 * (3 * 4 / (6 * 3)) ** 0.5, abs=0.01)  # q of Demšar's table 5 for three methods
    assert friedman is not None


def test_the_page_shows_pairs_and_marks_ties(scores: comparison.Scores) -> None:
    def named(name: str, accuracy: float) -> Record:
        record = make_record(method_name=name)
        return dataclasses.replace(record, aggregates={**record.aggregates, "mcq_acc": accuracy})

    page = tables.page([named("oracle", 0.92), named("dlp", 0.9), named("base", 0.5)], "toy", scores)
    line = next(line for line in page.splitlines() if line.startswith("| `base`") and "[" in line)
    assert "*" in line
    assert "0–1–2" in line
    first = {line.split("`")[1]: line.split("|")[2].strip() for line in reversed(page.splitlines()) if line.startswith("| `")}
    assert first == {"oracle": "**92.0** ± 2.5", "dlp": f"90.0 ± 2.5 {tables.TIE}", "base": "50.0 ± 2.5"}


def test_every_task_and_metric_is_compared_as_statsmodels_and_sacrebleu_would(scores: comparison.Scores) -> None:
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.multitest import multipletests

    verdicts = comparison.by_task(scores, "dlp")
    assert set(verdicts) == {("a", "acc"), ("b", "acc"), *(("g", metric) for metric in ("exact_match", "bleu", "rouge1", "rougeL"))}
    for task, metric in (("a", "acc"), ("g", "exact_match")):
        columns = dict(zip(scores.methods, scores.values[task][metric].T, strict=True))
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
            values = scores.values[task]["acc"][rows]
            by_task.append(values[:, scores.methods.index("base")].mean() - values[:, scores.methods.index("dlp")].mean())
        differences.append(np.mean(by_task))
    verdict = comparison.against(scores, "mcq_acc", "dlp")["base"]
    low, high = np.quantile(differences, (0.025, 0.975))
    assert (verdict.low, verdict.high) == pytest.approx((low, high), abs=0.012)


def test_pairs_as_csv(tmp_path: Path) -> None:
    for name, rate in (("dlp", 0.9), ("base", 0.2)):
        saved(tmp_path, name, {"a": rate, "b": 0.9, "g": rate})
    groups = group(store.load_all(tmp_path)[0], store.OutcomeReader(tmp_path))
    rows = list(csv.DictReader(io.StringIO(tables.pairs_csv(groups))))
    assert len(rows) == 2 + 4  # accuracy of two tasks, four metrics of the third
    assert {row["method"] for row in rows} == {"base"}
    (same,) = [row for row in rows if row["task"] == "b"]
    assert (float(same["difference"]), float(same["p"])) == (0.0, 1.0)
