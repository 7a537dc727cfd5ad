"""The table of two protocols: only equal models side by side, and the committed one is what the records say."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from dlplora.atomic import write_atomically
from dlplora.cli.main import main
from dlplora.reporting import protocols
from dlplora.reporting.schema import Record, TaskResult, to_json

ROOT = Path(__file__).resolve().parents[2]


def record(method: str, metrics: dict[str, float], kind: str = "gen", **changes: object) -> Record:
    task = TaskResult(kind=kind, version="1", num=4, metrics=metrics, stderr=dict.fromkeys(metrics))  # type: ignore[arg-type]
    plain = Record(
        suite="nano",
        protocol_name="nano",
        protocol={},
        protocol_hash="",
        method_name=method,
        method={"method": method},
        method_hash=method,
        seed=0,
        backbone={"sha256": "b"},
        pool_hash="p",
        artifact_hashes={},
        tasks={"t": task},
        suite_tasks=["t"],
        routing={},
        latency=None,
        backend="dense",
        timings_s={},
        provenance={},
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


SELF = {"self_bleu": 0.5, "self_rouge": 0.75}
"""Harmonic mean 2 · 0.5 · 0.75 / 1.25 = 0.6."""


def test_equal_models_stand_side_by_side() -> None:
    standard = [
        record("base", {"exact_match": 0.0, "bleu": 1.5, "rougeL": 0.25}),
        record("dlp", {"exact_match": 0.5, "bleu": 40.0, "rougeL": 0.75}, pool_hash="another pool"),
    ]
    released = [
        record(
            "base", {"exact": 0.25, "char_bleu": 0.625, "rougeL": 0.5, "repeated_char_bleu": 0.5, **SELF}, protocol_name="released_code"
        ),
        record("dlp", {"exact": 1.0, "char_bleu": 1.0, "rougeL": 1.0, "repeated_char_bleu": 0.9}, protocol_name="released_code"),
    ]
    lines = protocols.suite_table(standard, released).splitlines()
    assert len(lines) == 3  # the pools of dlp differ, so it is not shown
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["`base`", "", "", "", "", "0.0", "25.0", "1.5", "62.5", "60.0", "25.0", "50.0", "50.0"]


def test_records_of_the_released_code_lie_apart_from_the_leaderboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = record("base", {"exact": 1.0}, protocol_name="released_code", cell="abc")
    assert protocols.record_path(done, tmp_path) == tmp_path / "released_code" / "nano" / "base-abc-s0.json"
    limited = dataclasses.replace(done, limit=3)
    assert protocols.record_path(limited, tmp_path) == tmp_path / "scratch" / "released_code" / "nano" / "base-abc-s0.json"
    assert protocols.build(tmp_path) == []
    write_atomically(protocols.record_path(done, tmp_path), to_json(done))
    ours = record("base", {"exact_match": 0.0}, cell="def")
    write_atomically(tmp_path / "runs" / "nano" / "base-def-s0.json", to_json(ours))
    assert protocols.build(tmp_path) == [tmp_path / "tables" / "protocols.md"]
    assert protocols.build(tmp_path, check=True) == []
    table = tmp_path / "tables" / "protocols.md"
    text = table.read_text()
    assert "| `base` |" in text
    table.unlink()
    assert main(["report", "all", "--out", str(tmp_path)]) == 0
    assert table.read_text() == text
    for name in ("compare-protocols", "protocols"):  # the old name is still understood, and not listed
        assert main(["report", name, "--out", str(tmp_path), "--check"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    listed = capsys.readouterr().out
    assert re.search(r"^ +compare-protocols ", listed, re.MULTILINE)
    assert not re.search(r"^ +protocols\b", listed, re.MULTILINE)


def test_ac_f1_of_stored_records_is_the_harmonic_mean_task_by_task() -> None:
    """Values of seed 0 over the 18 multiple-choice tasks, worked out by hand from the records."""
    table = protocols.page(ROOT / "results")
    column = [title.strip() for title in next(line for line in table.splitlines() if line.startswith("| method")).split("|")].index(
        "released: MCQ AC_F1 %"
    )
    rows = {line.split("`")[1]: line.split("|")[column].strip() for line in table.splitlines() if line.startswith("| `")}
    assert {name: rows[name] for name in ("base", "avg_delta", "mole", "multitask", "dlp")} == {
        "base": "43.4", "avg_delta": "45.3", "mole": "56.6", "multitask": "75.9", "dlp": "97.2",
    }  # fmt: skip
    assert "possible reading" in table


def test_the_committed_table_is_what_the_records_say() -> None:
    assert protocols.build(ROOT / "results", check=True) == []
