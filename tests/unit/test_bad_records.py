"""Bad records at the commands' doors: file and field are named, the rest is still reported, exit 1."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dlplora.cli.main import main
from dlplora.reporting import store
from dlplora.reporting.groups import group
from dlplora.reporting.schema import read_record
from tests.unit.test_comparison import outcomes, saved
from tests.unit.test_records import make_record


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name in ("dlp", "base", "oracle"):
        saved(tmp_path, name, {"a": 0.9, "b": 0.9, "g": 0.8})
    return tmp_path


DAMAGES = {
    "unknown version": (lambda raw: raw.update(schema_version=99), "schema_version 99"),
    "missing field": (lambda raw: raw.pop("seed"), "missing required key(s): seed"),
    "NaN": (lambda raw: raw["tasks"]["a"]["metrics"].update(acc=math.nan), "field 'tasks.a.metrics.acc' is nan"),
    "another suite's task": (lambda raw: raw["tasks"].update(z=raw["tasks"]["a"]), "tasks.z is not a task of suite 'toy'"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_every_command_names_file_and_field_and_reports_the_rest(results: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = DAMAGES[what]
    (path,) = results.glob("runs/toy/base-*.json")
    raw = json.loads(path.read_text())
    damage(raw)
    path.write_text(json.dumps(raw))
    pages = [["html"]] if what == "NaN" else []  # drawing takes seconds
    for action in (["build", "--suite", "toy"], ["validate", "--suite", "toy"], ["list", "--suite", "toy"], *pages):
        assert main(["report", *action, "--out", str(results)]) == 1, action
        said = capsys.readouterr()
        assert f"{path}: " in said.err
        assert message in said.err
        assert said.err.count("error:") == 1
    table = (results / "tables" / "toy.md").read_text()
    assert "| `dlp` |" in table
    assert "| `oracle` |" in table
    assert "`base`" not in table


def test_a_duplicate_with_other_content_names_both_files(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = results.glob("runs/toy/base-*.json")
    copy = path.with_name("zz.json")
    raw = json.loads(path.read_text())
    raw["tasks"]["a"]["metrics"]["acc"] = 0.75
    copy.write_text(json.dumps(raw))
    assert main(["report", "build", "--suite", "toy", "--out", str(results)]) == 1
    said = capsys.readouterr().err
    assert f"{copy}: the same cell" in said
    assert str(path) in said
    assert "field 'tasks' differs" in said
    assert "| `base` | inputs | **55.0** ± 2.4 | **70.0**" in (results / "tables" / "toy.md").read_text()  # the first file counts


@pytest.mark.parametrize("damage", ["missing", "other"])
def test_damaged_outcomes_are_named_and_the_rest_is_reported(results: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = results.glob("runs/toy/base-*.parquet")
    path.unlink() if damage == "missing" else path.write_bytes(b"other")
    assert main(["report", "build", "--suite", "toy", "--out", str(results)]) == 1
    assert f"{path}: " in capsys.readouterr().err
    table = (results / "tables" / "toy.md").read_text()
    assert "| `dlp` |" in table
    assert "`base`" not in table


def test_two_backbones_are_never_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for backbone, rate in (("small", 0.2), ("large", 0.9)):
        for name in ("dlp", "base"):
            record = make_record(method_name=name, cell=f"{name}-{backbone}", backbone={"name": backbone})
            store.save(record, tmp_path, outcomes({"a": rate, "b": rate, "g": rate}))
    records, _ = store.load_all(tmp_path)
    groups = group(records, store.OutcomeReader(tmp_path))
    assert [(one.backbone, len(one.records)) for one in groups] == [("large", 2), ("small", 2)]
    assert groups[0].scores.values["a"]["acc"].mean() > 0.8
    assert groups[1].scores.values["a"]["acc"].mean() < 0.3
    assert main(["report", "all", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    page = (tmp_path / "tables" / "toy.md").read_text()
    assert page.count("| `dlp` | inputs | **55.0** ± 2.4 | **70.0**") == 2
    assert "## Protocol `toy`, base model `large`" in page
    assert {path.name for path in (tmp_path / "figures").glob("*radar.svg")} == {"toy_toy_large_radar.svg", "toy_toy_small_radar.svg"}
    rows = (tmp_path / "tables" / "toy.csv").read_text().splitlines()
    assert [row.split(",")[:3] for row in rows[1:]] == [["toy", b, m] for b in ("large", "small") for m in ("base", "dlp")]


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_or_on_a_full_disk_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: BaseException
) -> None:
    def stop(*_: Any) -> None:
        raise stopped

    with monkeypatch.context() as patched:
        patched.setattr(store, "to_json", stop)
        with pytest.raises(type(stopped)):
            store.save(make_record(), tmp_path, outcomes({"a": 1, "b": 1, "g": 1}))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    path = store.save(make_record(), tmp_path, outcomes({"a": 1, "b": 1, "g": 1}))
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(store, "to_json", stop)
        with pytest.raises(type(stopped)):
            store.save(make_record(), tmp_path, outcomes({"a": 0, "b": 1, "g": 1}))
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before
    assert store.load_samples(path, read_record(path)) is not None


def test_a_record_of_brackets_only_is_named(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = results.glob("runs/toy/base-*.json")
    path.write_text("[" * 100_000)
    assert main(["report", "validate", "--suite", "toy", "--out", str(results)]) == 1
    assert f"{path}: its brackets are nested too deeply" in capsys.readouterr().err
