"""Methods in pairs: who takes part, what is significant, and what the table says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from dlplora.reporting import comparison, store, tables
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
