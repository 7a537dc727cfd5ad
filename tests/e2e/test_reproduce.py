"""The main job on a few questions: announced, evaluated, tabulated, and not repeated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dlplora.cli.main import main
from dlplora.inference.loading import NANO_ASSETS
from dlplora.reproduce import artifacts as assets

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of trainings in which the router is trained already, as after a first run."""
    if not assets._matches(NANO_ASSETS / "router", assets.recipe_hash("router")):
        pytest.skip("the embedded router's recipe has changed; training one takes too long here")
    shutil.copytree(NANO_ASSETS / "router", tmp_path / "runs" / "router")
    return tmp_path / "runs"


def test_reproduce_evaluates_what_is_missing(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text()
    arguments = ["reproduce", "nano", "--limit", "2", "--methods", "base,dlp", "--runs", str(runs), "--out", str(tmp_path / "results")]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert "pool: shipped" in first.err
    assert "router: trained before" in first.err
    table = [line for line in first.out.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in table] == ["base", "dlp"]
    records = {path.name.split("-")[0]: json.loads(path.read_text()) for path in (tmp_path / "results" / "scratch").rglob("*.json")}
    assert set(records) == {"base", "dlp"}  # limited runs are no results
    for record in records.values():
        assert record["limit"] == 2
        assert len(record["tasks"]) == 26
        assert {task["num"] for task in record["tasks"].values()} == {2}
    assert records["base"]["artifact_hashes"] == {}
    assert set(records["dlp"]["artifact_hashes"]) == {"router"}
    assert records["dlp"]["aggregates"]["mcq_acc"] > records["base"]["aggregates"]["mcq_acc"] + 0.3
    assert main(arguments) == 0
    second = capsys.readouterr()
    assert second.err.count("reused") == 3  # the announcement, and both cells
    assert (ROOT / "README.md").read_text() == readme


def test_the_plan_names_what_each_method_needs(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["reproduce", "nano", "--runs", str(runs), "--out", str(tmp_path / "results"), "--dry-run"]
    assert main([*arguments, "--methods", "mole,multitask_r64", "--seeds", "0,3"]) == 0
    planned = capsys.readouterr().err
    for line in ("trained/mole: shipped", "trained/mole, seed 3: to be trained", "multitask_r64, seed 3: to be trained", "pool: shipped"):
        assert line in planned
    assert "router" not in planned
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--methods", "dpl"], "dlp"),
        (["--seeds", "one"], "--seeds"),
        (["--seeds", "1,1"], "--seeds"),
        (["--limit", "0", "--methods", "base"], "limit"),
    ],
)
def test_bad_input_is_said_before_anything_runs(
    more: list[str], part: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "nano", "--runs", str(runs), "--out", str(tmp_path / "results"), *more]) == 2
    assert part in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "results").exists()
