"""``dlplora eval --method a,b,c``: the records of one process are those of three, and nothing starts that cannot finish."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlplora.cli.main import main
from dlplora.errors import UnavailableMethodError
from dlplora.methods.registry import available_presets, build_method
from tests.toy_tasks import NAMES, write_tasks

METHODS = ("oracle", "mole", "dlp")
OF_THE_PROCESS = {"created", "timings_s", "provenance"}
"""What two equal runs differ in."""


@pytest.fixture
def quick(tmp_path: Path) -> list[str]:
    (tmp_path / "quick.yaml").write_text("suite: nano\ntasks: [shelf_sorting, object_counting]\n")
    return ["eval", "--protocol", str(tmp_path / "quick.yaml"), "--limit", "2"]


def records(text: str) -> list[dict[str, Any]]:
    """Of the paths on standard output, one line of JSON a method."""
    return [json.loads(Path(json.loads(line)["record"]).read_text()) for line in text.splitlines()]


def test_several_methods_give_the_records_of_each_alone(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*quick, "--method", ",".join((*METHODS, METHODS[0])), "--out", str(tmp_path / "together")]) == 0
    together = records(capsys.readouterr().out)
    assert [record["method_name"] for record in together] == list(METHODS)
    for name, record in zip(METHODS, together, strict=True):
        assert main([*quick, "--method", name, "--out", str(tmp_path / "alone")]) == 0
        (alone,) = records(capsys.readouterr().out)
        assert set(alone) == set(record)
        assert {key for key in record if record[key] != alone[key]} <= OF_THE_PROCESS, name
        assert {task["num"] for task in record["tasks"].values()} == {2}
    assert main([*quick, "--method", ",".join(METHODS), "--out", str(tmp_path / "together")]) == 0
    assert capsys.readouterr().err.count("reusing") == 3


def test_standard_output_has_what_there_is(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Means are over the whole suite; a part of it has the numbers of its tasks."""
    assert main([*quick, "--method", "base", "--out", str(tmp_path / "results")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["tasks"]) == {"shelf_sorting", "object_counting"}
    assert told["tasks"] == {name: row["metrics"] for name, row in json.loads(Path(told["record"]).read_text())["tasks"].items()}
    assert told["aggregates"] == {}
    assert "router_accuracy" not in told["routing"]
    assert told["routing"]["num_plans"] == 4


def lacks_a_package(preset: str) -> bool:
    try:
        build_method(preset).require_packages()
    except UnavailableMethodError:
        return True
    return False


def test_all_presets_are_checked_without_being_trained_here(quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The package ships what each of them reads, save a router too large for it, which is named."""
    pytest.importorskip("nevergrad", reason="a preset needs the extra 'search'")
    assert main([*quick, "--method", "all", "--dry-run"]) == 0
    said = capsys.readouterr()
    described = [json.loads(line) for line in said.out.splitlines()]
    lacking = {name for name in available_presets() if lacks_a_package(name)}
    assert len(described) == len({one["cell"] for one in described}) == len(set(available_presets()) - lacking - {"dlp_paper5m"})
    assert said.err.count("left out: ") == len(lacking) + 1
    assert "left out: method 'dlp_paper5m' needs a router_paper5m" in said.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--method", "base,dpl"], "unknown method 'dpl'. Did you mean 'dlp'"),
        (["--method", "base,dlp", "--method-param", "p=0.5"], "--method-param belongs to one method, but --method names 2"),
        (["--method", "base,mole", "--trained", "x"], "--trained belongs to one method"),
        (["--method", ","], "the value of 'method' is empty"),
        (
            ["--data-root", "rows"],
            "the data root rows is not read: suite 'nano' is generated. Name the suite: local:all or local:TASK,TASK.",
        ),
        (["--tasks", "shelf_sorting,shelf_sorting"], "task 'shelf_sorting' is named twice"),
        (["--tasks", "shelf_sortin"], "suite 'nano' has no task 'shelf_sortin'. Did you mean 'shelf_sorting'"),
        (["--protocol", "nano_composite", "--tasks", "concat_3", "--method", "base,oracle"], "'concat_3' asks questions of several tasks"),
        (["--protocol", "nano_composite", "--tasks", "serial_3", "--method", "lorahub_in_pool"], "'serial_3' asks questions of several"),
    ],
)
def test_bad_input_stops_all_of_them(
    arguments: list[str], part: str, quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*quick, *arguments, "--out", str(tmp_path / "results")]) == 2
    said = capsys.readouterr().err.strip()
    assert part in said
    assert "\n" not in said
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("methods", "missing", "part"),
    [
        ("base,mole", "", "method 'mole' has to be trained first"),
        ("base,dlp", "", "method 'dlp' needs a router; none was given"),
        ("base,lorahub_in_pool", "train.jsonl", "method 'lorahub' needs training examples of every task; 'pets' has no train.jsonl"),
        ("base", "test.jsonl", "no test questions of 'pets': add test.jsonl, or leave the task out."),
        ("base,oracle", "adapter", "method 'oracle': no adapter for task 'pets'. The pool has: colors, echo."),
    ],
)
def test_what_a_method_lacks_is_said_before_the_first_starts(
    methods: str,
    missing: str,
    part: str,
    quick: list[str],
    tmp_path: Path,
    tiny_llama_folder: Path,
    make_adapter: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write_tasks(tmp_path / "rows")
    if missing.endswith(".jsonl"):
        (rows / "pets" / missing).unlink()
    for seed, name in enumerate(NAMES):
        if (missing, name) != ("adapter", "pets"):
            make_adapter(tmp_path / "pool" / name, seed=seed)
    own = ["--suite", f"local:{','.join(NAMES)}", "--tasks", ",".join(NAMES), "--data-root", str(rows)]
    own += ["--pretrained", str(tiny_llama_folder), "--pool", str(tmp_path / "pool")]
    capsys.readouterr()
    assert main([*quick, *own, "--method", methods, "--out", str(tmp_path / "results")]) == 2
    said = capsys.readouterr().err.strip()
    assert part in said
    assert "\n" not in said
    assert not (tmp_path / "results").exists()
