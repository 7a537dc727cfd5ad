"""Parts that the data modules share: tasks, seed, and the share of an optimiser step that a process and a batch have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L

from dlplora.errors import ConfigError
from dlplora.tasks.registry import get_suite
from dlplora.tasks.types import Suite

MAX_ROWS = 1_000_000
"""Largest batch. The rows of a task repeat, so a mistyped number would be filled endlessly."""


def select_tasks(suite: str, tasks: str | Sequence[str], data_root: str | None) -> Suite:
    """The named tasks of a suite, in the order given; ``all`` keeps the suite's order. Text may list names with commas.

    Raises:
        TaskError: If the suite or a task is unknown.
        ConfigError: If no task is named.
    """
    whole = get_suite(suite, data_root)
    if tasks == "all":
        return whole
    names = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else [str(name) for name in tasks]
    if not names or not all(names) or len(set(names)) != len(names):
        raise ConfigError(f"data: 'tasks' must be 'all' or distinct task names, got {tasks!r}.")
    return whole.select(names)


class SuiteDataModule(L.LightningDataModule):
    """What all data modules share: the suite, the tokenizer of the module being trained, and this process's share."""

    def __init__(self) -> None:
        super().__init__()
        self.suite: Suite | None = None

    @property
    def seed(self) -> int:
        """Seed of items and order."""
        return 0 if self.hparams["seed"] is None else int(self.hparams["seed"])

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the Lightning module being trained."""
        return self.trainer.lightning_module.tokenizer  # type: ignore[union-attr]

    @property
    def pad_id(self) -> int:
        """Padding id; 0 if the tokenizer has none, since padded positions are never read."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def _require(self, name: str, minimum: int = 1) -> None:
        value = self.hparams[name]
        if value < minimum:
            raise ConfigError(f"data: '{name}' must be at least {minimum}, got {value}.")
        if name == "batch_size" and value > MAX_ROWS:
            raise ConfigError(f"data: '{name}' must be at most {MAX_ROWS:,}, got {value}.")

    @property
    def num_processes(self) -> int:
        """Processes that share a batch.

        Raises:
            ConfigError: If a batch has fewer rows than there are processes.
        """
        world = int(self.trainer.world_size) if self.trainer is not None else 1
        if world > self.hparams["batch_size"]:
            raise ConfigError(
                f"data: a batch of {self.hparams['batch_size']} rows cannot be shared by {world} processes. Raise batch_size."
            )
        return world

    def _share(self, rows: Sequence[Any]) -> Sequence[Any]:
        """This process's rows of a global batch."""
        world = self.num_processes
        return rows if world == 1 else rows[self.trainer.global_rank :: world]  # type: ignore[union-attr]

    def _epoch(self) -> int:
        return int(self.trainer.current_epoch) if self.trainer is not None else 0

    @property
    def _num_parts(self) -> int:
        """Parts that a step's loss is averaged over: the trainer divides by the accumulated batches, DDP by the processes."""
        return self.num_processes * self._num_accumulated

    @property
    def _num_accumulated(self) -> int:
        return int(getattr(self.trainer, "accumulate_grad_batches", 1))  # there may be no trainer

    def batches_trained(self) -> int:
        """Training batches of the optimiser steps taken so far; the last step of an epoch may have fewer of them."""
        assert self.trainer is not None
        length = int(self.trainer.num_training_batches)
        epochs, steps = divmod(self.trainer.global_step, math.ceil(length / self._num_accumulated))
        return epochs * length + steps * self._num_accumulated

    def _accumulated(self, step: int, num_steps: int) -> range:
        """The batches of the optimiser step that batch ``step`` belongs to; the last one of an epoch may have fewer.

        Args:
            step: Counted over all epochs.
            num_steps: Batches per epoch of the loader.
        """
        size = self._num_accumulated
        if size == 1:
            return range(step, step + 1)
        start, local = step - step % num_steps, step % num_steps
        first = local - local % size
        last = min(first + size, int(min(num_steps, self.trainer.num_training_batches)))  # type: ignore[union-attr]
        return range(start + first, start + last)
