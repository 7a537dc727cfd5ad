"""``dlplora reproduce nano`` on a few questions: announced, evaluated, compared with the committed records, and not repeated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dlplora.cli.main import main
from dlplora.inference.backbones import NANO_ASSETS
from dlplora.reporting.store import file_checksum, samples_path
from dlplora.reproduce import artifacts, comparison

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of trainings in which the router is trained already, as after a first run."""
    shutil.copytree(NANO_ASSETS / "router", tmp_path / "runs" / "router")
    return tmp_path / "runs"


def test_shipped_artifacts_are_those_of_the_shipped_recipes() -> None:
    """A changed recipe would be trained again by every user, and needs artifacts that are made by it."""
    roles = [path.parent.relative_to(NANO_ASSETS).as_posix() for path in NANO_ASSETS.rglob("recipe.json") if path.parent.name != "backbone"]
    assert {"pool", "router", "multitask", "trained/mole"} <= set(roles)
    assert [role for role in roles if not artifacts._matches(NANO_ASSETS / role, artifacts.recipe_hash(role))] == []


def checksums(root: Path) -> dict[Path, str]:
    return {path: file_checksum(path) for path in sorted(root.rglob("*")) if path.is_file()}


def test_it_evaluates_here_and_compares_with_what_is_committed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = checksums(ROOT / "results") | {ROOT / "README.md": file_checksum(ROOT / "README.md")}
    arguments = ["reproduce", "nano", "--limit", "2", "--methods", "base,dlp", "--runs", str(runs)]
    assert main(arguments) == 0
    first = capsys.readouterr()
    for part in ("pool: shipped", "router: trained before", "[1/2] base, seed 0 …", "[2/2] dlp, seed 0: "):
        assert part in first.err
    assert "reused /" not in first.err
    lines = first.out.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines if line.endswith("equal")] == ["base", "dlp"]
    assert lines[-2].startswith("trained: nothing; evaluated: 2, reused: 0; time: ")
    assert lines[-1] == "against the committed records: 2 of 2 equal, 0 within the tolerance, 0 differ, 0 new"

    records = {path.name.split("-")[0]: json.loads(path.read_text()) for path in (runs / "results" / "scratch").rglob("*.json")}
    assert set(records) == {"base", "dlp"}  # limited runs are no results
    for record in records.values():
        assert record["limit"] == 2
        assert record["latency"] is None
        assert len(record["tasks"]) == 26
        assert {task["num"] for task in record["tasks"].values()} == {2}
    assert records["base"]["artifact_hashes"] == {}
    assert set(records["dlp"]["artifact_hashes"]) == {"router"}
    assert records["dlp"]["aggregates"]["mcq_acc"] > records["base"]["aggregates"]["mcq_acc"] + 0.3

    assert main(arguments) == 0
    second = capsys.readouterr()
    assert second.err.count(": reused ") == 2
    assert second.out.splitlines()[-2].startswith("trained: nothing; evaluated: 0, reused: 2; time: ")
    assert [line for line in second.out.splitlines() if line.endswith("equal")] == [line for line in lines if line.endswith("equal")]
    assert checksums(ROOT / "results") | {ROOT / "README.md": file_checksum(ROOT / "README.md")} == kept


def test_other_results_than_the_committed_ones_are_exit_code_1(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The committed record of another method stands in for results that this code no longer gives."""
    folder = tmp_path / "clone" / "results" / "runs" / "nano"
    folder.mkdir(parents=True)
    source, target = (next((ROOT / "results" / "runs" / "nano").glob(f"{name}-*-s0.json")) for name in ("oracle", "base"))
    changed = json.loads(target.read_text()) | {"samples_sha256": file_checksum(samples_path(source))}
    (folder / target.name).write_text(json.dumps(changed))
    shutil.copy(samples_path(source), samples_path(folder / target.name))
    monkeypatch.setattr(comparison, "PACKAGE_ROOT", tmp_path / "clone" / "dlplora")
    assert main(["reproduce", "nano", "--limit", "1", "--methods", "base", "--runs", str(runs)]) == 1
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("against the committed records: 0 of 1 equal, 0 within the tolerance, 1 differ")
    )


def test_the_plan_names_what_each_method_needs(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["reproduce", "nano", "--runs", str(runs), "--out", str(tmp_path / "results"), "--dry-run"]
    assert main([*arguments, "--methods", "mole,multitask_r64", "--seeds", "0,3"]) == 0
    planned = capsys.readouterr().err
    for line in ("trained/mole: shipped", "trained/mole, seed 3: to be trained", "multitask_r64, seed 3: to be trained", "pool: shipped"):
        assert line in planned
    assert "router" not in planned
    assert not (tmp_path / "results").exists()


def test_fresh_trains_and_evaluates_everything_again(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dry: nothing is deleted, everything is to be trained, the shipped artifacts as well."""
    before = checksums(runs)
    assert main(["reproduce", "nano", "--fresh", "--dry-run", "--runs", str(runs), "--methods", "dlp,multitask"]) == 0
    assert capsys.readouterr().err.count("to be trained") == 2  # the router lies in the folder, and goes when it begins
    assert checksums(runs) == before
    from dlplora.reproduce.pipeline import begin_fresh, finish

    (runs / "results").mkdir()
    (runs / "results" / "old.json").touch()
    begin_fresh(["dlp"], [0], runs, runs / "results")
    assert not (runs / "router").exists()
    assert not (runs / "results").exists()
    (runs / "router").mkdir()
    begin_fresh(["dlp"], [0], runs, runs / "results")  # an interrupted one continues
    assert (runs / "router").exists()
    finish(runs)


def test_an_evaluation_outside_a_repository_does_not_show_gits_complaint(tmp_path: Path) -> None:
    arguments = ["eval", "--method", "base", "--tasks", "shelf_sorting", "--limit", "1", "--out", "results"]
    command = [sys.executable, "-m", "dlplora.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "fatal" not in done.stderr
    assert done.stderr.startswith("evaluating base on 1 task(s)")
    (where,) = done.stderr.strip().splitlines()[1:]
    assert where.startswith("results/scratch/nano/base-")
    assert "is limited to some questions (--limit), so no table shows it" in where


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
