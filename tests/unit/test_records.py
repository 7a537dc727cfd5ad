"""Records: strict reading, atomic writing, aggregates over complete suites only."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from dlplora import atomic
from dlplora.atomic import write_atomically
from dlplora.errors import RecordError
from dlplora.reporting import store, tables
from dlplora.reporting.columns import rows_of
from dlplora.reporting.comparison import collect
from dlplora.reporting.groups import Group, latest
from dlplora.reporting.schema import Record, TaskResult, aggregate, read_record, to_json

KINDS = {"a": "mcq", "b": "mcq", "g": "gen"}


def make_record(**changes: Any) -> Record:
    tasks = {
        "a": TaskResult(kind="mcq", version="1.0", num=100, metrics={"acc": 0.5}, stderr={"acc": 0.03}),
        "b": TaskResult(kind="mcq", version="1.0", num=100, metrics={"acc": 0.9}, stderr={"acc": 0.04}),
        "g": TaskResult(
            kind="gen",
            version="1.0",
            num=100,
            metrics={"exact_match": 0.25, "bleu": 40.0, "rouge1": 0.5, "rougeL": 0.4},
            stderr={"exact_match": 0.05, "bleu": None, "rouge1": 0.02, "rougeL": 0.02},
        ),
    }
    values: dict[str, Any] = {
        "suite": "toy", "protocol_name": "toy", "protocol": {"suite": "toy"}, "protocol_hash": "p", "method_name": "dlp",
        "method": {"method": "dlp", "params": {}}, "method_hash": "m", "seed": 0, "backbone": {"name": "tiny"}, "pool_hash": "h",
        "artifact_hashes": {}, "tasks": tasks, "suite_tasks": ["a", "b", "g"], "routing": {"mean_experts_kept": 1.25}, "latency": None,
        "backend": "folded", "timings_s": {"evaluate": 1.0},
        "provenance": {"git": {"commit": "abc1234", "dirty": False}, "hardware": {"cpu": "x"}},
        "cell": "c0ffee", "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    record = Record(**{**values, **changes})
    return dataclasses.replace(record, aggregates=aggregate(record, KINDS))


def test_aggregates_are_unweighted_means_with_propagated_errors() -> None:
    record = make_record()
    assert record.aggregates["mcq_acc"] == pytest.approx(0.7)
    assert record.aggregates["mcq_acc_stderr"] == pytest.approx(math.hypot(0.03, 0.04) / 2)
    assert record.aggregates["gen_bleu"] == 40.0
    assert record.aggregates["gen_bleu_stderr"] is None


def test_a_missing_task_leaves_no_average() -> None:
    record = make_record()
    partial = {name: row for name, row in record.tasks.items() if name != "b"}
    incomplete = aggregate(dataclasses.replace(record, tasks=partial), KINDS)
    assert incomplete["mcq_acc"] is None
    assert incomplete["gen_exact_match"] == 0.25


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = make_record()
    path = store.save(record, tmp_path)
    assert path == tmp_path / "runs" / "toy" / "dlp-c0ffee-s0.json"
    assert read_record(path) == record
    assert store.find_cell("c0ffee", 0, "toy", "dlp", tmp_path) == path
    assert store.find_cell("c0ffee", 1, "toy", "dlp", tmp_path) is None


@pytest.mark.parametrize(
    "changes",
    [{"limit": 5}, {"status": "failed"}, {"provenance": {"git": {"commit": "abc", "dirty": True}}}],
    ids=["limited", "failed", "dirty"],
)
def test_runs_that_cannot_be_published_go_to_scratch(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert store.save(make_record(**changes), tmp_path).parts[-3] == "scratch"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw.update(schema_version=99), "schema_version 99"),
        (lambda raw: raw.pop("seed"), "missing required key(s): seed"),
        (lambda raw: raw.update(seeed=1), "unknown key 'seeed'"),
        (lambda raw: raw["tasks"]["a"]["metrics"].update(acc=float("nan")), "tasks.a.metrics.acc"),
        (lambda raw: raw["tasks"]["a"].pop("num"), "tasks.a: missing required key(s): num"),
        (lambda raw: raw["tasks"].update(other=raw["tasks"]["a"]), "tasks.other"),
        (lambda raw: raw.update(seed="zero"), "'seed' must be int, got 'zero'"),
        (lambda raw: raw["provenance"].update(git=None), "'provenance.git' must be an object, got None"),
        (lambda raw: raw["tasks"]["a"].update(metrics={}), "tasks.a: needs at least one question and one metric"),
        (lambda raw: raw["tasks"]["a"]["metrics"].update(acc=7), "tasks.a: metrics.acc must be from 0 to 1, got 7"),
        (lambda raw: raw["tasks"]["a"]["metrics"].update(acc=-3), "tasks.a: metrics.acc must be from 0 to 1, got -3"),
        (lambda raw: raw["tasks"]["a"]["metrics"].update(bleu=101), "tasks.a: metrics.bleu must be from 0 to 100, got 101"),
        (lambda raw: raw["tasks"]["a"]["stderr"].update(acc=-1), "tasks.a: stderr.acc cannot be negative"),
        (lambda raw: raw["method"].update(deep=eval("[" * 60 + "]" * 60)), "nested too deeply"),
        (lambda raw: raw.update(seed=10**30), "digits"),
        (lambda raw: raw["method"].update(name="\ud800"), "surrogate"),
    ],
    ids=(
        "version missing unknown nan nested foreign-task type no-git no-metrics acc-7 acc-negative bleu stderr deep digits surrogate"
    ).split(),
)
def test_damaged_records_are_refused_by_file_and_field(tmp_path: Path, damage: Any, message: str) -> None:
    raw = json.loads(to_json(make_record()))
    damage(raw)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(RecordError, match=re.escape(message)) as caught:
        read_record(path)
    assert str(path) in str(caught.value)


def test_nan_is_never_written() -> None:
    with pytest.raises(RecordError):
        to_json(dataclasses.replace(make_record(), timings_s={"evaluate": float("nan")}))


def test_one_damaged_record_does_not_hide_the_rest(tmp_path: Path) -> None:
    store.save(make_record(), tmp_path)
    (tmp_path / "runs" / "toy" / "broken.json").write_text("{")
    records, problems = store.load_all(tmp_path, "toy")
    assert len(records) == 1
    assert len(problems) == 1
    assert "broken.json" in problems[0]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    write_atomically(path, "old")
    monkeypatch.setattr(atomic.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_main_table_has_hand_computed_cells() -> None:
    worse = make_record(
        method_name="base",
        tasks={name: dataclasses.replace(row, metrics={**row.metrics, "exact_match": 0.1}) for name, row in make_record().tasks.items()},
    )
    text = tables.main_table([make_record(), worse])
    base_row, dlp_row = text.splitlines()[2:]
    assert base_row.startswith(
        "| `base` | inputs | 50.0 ± 2.4 | **70.0** ± 2.5 | 10.0 ± 5.0 | **40.0** | **50.0** ± 2.0 | **40.0** ± 2.0 | 1.25 |  |  |"
    )
    # the class of both is dlp; (50 + 90 + 25) / 3, and the root of 3² + 4² + 5² over 3
    assert dlp_row.startswith("| `dlp` | inputs | **55.0** ± 2.4 | **70.0** ± 2.5 | **25.0** ± 5.0 |")


def test_the_error_of_several_seeds_combines_seeds_and_questions() -> None:
    def seeded(seed: int, value: float) -> Record:
        base = make_record(seed=seed)
        tasks = {
            **base.tasks,
            "a": dataclasses.replace(base.tasks["a"], metrics={"acc": value}),
            "b": dataclasses.replace(base.tasks["b"], metrics={"acc": value}),
        }
        record = dataclasses.replace(base, tasks=tasks)
        return dataclasses.replace(record, aggregates=aggregate(record, KINDS))

    mean, error = rows_of([seeded(0, 0.2), seeded(1, 0.6)]).summaries["dlp"]["mcq_acc"]
    assert mean == pytest.approx(0.4)
    assert error == pytest.approx((0.2**2 + 0.025**2) ** 0.5)  # over seeds: stdev 0.2828 / sqrt(2); over questions 0.025


def test_build_is_idempotent_and_check_finds_staleness(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# x\n\n{tables.BEGIN}\nold\n{tables.END}\n\nend\n")
    records = [make_record()]
    stale = {path.name for path in tables.build(records, "toy", tmp_path, readme, check=True)}
    assert stale == {"README.md", "toy.md", "toy.csv", "toy.tex", "toy_pairs.csv", "reported.md"}
    assert "old" in readme.read_text()
    tables.build(records, "toy", tmp_path, readme)
    assert tables.build(records, "toy", tmp_path, readme, check=True) == []
    assert readme.read_text().endswith(f"{tables.END}\n\nend\n")
    with pytest.raises(RecordError, match="markers"):
        tables.with_block("no markers", "", "README.md")


def test_only_the_newest_record_of_a_configuration_is_shown() -> None:
    old = make_record(created="2025-01-01T00:00:00+00:00", cell="old")
    assert latest([make_record(), old]) == [make_record()]
    assert latest([make_record(limit=3)]) == []


def test_one_experiment_with_two_outcomes_names_both_files(tmp_path: Path) -> None:
    path = store.save(make_record(), tmp_path)
    copy = path.with_name("zz-copy.json")
    copy.write_text(path.read_text())
    assert len(store.load_all(tmp_path)[0]) == 1
    assert store.load_all(tmp_path)[1] == []
    raw = json.loads(path.read_text())
    raw["tasks"]["a"]["metrics"]["acc"] = 0.75
    copy.write_text(json.dumps(raw))
    records, problems = store.load_all(tmp_path)
    assert len(records) == 1
    assert len(problems) == 1
    assert "zz-copy.json" in problems[0]
    assert path.name in problems[0]
    assert "'tasks'" in problems[0]


def test_a_record_in_another_suites_folder_is_named(tmp_path: Path) -> None:
    path = store.save(make_record(), tmp_path)
    other = tmp_path / "runs" / "nano" / path.name
    other.parent.mkdir()
    path.rename(other)
    records, problems = store.load_all(tmp_path)
    assert records == []
    assert "field 'suite' is 'toy'" in problems[0]


def test_csv_and_latex_say_what_the_table_says() -> None:
    records = [make_record(), make_record(method_name="base", training_tokens=None, routing={})]
    one = Group(suite="toy", protocol="toy", backbone="tiny", records=tuple(records), scores=collect(records, lambda record: None))
    rows = list(csv.DictReader(io.StringIO(tables.csv_table([one]))))
    assert [row["method"] for row in rows] == ["base", "dlp"]
    assert float(rows[1]["mcq_acc"]) == pytest.approx(0.7)
    assert rows[0]["training_tokens"] == ""
    latex = tables.latex_table(records)
    assert latex.count(r"\\") == 3
    assert r"\textbf{70.0} $\pm$ 2.5" in latex
    assert "±" not in latex
    hostile = tables.latex_table([make_record(method_name=r"\input{x} & a_b^2%")])
    assert r"\texttt{\textbackslash{}input\{x\} \& a\_b\textasciicircum{}2\%} & " in hostile
    assert "%" not in latex.replace(r"\%", "").split("\n", 1)[1]


def test_committed_records_name_no_folder_of_the_machine_they_were_made_on() -> None:
    found = []
    for path in (Path(__file__).resolve().parents[2] / "results").rglob("*.json"):
        pending: list[Any] = [json.loads(path.read_text(encoding="utf-8"))]
        while pending:
            one = pending.pop()
            pending += one.values() if isinstance(one, dict) else one if isinstance(one, list) else []
            if isinstance(one, str) and re.match(r"(/|~|[A-Za-z]:\\)[\w.-]+[/\\]", one):
                found.append((path.name, one))
    assert found == []


def test_the_caption_names_what_a_choice_of_adapters_costs() -> None:
    costs = {
        "llm_choice": {"routing_tokens_per_prompt": 295.9},
        "logo_norm": {"routing_rows_per_prompt": 1},
        "qa_flora": {"routing_rows_per_prompt": 27},
    }
    records = [make_record(method_name=name, cell=name, routing={**make_record().routing, **cost}) for name, cost in costs.items()]
    assert "to choose its adapters: `llm_choice` 296 tokens; `logo_norm` 1 row; `qa_flora` 27 rows." in tables.caption(records)
    assert "to choose its adapters" not in tables.caption([make_record()])
