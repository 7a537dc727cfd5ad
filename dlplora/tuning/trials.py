"""The trials of one method: prepared together, run one after the other, each written as soon as it ends."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.adapters.pool import load_pool
from dlplora.config import config_hash, configs_root, find_config, list_configs, load_yaml
from dlplora.errors import ConfigError, DLPLoRAError, NotFiniteError
from dlplora.evaluation.identity import backbone_identity
from dlplora.evaluation.runner import Artifacts, Run, measure, prepare, training_tokens
from dlplora.methods.registry import MethodSpec, method_class
from dlplora.progress import Progress
from dlplora.provenance import provenance
from dlplora.reporting.comparison import MAIN_METRIC
from dlplora.reporting.schema import Record
from dlplora.reporting.tuning import Trial, protocol_folder, read_trial, trial_path, write_trial
from dlplora.tuning.grid import TRAINING_SETTINGS, Choice, Grid, choices

if TYPE_CHECKING:
    from dlplora.evaluation.cache import EvalCache
    from dlplora.evaluation.protocol import Protocol

Say = Callable[[str], None]
TOKEN_CAP = 1_911_450
"""Most tokens that a trial may train on: what the shipped router of the nano suite saw, the most of all methods on top of the experts."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every trained trial gets, whatever the method."""

    max_tokens: int = TOKEN_CAP
    config: str = "fusion"
    """Training configuration."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"--tokens must be at least 1, got {self.max_tokens}.")

    def defaults(self, names: list[str]) -> dict[str, Any]:
        """Values that the training configuration has for some of ``TRAINING_SETTINGS``.

        Raises:
            ConfigError: If the configuration is unknown or does not name one of them.
        """
        path = find_config("train", self.config)
        found = {}
        for name in names:
            value: Any = load_yaml(path)
            for key in TRAINING_SETTINGS[name]:
                value = value.get(key) if isinstance(value, dict) else None
            if value is None:
                raise ConfigError(f"{path}: '{'.'.join(TRAINING_SETTINGS[name])}' is missing; '{name}' has no default to start from.")
            found[name] = value
        return found


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One trial before it is run."""

    choice: Choice
    run: Run
    """Under the validation protocol; of a trial that trains, with the artifacts of the preset until it has its own."""
    trains: bool
    budget: Budget

    def cell(self) -> str:
        """Hash of everything the score depends on."""
        described = self.run.description()
        if self.trains:
            config = load_yaml(find_config("train", self.budget.config))
            described |= {"artifacts": {}, "training": dict(self.choice.training), "max_tokens": self.budget.max_tokens, "config": config}
        return config_hash(described)


def plan(
    spec: MethodSpec,
    grid: Grid,
    protocol: Protocol,
    protocol_name: str,
    seed: int,
    *,
    artifacts: Artifacts | None = None,
    limit: int | None = None,
    device: str | None = None,
    budget: Budget | None = None,
) -> list[Plan]:
    """All trials of a method, checked before the first one starts; arguments as for ``evaluation.runner.prepare``.

    Args:
        spec: The preset.
        grid: Of ``grid.grid_of``.
        protocol: Its split is replaced by ``validation``.
        protocol_name: For the records.
        seed: Of methods that draw random numbers, and of trainings.
        artifacts: Folders.
        limit: Validation questions a task.
        device: Where to run.
        budget: Of trials that train.

    Raises:
        DLPLoRAError: If a value does not fit its setting, or a run is refused.
    """
    budget = budget or Budget()
    cls = method_class(spec.method)
    needs_training = bool(grid.training) or any(name not in cls.evaluation_params for name in grid.params)
    trains = "trained" in cls.metadata.needs and needs_training
    validation = replace(protocol, split="validation")
    shipped = spec.path in (None, configs_root() / "method" / f"{spec.name}.yaml")
    method = spec.name if shipped else str(spec.path)
    plans = []
    for choice in choices(grid, spec, budget.defaults(list(grid.training))):
        common: dict[str, Any] = {"artifacts": artifacts, "limit": limit, "device": device}
        run = prepare(validation, protocol_name, method, seed, method_params=choice.params, **common)
        plans.append(Plan(choice=choice, run=run, trains=trains, budget=budget))
    return plans


def folder_of(run: Run) -> str:
    """Folder of a run's trials below ``tuning/``."""
    shipped = run.protocol_name in list_configs("protocol")
    own = not shipped or load_yaml(find_config("protocol", run.protocol_name)).get("backbone") == run.protocol.backbone
    return protocol_folder(run.protocol_name, own, _backbone(run))


def _backbone(run: Run) -> str:
    return str(backbone_identity(run.protocol.backbone, run.protocol.revision)["name"])


def run_trials(plans: list[Plan], root: Path, runs: Path, say: Say, cache: EvalCache | None = None, *, force: bool = False) -> list[Trial]:
    """Run what has no record yet, and return the trials in the order of the plans.

    A trial that diverges or fails is a record like any other. A repeated call takes up what is finished; what failed for another reason
    than divergence (a full disk, for instance) is tried again.

    Args:
        plans: Of ``plan``.
        root: Results folder.
        runs: Folder of the trainings.
        say: Takes messages.
        cache: What the evaluations share.
        force: Run finished trials again.
    """
    found = []
    for number, one in enumerate(plans, start=1):
        label = f"[{number}/{len(plans)}] {one.run.spec.name} {_spelled(one.choice.settings)}"
        blank = _blank(one)
        path = trial_path(folder_of(one.run), blank, root)
        if path.is_file() and not force and (known := read_trial(path)).status != "failed":
            say(f"{label}: reused {path}")
            found.append(known)
            continue
        say(f"{label} …")
        trial = _run(one, blank, runs, label, cache)
        write_trial(path, trial)
        say(f"{label}: {trial.status if trial.score is None else f'{100 * trial.score:.1f} %'} ({trial.seconds:.0f} s)")
        found.append(trial)
    return found


def _spelled(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _blank(one: Plan) -> Trial:
    run = one.run
    return Trial(
        method=run.spec.name,
        settings=one.choice.settings,
        default=one.choice.default,
        seed=run.seed,
        suite=run.suite.name,
        protocol=run.protocol_name,
        backbone=_backbone(run),
        pool_hash=load_pool(run.folders["pool"]).checksum() if "pool" in run.folders else "",
        limit=run.limit,
        status="failed",
        trained_here=one.trains,
        seconds=0.0,
        cell=one.cell(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _run(one: Plan, blank: Trial, runs: Path, label: str, cache: EvalCache | None) -> Trial:
    """Train if the trial trains, and evaluate; an error ends the trial and becomes its reason."""
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
    except NotFiniteError as error:
        outcome = {"status": "diverged", "reason": _line(error)}
    except (DLPLoRAError, RuntimeError, ArithmeticError) as error:  # torch and numpy raise the latter for numbers out of range
        outcome = {"status": "failed", "reason": _line(error)}
    return replace(blank, **outcome, seconds=round(time.perf_counter() - started, 1), provenance=provenance())


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _scores(record: Record) -> dict[str, Any]:
    scores = {name: task.metrics[MAIN_METRIC[task.kind]] for name, task in record.tasks.items()}
    return {"status": "ok", "scores": scores, "score": sum(scores.values()) / len(scores)}
