"""Workers as Slurm jobs: what reaches the scheduler, what its signal does, and submitit's own executors."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dlplora.cli.main import main
from dlplora.errors import ConfigError
from dlplora.matrix import slurm
from dlplora.matrix.cells import _one_node
from dlplora.matrix.plan import Request, make_header, read_plan, write_plan
from dlplora.matrix.worker import Limits
from dlplora.reporting.store import load_all


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scheduler that keeps the script it is given; returns where."""
    programs, script = tmp_path / "bin", tmp_path / "submitted.sh"
    programs.mkdir()
    for name, line in {"srun": "exit 1", "sbatch": f'cp "$1" {script} && echo Submitted batch job 77'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    return script


def test_what_slurm_is_asked_for(tmp_path: Path, sbatch: Path) -> None:
    pytest.importorskip("submitit", reason="the extra 'slurm' is not installed")
    resources = slurm.Resources(partition="long", gpus=1, cpus=6, memory_gb=24, minutes=90, workers=3, setup=("module load cuda",))
    jobs = slurm.submit(tmp_path / "plan.jsonl", resources, Limits(max_cells=5))
    assert [job.job_id for job in jobs] == ["77_0", "77_1", "77_2"]
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in sbatch.read_text().splitlines() if line.startswith("#SBATCH --")
    )
    wanted = {"partition": "long", "gpus-per-node": "1", "cpus-per-task": "6", "mem": "24GB", "time": "90", "requeue": "", "array": "0-2%3"}
    assert wanted | {"signal": f"USR1@{slurm.WARNING_S}"} == {name: asked[name] for name in (*wanted, "signal")}
    for line in ("module load cuda", "export SUBMITIT_PREEMPT_SIGNAL=USR1"):
        assert line in sbatch.read_text()
    submission = pickle.loads(jobs[0].paths.submitted_pickle.read_bytes())
    assert submission.function == slurm.WorkerJob(str((tmp_path / "plan.jsonl").resolve()), Limits(max_cells=5))
    assert submission._timeout_countdown == slurm.ENDLESS  # with submitit's default a job ends for good at its fourth time limit


@pytest.mark.parametrize("answer", ["echo no such partition >&2; exit 1", "echo something else"])
def test_a_scheduler_that_refuses_is_one_line(tmp_path: Path, sbatch: Path, answer: str) -> None:
    pytest.importorskip("submitit", reason="the extra 'slurm' is not installed")
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\n{answer}\n")
    with pytest.raises(ConfigError, match="submitit could not submit to 'slurm'") as error:
        slurm.submit(tmp_path / "plan.jsonl", slurm.Resources())
    assert "\n" not in str(error.value)


def test_slurms_array_is_not_taken_for_one_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.plugins.environments import SLURMEnvironment

    for name, value in {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "dlplora"}.items():
        monkeypatch.setenv(name, value)
    assert SLURMEnvironment.detect()
    with _one_node():
        assert not SLURMEnvironment.detect()
    assert SLURMEnvironment.detect()


def test_a_preempted_job_is_queued_again(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(slurm.subprocess, "run", lambda command, **options: called.append(command))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    before = signal.getsignal(signal.SIGUSR1)

    def announced() -> None:
        with slurm.requeued_when_preempted():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(5)

    with pytest.raises(slurm.Preempted):
        announced()
    assert called == [["scontrol", "requeue", "77_3"]]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_submitit_starts_workers_here(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra 'slurm' is not installed")
    plan = tmp_path / "it.jsonl"
    assert main(["matrix", "plan", "nano", "--out", str(plan), "--methods", "base,avg_delta", "--tasks", "pick_food", "--limit", "2"]) == 0
    cells = read_plan(plan).cells
    job = slurm.WorkerJob(str(plan), Limits())
    again = job.checkpoint()
    assert dataclasses.asdict(again.function) == dataclasses.asdict(job)
    (job_here,) = slurm.submit(plan, slurm.Resources(cluster="local", minutes=5), Limits(device="cpu"))
    assert job_here.result() == {"done_here": len(cells), "done": len(cells), "failed": 0, "left": 0}
    assert len(load_all(tmp_path / "it.work" / "results", "nano", "scratch")[0]) == len(cells)


def test_without_submitit_the_command_says_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    plan = tmp_path / "plan.jsonl"
    write_plan(plan, make_header(Request(profiles=["p"]), {"p": "hash"}, []), [])
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["matrix", "submit", str(plan)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'dlplora[slurm]'" in line
