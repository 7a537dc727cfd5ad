"""The trained part of a trial: the method's gates, trained with the trial's settings, with early stopping and the common token cap."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dlplora.documents import read_json
from dlplora.errors import ConfigError, NotFiniteError
from dlplora.evaluation.runner import Run
from dlplora.reproduce.artifacts import artifact_dir
from dlplora.reproduce.recipe import TRAINED, Setting
from dlplora.reproduce.training import train
from dlplora.tuning.grid import TRAINING_SETTINGS

if TYPE_CHECKING:
    from dlplora.tuning.trial_jobs import TrialJob

FAILURE = "failure.json"
"""As ``training.early_stopping`` writes it."""
CHECK_EVERY = 0.125
"""Share of a whole training between two validations."""
PATIENCE = 3
"""Validations without improvement that end a training."""


def retrained(one: TrialJob, folder: Path) -> Run:
    """The trial's run with gates trained for it; a call that was interrupted continues.

    Args:
        one: The trial.
        folder: Of the training.

    Raises:
        NotFiniteError: If the training diverged.
        ConfigError: If it failed for another reason, which its message names.
        KeyboardInterrupt: If it was interrupted.
    """
    run, role = one.run, f"{TRAINED}{one.run.spec.name}"
    note = artifact_dir(folder, run.seed) / f"{role}_training" / FAILURE
    note.unlink(missing_ok=True)
    try:
        trained = train(role, folder, seed=run.seed, pool=run.folders.get("pool"), setting=_setting(one))
    except ConfigError as error:
        if not note.is_file():
            raise
        told = read_json(note)
        raise (NotFiniteError if told["diverged"] else ConfigError)(told["reason"]) from error
    return replace(run, folders={**run.folders, "trained": trained})


def _setting(one: TrialJob) -> Setting:
    """Base model, tasks and options of the training command."""
    protocol = one.run.protocol
    values = {name: one.choice.training.get(name) for name in TRAINING_SETTINGS}
    options = list(one.budget.options)
    options += [f"--{'.'.join(TRAINING_SETTINGS[name])}={value}" for name, value in values.items() if value is not None]
    options += [
        f"--data.init_args.max_tokens={one.budget.max_tokens}",
        f"--model.init_args.method_params={json.dumps({**one.run.spec.params})}",
        f"--model.init_args.dtype={protocol.dtype}",
        f"--trainer.val_check_interval={CHECK_EVERY}",
        "--trainer.callbacks+=dlplora.training.early_stopping.KeepBest",
        f"--trainer.callbacks.patience={PATIENCE}",
    ]
    if protocol.tasks is not None:
        options.append(f"--data.init_args.tasks={','.join(protocol.tasks)}")
    return Setting(
        backbone=protocol.backbone,
        suite=protocol.suite,
        data_root=protocol.data_root,
        tasks=None if protocol.tasks is None else tuple(protocol.tasks),
        configs={"trained": one.budget.config},
        options={"trained": options},
    )
