"""Run the trials of one method, one after the other; each is written when it ends."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.adapters.pool import load_pool
from dlplora.errors import AdapterError, DLPLoRAError, NotFiniteError, PoolError
from dlplora.evaluation.method_code import method_code
from dlplora.evaluation.runner import measure
from dlplora.evaluation.trained_parts import training_tokens
from dlplora.progress import Progress
from dlplora.provenance import provenance
from dlplora.reporting.comparison import MAIN_METRIC
from dlplora.reporting.schema import Record
from dlplora.reporting.store import outdated
from dlplora.reporting.tuning import Trial, read_trial, trial_path, write_trial
from dlplora.tuning.trial_jobs import TrialJob, folder_of

if TYPE_CHECKING:
    from dlplora.evaluation.cache import EvalCache

Say = Callable[[str], None]


def run_trials(
    jobs: list[TrialJob], root: Path, runs: Path, say: Say, cache: EvalCache | None = None, *, force: bool = False
) -> list[Trial]:
    """Run what has no record yet, and return the trials in the order of the jobs.

    A trial that diverges or fails is a record like any other. A repeated call reuses finished trials; a trial that failed without
    divergence (a full disk, for instance) is repeated.

    Args:
        jobs: Of ``trial_jobs``.
        root: Results folder.
        runs: Folder of the trainings.
        say: Takes messages.
        cache: What the evaluations share.
        force: Run finished trials again.
    """
    found = []
    for number, one in enumerate(jobs, start=1):
        label = f"[{number}/{len(jobs)}] {one.run.spec.name} {_spelled(one.choice.settings)}"
        blank = _blank(one)
        path = trial_path(folder_of(one.run), blank, root)
        if path.is_file() and not force and (known := read_trial(path)).status != "failed":
            reason = outdated(known.provenance, method_code(type(one.run.method)))
            if reason is None:
                say(f"{label}: reused {path}")
                found.append(known)
                continue
            say(f"{label}: not reused: {path} {reason}")
        say(f"{label} …")
        trial = _run(one, blank, runs, label, cache)
        write_trial(path, trial)
        say(f"{label}: {trial.status if trial.score is None else f'{100 * trial.score:.1f} %'} ({trial.seconds:.0f} s)")
        found.append(trial)
    return found


def _spelled(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _blank(one: TrialJob) -> Trial:
    run = one.run
    return Trial(
        method=run.spec.name,
        settings=one.choice.settings,
        default=one.choice.default,
        seed=run.seed,
        suite=run.suite.name,
        protocol=run.protocol_name,
        backbone=run.backbone_name,
        pool_hash=load_pool(run.folders["pool"]).checksum() if "pool" in run.folders else "",
        limit=run.limit,
        status="failed",
        trained_here=one.trains,
        seconds=0.0,
        cell=one.cell(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _run(one: TrialJob, blank: Trial, runs: Path, label: str, cache: EvalCache | None) -> Trial:
    """Train if the trial trains, and evaluate; an error ends the trial and becomes its reason.

    Raises:
        AdapterError, PoolError: If the adapters do not fit: that is so in every trial.
    """
    started = time.perf_counter()
    outcome: dict[str, Any]
    try:
        run = one.run
        if one.trains:
            from dlplora.tuning.retraining import retrained

            run = retrained(one, runs / folder_of(one.run) / run.spec.name / blank.cell)
        with Progress(label, unit="request", brief=True) as progress:
            record, _ = measure(run, cache, progress)
        outcome = _scores(record)
        outcome["tokens_seen"] = training_tokens(run.folders, run.method.artifact_roles)
    except (AdapterError, PoolError):
        raise
    except NotFiniteError as error:
        outcome = {"status": "diverged", "reason": _line(error)}
    except (DLPLoRAError, RuntimeError, ArithmeticError) as error:  # torch and numpy raise the latter for numbers out of range
        outcome = {"status": "failed", "reason": _line(error)}
    made_by = {**provenance(), "method_code": method_code(type(one.run.method))}
    return replace(blank, **outcome, seconds=round(time.perf_counter() - started, 1), provenance=made_by)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _scores(record: Record) -> dict[str, Any]:
    scores = {name: task.metrics[MAIN_METRIC[task.kind]] for name, task in record.tasks.items()}
    return {"status": "ok", "scores": scores, "score": sum(scores.values()) / len(scores)}
