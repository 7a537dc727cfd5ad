"""Sweep files and the numbers of others: read strictly, drawn where they have something to show, never mixed with measured ones."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlplora.cli.main import main
from dlplora.errors import RecordError
from dlplora.reporting import reported as others
from dlplora.reporting import sweep_figures, tables
from dlplora.reporting.groups import group
from dlplora.reporting.store import OutcomeReader, load_all
from dlplora.reporting.sweeps import Point, SweepFile, load_sweeps, read_sweep, sweep_path, write_sweep
from tests.unit.test_comparison import saved

ROOT = Path(__file__).resolve().parents[2]


def point(sweep: str, series: str, x: float, right: float | None, order: int = 0) -> Point:
    return Point(sweep=sweep, series=series, x=x, num=8, metrics={"right": right, "right_stderr": 0.01}, settings={"order": order})


SWEEP = SweepFile(
    name="selection",
    suite="toy",
    limit=4,
    points=(
        point("p", "nucleus", 0.6, 0.9), point("p", "nucleus", 0.3, 0.8), point("flips", "dlp", 0.0, 0.9),
        point("weighting", "sum", 0.0, 0.7), point("experts", "dlp", 2, 0.9), point("experts", "dlp", 2, 0.7, 1),
    ),
)  # fmt: skip


def test_a_sweep_survives_its_file(tmp_path: Path) -> None:
    path = write_sweep(SWEEP, tmp_path)
    assert path == sweep_path("toy", "selection", tmp_path)
    assert read_sweep(path) == SWEEP
    assert [one.x for one in SWEEP.of("p")["nucleus"]] == [0.3, 0.6]
    assert len(path.read_text().splitlines()) < 20  # one point a line


def test_curves_average_the_orders_of_a_pool() -> None:
    ((x, mean, error),) = sweep_figures._average(SWEEP.of("experts")["dlp"], "right")
    assert (x, mean) == (2, pytest.approx(0.8))
    assert error == pytest.approx(0.1)  # sample deviation 0.1414 over root 2
    ((_, _, own),) = sweep_figures._average([point("p", "s", 1, 0.5)], "right")
    assert own == 0.01
    assert sweep_figures._average([point("p", "s", 1, None)], "right") == []


def test_every_sweep_figure_draws_what_it_has_and_nothing_else() -> None:
    for name, figure in sweep_figures.SWEEP_FIGURES.items():
        assert figure([]) is None, name
        drawn = figure([SWEEP])
        assert drawn is not None, name
    axes = sweep_figures.quality_against_p([SWEEP]).axes[0]
    (line,) = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert line.get_ydata().tolist() == [80.0, 90.0]
    sweep_figures.pyplot().close("all")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw.update(format=9), "format 1"),
        (lambda raw: raw.pop("limit"), r"missing required key\(s\): limit"),
        (lambda raw: raw["points"][1].pop("x"), r"points\[1\]: missing required key\(s\): x"),
        (lambda raw: raw["points"][1].update(xx=1), r"points\[1\]: unknown key 'xx'"),
        (lambda raw: raw["points"][0]["metrics"].update(right=math.nan), r"field 'points\[0\]\.metrics\.right' is nan"),
        (lambda raw: raw["points"][0].update(num="8"), r"'points\[0\]\.num' must be int, got '8'"),
        (lambda raw: raw.update(points={}), "format 1"),
    ],
)
def test_damaged_sweeps_are_named_and_the_rest_is_read(tmp_path: Path, damage: Any, message: str) -> None:
    path = write_sweep(SWEEP, tmp_path)
    raw = json.loads(path.read_text())
    damage(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(RecordError, match=message) as caught:
        read_sweep(path)
    assert str(path) in str(caught.value)
    write_sweep(dataclasses.replace(SWEEP, name="other"), tmp_path)
    found, problems = load_sweeps("toy", tmp_path)
    assert [one.name for one in found] == ["other"]
    assert len(problems) == 1


def test_nan_is_never_written_to_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="not results"):
        write_sweep(dataclasses.replace(SWEEP, points=(point("p", "s", 1, math.nan),)), tmp_path)
    assert not sweep_path("toy", "selection", tmp_path).exists()


def test_a_damaged_sweep_is_exit_1_and_the_figures_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, "dlp", {"a": 0.9, "b": 0.9, "g": 0.8})
    write_sweep(SWEEP, tmp_path)
    (tmp_path / "sweeps" / "toy_broken.json").write_text("{")
    assert main(["report", "figures", "--out", str(tmp_path), "--suite", "toy"]) == 1
    assert "toy_broken.json: not JSON" in capsys.readouterr().err
    assert {"toy_radar.svg", "toy_quality_against_p.png"} <= {path.name for path in (tmp_path / "figures").iterdir()}


def test_committed_sweeps_are_sound() -> None:
    found, problems = load_sweeps("nano", ROOT / "results")
    assert problems == []
    assert {one.name for one in found} >= {"selection"}


def test_reported_numbers_have_source_setting_and_evidence() -> None:
    for one in others.reported():
        assert all((one.method, one.setting, one.metric, one.source)), one
        assert one.url.startswith("https://")
    by_evidence = {one.evidence for one in others.reported()}
    assert by_evidence == {"abstract", "repository", "second-hand"}
    (v2,) = [one for one in others.reported() if "version 2" in one.source and one.metric == "BLEU"]
    assert (v2.value, v2.text, v2.evidence) == (54.1, "54.1", "abstract")  # abstract of arXiv:2410.01497v2
    (ratio,) = [one for one in others.reported() if "version 2" in one.source and one.metric == "ratio"]
    assert ratio.text == "< 2"


def test_reported_numbers_stand_apart_from_measured_ones(tmp_path: Path) -> None:
    page = others.reported_page()
    assert page.startswith(f"# {others.HEADING}")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) == len(others.reported())
    assert all(re.search(r"\| \*[<>≤ ]*[\d.]+\* \| (abstract|repository|second-hand) \|", row) for row in rows)
    saved(tmp_path, "dlp", {"a": 0.9, "b": 0.9, "g": 0.8})
    measured = tables.page(group(load_all(tmp_path)[0], OutcomeReader(tmp_path)), "toy")
    assert "reported" not in measured.lower()
    assert "92.34" not in measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["values"][0].update(source="nobody"), r"values\[0\]: source 'nobody'"),
        (lambda raw: raw["values"][0].pop("metric"), r"values\[0\]: .*'metric'"),
        (lambda raw: raw["values"][2].update(colour="red"), r"values\[2\]: .*'colour'"),
        (lambda raw: next(iter(raw["sources"].values())).update(evidence="hearsay"), "evidence must be one of"),
    ],
)
def test_a_wrong_entry_is_named(change: Any, message: str) -> None:
    raw = yaml.safe_load((ROOT / "dlplora" / "reporting" / "reported.yaml").read_text(encoding="utf-8"))
    change(raw)
    with pytest.raises(RecordError, match=message):
        others.parse(raw, "x.yaml")
