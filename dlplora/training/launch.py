"""``dlplora fit | validate | test``: LightningCLI with our defaults, short errors, and resuming from the newest valid file.

A run is fully described by its YAML file and the overrides; the resolved configuration is written next to the logs. Progress goes to
standard error, and the last line on standard output is JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from dlplora.config import require_writable
from dlplora.errors import ConfigError, one_line
from dlplora.training.checkpoints import AtomicCheckpointIO, ResumableModule, ResumeCheckpoint, find_latest
from dlplora.training.config_check import check_command_line, first_reason
from dlplora.training.failures import configuration_error, writers_without_tracebacks
from dlplora.training.progress_callback import TrainingProgress

COMMANDS = ("fit", "validate", "test")
CHECKPOINT_WORDS = (None, "last", "best", "hpc")
"""Values of ``ckpt_path`` that name no file."""


class TrainingCLI(LightningCLI):
    """LightningCLI in which the configuration alone defines the run: a checkpoint never overrides it."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Commands and the arguments of the trainer's methods that are not options."""
        skipped = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule", "weights_only"}
        return dict.fromkeys(COMMANDS, skipped)

    def _parse_ckpt_path(self) -> None:
        """Do not read hyper-parameters from checkpoints."""

    def _set_seed(self) -> None:
        """As Lightning does; a seed that numpy does not take is the user's error, also one in ``PL_GLOBAL_SEED``."""
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigError(f"seed_everything: {error}.") from error

    def before_instantiate_classes(self) -> None:
        """Give the run's seed to every part that has none of its own; add progress, loggers and resume files."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        given = config.get("ckpt_path")
        if given not in CHECKPOINT_WORDS and not str(given).startswith("registry") and not Path(str(given)).is_file():
            raise ConfigError(f"checkpoint not found: {given}. Pass an existing file, or 'last'.")
        if self.subcommand == "fit":
            require_writable(config.get("trainer.default_root_dir") or ".", "trainer.default_root_dir")
            require_writable(config.get("model.init_args.export_folder") or ".", "model.init_args.export_folder")
        seed = config.get("seed_everything")
        for part in ("model", "data"):
            arguments = config.get(f"{part}.init_args")
            if arguments is not None and "seed" in arguments and arguments["seed"] is None:
                arguments["seed"] = int(seed) if seed is not None else 0

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The configured trainer with an atomic checkpoint writer, our loggers and our progress."""
        trainer = self._get(self.config_init, "trainer", default={})
        root = Path(trainer.get("default_root_dir") or ".")
        callbacks = trainer.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if trainer.get("logger") in (None, True):
            fitting = self.subcommand == "fit" and not trainer.get("fast_dev_run")
            kwargs["logger"] = [CSVLogger(root, name="logs"), TensorBoardLogger(root, name="tensorboard")] if fitting else False
        if trainer.get("enable_progress_bar") is not False:
            # Lightning's bars write to standard output and draw nothing in a file
            kwargs["enable_progress_bar"] = False
            callbacks.append(TrainingProgress())
        plugins = trainer.get("plugins") or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        for key in ("accumulate_grad_batches", "val_check_interval"):  # Lightning divides by them
            if isinstance(given := trainer.get(key), (int, float)) and not given > 0:
                raise ConfigError(f"trainer: '{key}' must be more than 0, got {given}.")
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"trainer: {one_line(error)}") from error

    def before_fit(self) -> None:
        """Report the start: making the rows and loading the base model may take a minute."""
        if self.trainer.is_global_zero and any(isinstance(one, TrainingProgress) for one in self.trainer.callbacks):  # type: ignore[attr-defined]
            print("fit: preparing data and model", file=sys.stderr, flush=True)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit" and kwargs.get("ckpt_path") != "last":
            if kwargs.get("ckpt_path"):  # before anything is written
                AtomicCheckpointIO().load_checkpoint(kwargs["ckpt_path"])
            return kwargs
        if kwargs.get("ckpt_path") in (None, "last"):
            kwargs["ckpt_path"] = self._latest(subcommand)
        return kwargs

    def _latest(self, subcommand: str) -> str | None:
        """The newest readable checkpoint of the run's folder; without one ``fit`` starts afresh and the others stop."""
        resume = next((one for one in self.trainer.callbacks if isinstance(one, ResumeCheckpoint)), ResumeCheckpoint())  # type: ignore[attr-defined]
        folder = resume.directory(self.trainer)
        path = find_latest(folder)
        if path is None and subcommand != "fit":
            raise ConfigError(f"no readable checkpoint in {folder}. Train first (dlplora fit), or pass --ckpt_path FILE.")
        print(f"resuming from {path}" if path else f"no checkpoint in {folder} yet: starting afresh", file=sys.stderr)
        return None if path is None else str(path)


def quieten() -> None:
    """Keep other packages' advice off the terminal; warnings and errors of our own stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.seed",
        "lightning.pytorch.accelerators.cuda",
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
        "lightning.pytorch.trainer.connectors.signal_connector",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for message in (
        "LightningCLI's args parameter",  # the command's own arguments are handed on
        "`isinstance\\(treespec",
        "It is recommended to use `self.log.*sync_dist",  # the metrics are TorchMetrics, which have summed over processes already
        "The number of training batches",
        "Found .* module\\(s\\) in eval mode",  # the frozen base model is meant to be
        "The '.*_dataloader' does not have many workers",  # batches are ready-made tensors
    ):
        warnings.filterwarnings("ignore", message=".*" + message)


def run(arguments: Sequence[str]) -> int:
    """Run one command; ``arguments`` begins with ``fit``, ``validate`` or ``test``.

    Returns:
        The exit code: 0.

    Raises:
        ConfigError: For bad configuration, with a text of one line.
    """
    check_command_line(arguments)
    quieten()
    options: dict[str, Any] = {"parser_mode": "omegaconf", "exit_on_error": False, "prog": "dlplora"}
    try:
        with writers_without_tracebacks():
            cli = TrainingCLI(
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                trainer_defaults={"max_epochs": 1},
                parser_kwargs={**options, **{command: {**options, "prog": f"dlplora {command}"} for command in COMMANDS}},
                save_config_kwargs={"overwrite": True},
                load_from_checkpoint_support=False,
                auto_configure_optimizers=False,
                args=list(arguments),
            )
    except ArgumentError as error:
        raise ConfigError(first_reason(str(error))) from error
    except (ValueError, ModuleNotFoundError) as error:
        own = configuration_error(error)
        if own is None:
            raise
        raise ConfigError(str(own)) from error
    except MisconfigurationException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if cli.subcommand == "fit" and not cli.trainer.global_step:
        raise ConfigError("nothing was trained: max_epochs, max_steps or limit_train_batches of the trainer leave no step.")
    if cli.trainer.is_global_zero:
        print(json.dumps(summary(cli)))
    return 0


def summary(cli: TrainingCLI) -> dict[str, Any]:
    """What a finished command reports: steps, metrics averaged over tasks, and where things were written."""
    found = cli.model.final_metrics() if isinstance(cli.model, ResumableModule) else cli.trainer.callback_metrics
    metrics = {key: round(float(value), 6) for key, value in found.items() if "/" not in key}
    export = getattr(cli.model, "export_folder", None)
    return {
        "command": cli.subcommand,
        "steps": cli.trainer.global_step if cli.subcommand == "fit" else None,
        "metrics": metrics,
        "export": str(export) if export and cli.subcommand == "fit" else None,
        "root": str(cli.trainer.default_root_dir),
    }
