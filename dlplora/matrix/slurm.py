"""Workers as Slurm jobs, through submitit: an array of equal jobs that work on the same plan.

Slurm announces a preemption (or the end of a job's time) by SIGUSR1. The running training writes its resume file, the cell is given back,
and the job is queued again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dlplora.errors import ConfigError
from dlplora.interruption import Terminated, raising_on_sigterm
from dlplora.matrix.plan import read_plan
from dlplora.matrix.worker import Limits, work

SIGNAL = "USR1"
ENDLESS = 1_000_000
"""How often submitit may queue a job again after a time limit. Its default is three; a long plan has as many time limits as it needs."""
WARNING_S = 120
"""How long before the end of a job the signal comes; a training has a minute to stop."""


class Preempted(Terminated):
    """The scheduler takes the machine away."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources of one job."""

    cluster: str = "slurm"
    """``slurm``, or ``local`` and ``debug`` of submitit for trials."""
    partition: str | None = None
    gpus: int = 0
    cpus: int = 4
    memory_gb: float | None = None
    minutes: int = 240
    workers: int = 1
    """Jobs of the array."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the worker, such as ``module load cuda``."""


@dataclass
class WorkerJob:
    """What a job runs; submitit queues it again by ``checkpoint``."""

    plan: str
    limits: Limits

    def __call__(self) -> dict[str, int]:
        """Work on the plan; returns its status at the end."""
        with raising_on_sigterm():  # submitit ignores it, and the cell of a cancelled job would wait for the end of its lease
            tally = work(read_plan(Path(self.plan)), _tell, self.limits)
        return {"done_here": tally.num_done_here, "done": tally.num_done, "failed": tally.num_failed, "left": tally.num_left}

    def checkpoint(self) -> Any:
        """Called at the signal: the same job again; the exit that follows gives the cell back."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(WorkerJob(self.plan, self.limits))


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def submit(plan: Path, resources: Resources, limits: Limits | None = None) -> list[Any]:
    """Submit workers; returns submitit's jobs.

    Args:
        plan: The plan's file.
        resources: Of each job.
        limits: What each worker takes on.

    Raises:
        ConfigError: If submitit is absent, or the scheduler refuses.
    """
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL  # for jobs on this machine
    try:
        import submitit
        from submitit.core.job_environment import JobEnvironment
    except ModuleNotFoundError as error:
        raise ConfigError("`dlplora matrix submit` needs submitit: pip install 'dlplora[slurm]'. `matrix work` needs nothing.") from error
    if resources.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {resources.workers}.")
    JobEnvironment.USR_SIG = SIGNAL  # submitit may have been imported with another one
    try:
        folder = plan.with_suffix(".work") / "jobs" / "%j"
        executor = submitit.AutoExecutor(folder, resources.cluster, slurm_max_num_timeout=ENDLESS, local_max_num_timeout=ENDLESS)
        executor.update_parameters(**_parameters(resources))
        with executor.batch():
            return [executor.submit(WorkerJob(str(plan.resolve()), limits or Limits())) for _ in range(resources.workers)]
    except (RuntimeError, ValueError, NameError, OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"submitit could not submit to '{resources.cluster}': {' '.join(str(error).split())}") from error


def _parameters(resources: Resources) -> dict[str, Any]:
    given: dict[str, Any] = {
        "name": "dlplora",
        "timeout_min": resources.minutes,
        "gpus_per_node": resources.gpus,
        "cpus_per_task": resources.cpus,
        "tasks_per_node": 1,
        "nodes": 1,
        "mem_gb": resources.memory_gb,
    }
    if resources.cluster == "slurm":
        given |= {
            "slurm_partition": resources.partition,
            "slurm_signal_delay_s": WARNING_S,
            "slurm_additional_parameters": {"requeue": True},
            "slurm_setup": [f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL}", *resources.setup],
        }
    return {name: value for name, value in given.items() if value is not None}


@contextmanager
def requeued_when_preempted() -> Iterator[None]:
    """For ``matrix work`` in a custom job script: SIGUSR1 stops the worker as Ctrl-C does, and Slurm queues the job again."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Preempted

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        yield
    except Preempted:
        job = slurm_job()
        if job is not None:
            subprocess.run(["scontrol", "requeue", job], check=False)
        raise
    finally:
        signal.signal(signal.SIGUSR1, before)


def slurm_job() -> str | None:
    """The job as ``scontrol`` names it; None outside Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
