"""Plans and workers: what is planned, in which order it is done, what is refused, and what a worker leaves when it is stopped."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlplora.cli.main import main
from dlplora.errors import ConfigError
from dlplora.interruption import Terminated
from dlplora.matrix import slurm, worker
from dlplora.matrix.board import Board
from dlplora.matrix.cells import CellRunner, Outcome
from dlplora.matrix.plan import Cell, Plan, Request, make_header, read_plan, write_plan
from dlplora.matrix.worker import Limits, by_rank, work
from dlplora.reporting.store import load_all
from dlplora.reproduce import training

Doing = Callable[[Cell, Path], Outcome]


def cell(name: str, *after: str, minutes: float | None = None) -> Cell:
    return Cell(id=name, kind="evaluate", profile="p", name=name, seed=0, after=list(after), minutes=minutes)


def made(folder: Path, *cells: Cell, **options: Any) -> Plan:
    path = folder / "plan.jsonl"
    write_plan(path, make_header(Request(profiles=["p"], **options), {"p": "hash"}, cells), cells)
    return read_plan(path)


@pytest.fixture
def doing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Doing], list[str]]:
    """Cells are done by a function of the test; returns the list of those that were begun."""

    def install(do: Doing) -> list[str]:
        begun: list[str] = []

        def noted(self: CellRunner, one: Cell, folder: Path) -> Outcome:
            begun.append(one.id)
            return do(one, folder)

        monkeypatch.setattr(CellRunner, "do", noted)
        monkeypatch.setattr(worker, "subjects_of", lambda request, folder: [])
        monkeypatch.setattr(worker, "require_same_profiles", lambda plan, hashes: None)
        return begun

    return install


def write(one: Cell, folder: Path) -> Outcome:
    (folder / "it").write_text(one.id)
    return Outcome([("it", f"places/{one.id}")])


def quiet(text: str) -> None:
    """Say nothing."""


def test_cells_are_done_once_and_after_what_they_need(tmp_path: Path, doing: Any) -> None:
    plan = made(tmp_path, cell("a"), cell("b", "a"), cell("c", "b"), cell("d"))
    begun = doing(write)
    assert work(plan, quiet, Limits(max_cells=1)).num_done_here == 1
    tally = work(plan, quiet)
    assert (tally.num_done, tally.num_failed, tally.num_left) == (4, 0, 0)
    assert sorted(begun) == ["a", "b", "c", "d"]
    assert begun.index("a") < begun.index("b") < begun.index("c")
    assert sorted(path.name for path in (plan.folder / "places").iterdir()) == ["a", "b", "c", "d"]
    assert work(plan, quiet).num_done_here == 0


def test_long_chains_come_first() -> None:
    cells = [cell("short", minutes=5), cell("a", minutes=1), cell("b", "a", minutes=9), cell("c", minutes=2)]
    assert [one.id for one in by_rank(cells)] == ["a", "b", "short", "c"]


def test_a_failed_cell_blocks_what_needs_it_until_it_is_retried(tmp_path: Path, doing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plan = made(tmp_path, cell("a"), cell("b", "a"), cell("c", "b"), cell("d"))

    def broken(one: Cell, folder: Path) -> Outcome:
        if one.id == "a":
            raise ConfigError("the rows are\nmissing")
        return write(one, folder)

    begun = doing(broken)
    tally = work(plan, quiet)
    assert (tally.num_done, tally.num_failed, tally.num_left, sorted(begun)) == (1, 1, 2, ["a", "d"])
    assert main(["matrix", "status", str(plan.path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "4 cells: 1 done, 0 running, 1 failed, 2 wait for a failed one, 0 to do"
    assert shown[1] == "  failed: evaluate a, p, seed 0: the rows are missing"
    assert work(plan, quiet).num_done_here == 0
    assert main(["matrix", "work", str(plan.path)]) == 1
    doing(write)
    assert main(["matrix", "work", str(plan.path), "--retry-failed"]) == 0
    assert "4 done in all, 0 failed, 0 left" in capsys.readouterr().out


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), SystemExit(-1), OSError(errno.ENOSPC, "No space left on device", "x")])
def test_a_stopped_worker_gives_its_cell_back(tmp_path: Path, doing: Any, fault: BaseException) -> None:
    plan = made(tmp_path, cell("a"))

    def stopped(one: Cell, folder: Path) -> Outcome:
        (folder / "resume").write_text("half")
        raise fault

    doing(stopped)
    with pytest.raises(type(fault)):
        work(plan, quiet)
    seen: list[str] = []

    def resumed(one: Cell, folder: Path) -> Outcome:
        seen.append((folder / "resume").read_text())
        return write(one, folder)

    doing(resumed)
    assert work(plan, quiet).num_done == 1  # at once: no lease has to run out
    assert seen == ["half"]


def test_a_job_that_is_not_queued_again_gives_its_cell_back(tmp_path: Path, doing: Any) -> None:
    """Submitit raises this in its signal handler; the cell is as good as before."""

    class UncompletedJobError(RuntimeError):
        pass

    def stopped(one: Cell, folder: Path) -> Outcome:
        raise UncompletedJobError("timed-out too many times")

    plan = made(tmp_path, cell("a"))
    doing(stopped)
    with pytest.raises(UncompletedJobError):
        work(plan, quiet)
    assert Board(plan.folder, 1).end_of("a", 0)["kind"] == "released"
    doing(write)
    assert work(plan, quiet).num_done == 1


def test_a_cancelled_job_gives_its_cell_back(tmp_path: Path, doing: Any) -> None:
    def cancelled(one: Cell, folder: Path) -> Outcome:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return write(one, folder)

    plan = made(tmp_path, cell("a"))
    doing(cancelled)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # submitit prints that it is bypassed
    try:
        with pytest.raises(Terminated):
            slurm.WorkerJob(str(plan.path), Limits())()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert Board(plan.folder, 1).end_of("a", 0)["kind"] == "released"


def test_files_that_were_removed_are_made_again_if_something_needs_them(tmp_path: Path, doing: Any) -> None:
    plan, told = made(tmp_path, cell("a"), cell("b", "a"), cell("c", "b"), cell("d")), list[str]()
    doing(write)
    assert work(plan, quiet, Limits(max_cells=3)).num_done_here == 3
    (last,) = (one for one in "abcd" if not (plan.folder / "places" / one).exists())
    assert last in {"c", "d"}
    for one in "abd":
        (plan.folder / "places" / one).unlink(missing_ok=True)
    begun = doing(write)
    tally = work(plan, told.append)
    assert (tally.num_done, tally.num_failed) == (4, 0)
    assert sorted(begun) == (["a", "b", "c"] if last == "c" else ["d"])  # nothing needs `d`, or all that needs `a` is done
    assert any("is done again" in line for line in told) is (last == "c")


def test_a_plan_works_where_its_folder_was_moved_to(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    options = ["--methods", "base", "--tasks", "pick_food", "--limit", "2"]
    command = ["matrix", "plan", "nano", *options, "--out", str(tmp_path / "old/it.jsonl"), "--results", str(tmp_path / "old/res")]
    assert main(command) == 0
    os.rename(tmp_path / "old", tmp_path / "new")
    assert main(["matrix", "work", str(tmp_path / "new/it.jsonl"), "--device", "cpu"]) == 0
    assert len(load_all(tmp_path / "new/res", "nano", "scratch")[0]) == 1
    assert not (tmp_path / "old").exists()


def test_a_fault_of_the_program_is_noted_and_shown(tmp_path: Path, doing: Any) -> None:
    plan = made(tmp_path, cell("a"))

    def faulty(one: Cell, folder: Path) -> Outcome:
        raise TypeError("a bug")

    doing(faulty)
    with pytest.raises(TypeError):
        work(plan, quiet)
    assert Board(plan.folder, 1).end_of("a", 0)["reason"] == "TypeError: a bug"


def test_a_worker_that_loses_its_cell_stops_and_goes_on(tmp_path: Path, doing: Any) -> None:
    plan = made(tmp_path, cell("a"), cell("b"), lease_s=1.0)
    told: list[str] = []

    def slow(one: Cell, folder: Path) -> Outcome:
        if one.id == "b":
            return write(one, folder)
        other = Board(plan.folder, 1.0)
        lease = other.claim("a", 1, "two")
        assert lease is not None
        lease.finish({"attempt": 1, "moves": []})
        until = time.monotonic() + 20
        while time.monotonic() < until:
            time.sleep(0.01)
        raise AssertionError("nobody stopped it")

    doing(slow)
    before = signal.getsignal(worker.TAKEN)
    tally = work(plan, told.append)
    assert (tally.num_done, tally.num_done_here) == (2, 1)
    assert "evaluate a, p, seed 0: given up, taken over by two" in told
    assert signal.getsignal(worker.TAKEN) == before


def test_a_cell_that_kills_its_workers_fails(tmp_path: Path, doing: Any) -> None:
    plan = made(tmp_path, cell("a"), max_deaths=2)
    board = Board(plan.folder, 1)
    for attempt in (0, 1):
        assert board.claim("a", attempt, "dead") is not None
    clock = iter(range(0, 10_000, 100))
    begun = doing(write)
    unseen = worker.Board

    def impatient(folder: Path, lease_s: float) -> Board:
        return unseen(folder, lease_s, lambda: float(next(clock)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "Board", impatient)
        patch.setattr(worker.time, "sleep", lambda seconds: None)
        tally = work(plan, quiet)
    assert (tally.num_failed, begun) == (1, [])
    assert "2 workers died during it" in Board(plan.folder, 1).end_of("a", 2)["reason"]
    assert work(plan, quiet, Limits(retry_failed=True)).num_done == 1  # the deaths before the failure do not count again


def planned(folder: Path, *options: str) -> list[Cell]:
    assert main(["matrix", "plan", "nano", "--out", str(folder / "it.jsonl"), *options]) == 0
    return list(read_plan(folder / "it.jsonl").cells)


def test_the_nano_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = planned(tmp_path, "--methods", "base,dlp,meteora_gate", "--seeds", "0,1", "--experts-per-cell", "13")
    names = [(one.kind, one.name.split(",")[0], one.seed) for one in cells]
    experts = [one.name.split(",") for one in cells if one.kind == "experts"]
    assert [len(some) for some in experts] == [13, 13]
    first = [experts[0][0], experts[1][0]]
    # seed 0 has shipped artifacts but for the router; seed 1 has none
    assert names == [
        ("artifact", "router", 0), ("evaluate", "base", 0), ("evaluate", "dlp", 0), ("evaluate", "meteora_gate", 0),
        ("experts", first[0], 1), ("experts", first[1], 1), ("artifact", "pool", 1), ("artifact", "router", 1),
        ("artifact", "trained/meteora_gate", 1), ("evaluate", "base", 1), ("evaluate", "dlp", 1), ("evaluate", "meteora_gate", 1),
    ]  # fmt: skip
    by_name = {(one.name, one.seed): one for one in cells}
    pool, router, gate = (by_name[role, 1] for role in ("pool", "router", "trained/meteora_gate"))
    assert pool.after == [cells[4].id, cells[5].id]
    assert gate.after == [pool.id]
    assert router.after == []
    assert by_name["dlp", 1].after == [pool.id, router.id]
    assert by_name["base", 0].after == []
    assert all(one.minutes is not None for one in cells)
    again = planned(tmp_path, "--methods", "dlp,base", "--seeds", "1", "--experts-per-cell", "13", "--limit", "5")
    # the same trainings, whatever else is planned; another limit makes other evaluations
    assert {one.id for one in again} & {one.id for one in cells} == {one.id for one in again if one.kind != "evaluate"}
    assert "evaluate: 2 cells" in capsys.readouterr().out


@pytest.fixture
def profile(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump({"suite": "paper_local", "batch_size": 8}))
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump({"protocol": str(tmp_path / "protocol.yaml"), "backbone": str(tiny_llama_folder), "methods": ["base"]}))
    rows = tmp_path / "rows" / "winowhy"
    rows.mkdir(parents=True)
    for split, start in (("train", 0), ("test", 100)):
        lines = [{"question": f"who likes {n} dog", "choices": ["yes", "no"], "answer": n % 2} for n in range(start, start + 20)]
        (rows / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    assert main(["matrix", *command]) == 2
    shown = capsys.readouterr()
    assert len(shown.err.strip().splitlines()) == 1
    return shown.err


def test_what_changed_since_the_plan_is_refused(profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.jsonl"
    options = ["--data-root", str(tmp_path / "rows"), "--tflops", "1"]
    assert main(["matrix", "plan", str(profile), "--out", str(path), *options]) == 0
    cells = read_plan(path).cells
    assert [one.kind for one in cells] == ["experts", "artifact", "evaluate"]
    assert all(one.minutes is not None for one in cells)
    text = path.read_text()

    profile.write_text(profile.read_text() + "processes: 2\n")
    assert "has changed since" in refused(capsys, "work", str(path))
    profile.write_text(profile.read_text().replace("processes: 2\n", ""))
    rows = tmp_path / "rows" / "winowhy" / "test.jsonl"
    rows.write_text(rows.read_text().replace("dog", "cat"))
    assert "has changed since" in refused(capsys, "work", str(path))

    header = json.loads(text.splitlines()[0])
    header["versions"]["torch"] = "1.0.0"
    path.write_text("\n".join([json.dumps(header), *text.splitlines()[1:]]))
    assert "was made with torch 1.0.0" in refused(capsys, "work", str(path))
    path.write_text("\n".join(text.splitlines()[:-1]))
    assert "its 2 cells are not the 3" in refused(capsys, "status", str(path))
    path.write_text(text[:-40])
    assert "not JSON" in refused(capsys, "work", str(path))
    assert "expected a plan" in refused(capsys, "work", str(rows))
    assert not path.with_suffix(".work").exists() or not list((path.with_suffix(".work")).glob("claims/*"))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("nowhere --out x.jsonl", "unknown base model 'nowhere'"),
        ("nao --out x.jsonl", "unknown base model 'nao'. Did you mean 'nano'?"),
        ("nano --out x.txt", "must end in .jsonl"),
        ("nano,nano --out x.jsonl", "each once"),
        ("nano --out x.jsonl --lease 0", "'lease_s' must be at least 1"),
        ("nano --out x.jsonl --limit 0", "limit must be from 1 to"),
        ("nano --out x.jsonl --methods dpl", "Did you mean 'dlp'"),
        ("nano --out x.jsonl --tasks pick_foot", "Did you mean 'pick_food'"),
        ("nano --out /proc/x.jsonl", "cannot write in"),
    ],
)
def test_bad_plans_are_refused(options: str, part: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert part in refused(capsys, "plan", *options.split())


def test_a_worker_gives_the_numbers_of_the_command(tmp_path: Path) -> None:
    cells = planned(tmp_path, "--methods", "base,avg_delta", "--tasks", "pick_food", "--limit", "2")
    assert main(["matrix", "work", str(tmp_path / "it.jsonl"), "--device", "cpu"]) == 0
    command = [
        "eval",
        "--method",
        "base,avg_delta",
        "--tasks",
        "pick_food",
        "--limit",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "eval"),
    ]
    assert main(command) == 0
    here, there = (
        {one.method_name: (one.tasks, one.cell, one.pool_hash) for one in load_all(root, "nano", "scratch")[0]}
        for root in (tmp_path / "it.work" / "results", tmp_path / "eval")
    )
    assert here == there
    assert len(here) == len(cells) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="a training is tied to its parent on Linux only")
def test_a_training_does_not_die_of_the_schedulers_signal() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1); print('alive')"
    process = training._start([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.communicate()[0] == b"alive\n"
