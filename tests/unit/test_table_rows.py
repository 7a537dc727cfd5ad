"""What is a row of which table: other tasks, other parameters and other rows are not mixed, and what is left out is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dlplora.cli.main import main
from dlplora.reporting import store
from dlplora.reporting.groups import group, latest, left_out
from dlplora.reporting.schema import Record
from tests.unit.test_comparison import outcomes
from tests.unit.test_records import make_record

RATES = {"a": 0.9, "b": 0.9, "g": 0.8}
LATER = "2026-02-01T00:00:00+00:00"


def saved(root: Path, tasks: str = "abg", **changes: Any) -> Record:
    """A record of some of the tasks, with outcomes."""
    whole = make_record(**changes)
    record = dataclasses.replace(whole, tasks={name: whole.tasks[name] for name in tasks})
    store.save(record, root, [one for one in outcomes(RATES) if one.task in tasks])
    return record


def built(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The table of the suite, and what its command says on standard error."""
    assert main(["report", "build", "--suite", "toy", "--out", str(root)]) == 0
    return (root / "tables" / "toy.md").read_text(encoding="utf-8"), capsys.readouterr().err


def test_records_of_other_tasks_have_tables_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("dlp", "base"):
        saved(tmp_path, "abg", method_name=name, cell=f"{name}0")
        saved(tmp_path, "g", method_name=name, cell=f"{name}1", suite_tasks=["g"], created=LATER)  # local:all and local:g
    saved(tmp_path, "a", cell="part", created=LATER)  # eval --tasks a
    groups = group(store.load_all(tmp_path)[0], store.OutcomeReader(tmp_path))
    assert [one.setting for one in groups] == ["toy (a, b, g)", "toy (a, of 3 tasks)", "toy (g)"]
    assert [set(one.scores.methods) for one in groups] == [{"dlp", "base"}, set(), {"dlp", "base"}]
    assert len({one.slug for one in groups}) == 3
    text, said = built(tmp_path, capsys)
    assert text.count("\n## Protocol `toy (") == 3
    assert said == ""
    assert main(["report", "all", "--out", str(tmp_path)]) == 0


def test_another_protocol_has_no_latency_columns_and_figures_of_its_own() -> None:
    """``nano_linear`` is the suite nano with other adapters, which nobody has timed."""
    root = Path(__file__).resolve().parents[2] / "results"
    if not (root / "bench").is_dir():
        pytest.skip("no committed records here")
    own, linear = group(store.load_all(root, "nano")[0], store.OutcomeReader(root))
    assert (own.protocol, linear.protocol) == ("nano", "nano_linear")
    assert own.latency is not None
    assert linear.latency is None
    assert (root / "figures" / "nano_radar.svg").is_file()
    assert (root / "figures" / f"{linear.slug}_radar.svg").is_file()


def test_other_parameters_have_rows_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, cell="own")
    for cell, changed in (("x", {"top_p": 0.5}), ("y", {"top_p": 0.7, "selector": "nucleus"})):
        saved(tmp_path, cell=cell, method={"method": "dlp", "params": changed, "changed": changed}, method_hash=cell, created=LATER)
    records = store.load_all(tmp_path)[0]
    assert {record.method_name for record in records} == {"dlp"}
    names = {"dlp", "dlp (top_p=0.5)", "dlp (top_p=0.7, selector=nucleus)"}
    assert {record.method_name for record in latest(latest(records))} == names
    (one,) = group(records, store.OutcomeReader(tmp_path))
    assert set(one.scores.methods) == names  # their outcomes are found
    text, said = built(tmp_path, capsys)
    assert "| `dlp (top_p=0.5)` | inputs | **55.0**" in text
    assert said == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pool_hash": "other"}, "a newer one has another pool"),
        ({"method_hash": "other"}, "a newer one has other parameters"),
        ({"artifact_hashes": {"router": "r"}}, "a newer one has another router"),
        ({"protocol": {"suite": "toy", "dtype": "bfloat16"}}, "a newer one has another dtype"),
        ({"provenance": {"git": {}, "rows": {"a": "1", "b": "3"}}}, "a newer one has other rows of b"),
        (
            {"method_name": "base", "provenance": {"git": {}, "rows": {"a": "1", "b": "3"}}},
            "newer ones have other rows of b; evaluate again",
        ),
        ({}, "a newer one has another cell (rows, device or version)"),
    ],
)
def test_what_is_left_out_is_said(changes: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"protocol": {"suite": "toy", "dtype": "float32"}, "artifact_hashes": {"router": "q"}}
    common["provenance"] = {"git": {}, "rows": {"a": "1", "b": "2"}}
    old = saved(tmp_path, **{**common, "cell": "old", **changes})
    new = saved(tmp_path, **common, cell="new", created=LATER)
    assert latest([old, new]) == [new]
    (sentence,) = left_out([old, new])
    name = old.method_name
    assert sentence == f"toy: the record of {name}, seed 0, made 2026-01-01T00:00:00+00:00, is left out: {reason}."
    assert built(tmp_path, capsys)[1] == f"dlplora: warning: {sentence}\n"


def test_eval_names_the_changed_parameters(tmp_path: Path) -> None:
    from dlplora.evaluation.protocol import load_protocol
    from dlplora.evaluation.runner import blank_record, prepare

    protocol = load_protocol("nano")
    assert "changed" not in blank_record(prepare(protocol, "nano", "dlp", 0)).method
    default = blank_record(prepare(protocol, "nano", "dlp", 0)).method["params"]["top_p"]
    same = blank_record(prepare(protocol, "nano", "dlp", 0, method_params={"top_p": default})).method
    assert "changed" not in same
    other = blank_record(prepare(protocol, "nano", "dlp", 0, method_params={"top_p": 0.123})).method
    assert other["changed"] == {"top_p": 0.123}
    (tmp_path / "mine.yaml").write_text(json.dumps({"method": "dlp", "params": {"top_p": 0.123}}))
    assert "changed" not in blank_record(prepare(protocol, "nano", str(tmp_path / "mine.yaml"), 0)).method


def test_report_says_what_is_only_in_scratch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dirty = {"git": {"commit": "abc1234", "dirty": True}}
    saved(tmp_path, method_name="mine", cell="m", provenance=dirty)
    saved(tmp_path, method_name="base", cell="b", limit=2)
    saved(tmp_path, method_name="oracle", cell="o", status="failed")
    waiting = f"2 records in {tmp_path / 'scratch'} (1 limited to some questions (--limit), 1 of uncommitted code)"
    for command in (["build", "--suite", "toy"], ["all"], ["list", "--suite", "toy"], ["html"], ["figures", "--suite", "toy"]):
        assert main(["report", *command, "--out", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert f"for tables, only {waiting}. Tables show whole runs of committed code: commit" in said
        assert said.count("\n") == 1
    assert main(["report", "list", "--scratch", "--suite", "toy", "--out", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "mine  seed 0  2026-01-01T00:00:00+00:00  ok  of uncommitted code  mcq_acc 0.700" in listed
    assert "oracle  seed 0  2026-01-01T00:00:00+00:00  failed  failed or interrupted" in listed
    saved(tmp_path, method_name="base", cell="c")  # the same method without --limit
    told = built(tmp_path, capsys)[1]
    assert told.startswith(f"dlplora: note: no table shows 1 record in {tmp_path / 'scratch'} (1 of uncommitted code). Tables show")
    assert main(["report", "build", "--suite", "nano", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("not found. It has results of toy (--suite).\n")
