"""Benchmark processes that take turns on a device, and the record that their groups become."""

from __future__ import annotations

import dataclasses
import select
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.latency_ratios import GroupProcesses
from dlplora.bench.session import run_bench
from dlplora.bench.settings import BenchConfig, Group
from dlplora.bench.turns import Turns
from dlplora.errors import ConfigError, RecordError
from dlplora.provenance import git_state
from dlplora.reporting.latency.records import merge_latency
from dlplora.reporting.latency.tables import markdown

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"experts": (2,), "prompt": (8,), "new_tokens": 3, "repeats": 2, "warmup": 0}
HOLDER = """
import sys, time
from pathlib import Path
from dlplora.bench.turns import Turns
turns = Turns(Path(sys.argv[1]))
print("preparing", flush=True)
sys.stdin.readline()
with turns.timing():
    print("timing", flush=True)
    sys.stdin.readline()
"""


def _say(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def test_nobody_times_before_all_have_prepared_or_beside_another(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "turn")]
    children = [subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [child.stdout for child in children]
    try:
        assert [output.readline() for output in outputs] == ["preparing\n"] * 2  # type: ignore[union-attr]
        _say(children[0])
        assert select.select(outputs, [], [], 0.5)[0] == []  # the other one still prepares
        _say(children[1])
        (timing,) = select.select(outputs, [], [], 60)[0]
        assert timing.readline() == "timing\n"
        (waiting,) = (output for output in outputs if output is not timing)
        assert select.select([waiting], [], [], 0.5)[0] == []
        _say(children[outputs.index(timing)])
        assert waiting.readline() == "timing\n"  # type: ignore[union-attr]
        _say(children[outputs.index(waiting)])
        assert [child.wait(timeout=60) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_a_lock_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used as a lock"):
        Turns(tmp_path / "no" / "turn")


def test_what_is_late_is_not_prepared(tmp_path: Path) -> None:
    turns = Turns(tmp_path / "turn", prepare_seconds=0.0)
    config = BenchConfig(shape="tiny", groups={"a": Group(systems=("base", "dlp"), **SMALL)})  # type: ignore[arg-type]
    record = run_bench(config, turns=turns)
    turns.close()
    assert record.measurements == []
    assert record.skipped == {"a: base": "not prepared within 0 s", "a: dlp (2 experts)": "not prepared within 0 s"}


def test_groups_of_several_processes_become_one_record() -> None:
    one, two = (run_bench(BenchConfig(shape="tiny", groups={name: Group(systems=("base",), **SMALL)})) for name in "ab")  # type: ignore[arg-type]
    grown = {**two.provenance, "hardware": {**two.provenance["hardware"], "memory_bytes": 1}}  # a virtual machine
    merged = merge_latency([one, dataclasses.replace(two, provenance=grown)])
    assert [measurement.group for measurement in merged.measurements] == ["a", "b"]
    assert len(merged.summary) == 2
    assert set(merged.adapters) == {"a", "b"}
    with pytest.raises(RecordError, match="different seed cannot be merged: 0 and 7"):
        merge_latency([one, dataclasses.replace(two, seed=7)])


def test_kernel_times_are_shown_beside_wall_times() -> None:
    group = Group(systems=("base", "dlp"), **SMALL)  # type: ignore[arg-type]
    record = run_bench(BenchConfig(shape="tiny", groups={"a": group}))
    assert "kernels" not in markdown(record)
    base, ours = (
        dataclasses.replace(one, device_s=seconds, floor_s=0.002) for one, seconds in zip(record.measurements, (0.003, 0.006), strict=True)
    )
    lines = markdown(dataclasses.replace(record, measurements=[base, ours])).splitlines()
    assert next(line for line in lines if line.startswith("| system")).endswith(
        "| kernels ms per token | kernels ÷ base | kernels ÷ floor |"
    )
    assert next(line for line in lines if line.startswith("| `dlp`")).endswith("| 6.000 | 2.000 | 3.00 |")


def test_compiled_groups_come_first_and_nobody_starts_while_others_are_ready(tmp_path: Path) -> None:
    compiled, eager = (Group(systems=("base",), compile=(how,), **SMALL) for how in (True, False))  # type: ignore[arg-type]
    config = BenchConfig(shape="tiny", groups={"eager": eager, "one": compiled, "two": compiled})
    children = GroupProcesses(["a", "b"], [config, config], 10.0, tmp_path, None)
    order = [(0, "one"), (1, "one"), (0, "two"), (1, "two"), (0, "eager"), (1, "eager")]
    assert [(index, group) for index, group, _ in children.waiting] == order
    children.waiting = [(index, group, [sys.executable, "-c", "input()"]) for index, group, _ in children.waiting]
    for wave in (order[:3], order[3:4], order[4:]):
        children.step(3)
        children.step(3)
        assert list(children.running) == wave
        children.stop()
        children.running.clear()
    assert children.record(0) is None


def test_a_copy_without_git_is_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlplora.provenance.PACKAGE_ROOT", tmp_path / "dlplora")
    assert git_state() == {"commit": None, "dirty": None}
    monkeypatch.setenv("DLPLORA_COMMIT", "abc")
    assert git_state() == {"commit": "abc", "dirty": None}
