"""Lightning data modules over the tasks of a suite, for experts, pools of experts, fusion methods and routers.

Items are drawn and encoded once, in ``setup``. Which rows form a batch is a pure function of seed and step (``batching``). With several
processes, each takes its share of the same global batch, so the number of processes only changes the order of floating-point sums. The
same holds for ``accumulate_grad_batches``: losses are normalised by the rows or tokens of the whole optimiser step, so a step over several
small batches has the gradient of one large batch. Its rows are split into these batches by length, which saves padding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlplora.data.batching import BatchSchedule, StepLoader, parts_by_length
from dlplora.data.encoding import EncodedItem, EncodedSet, collate, encode_items, encode_texts
from dlplora.data.suite_data import SuiteDataModule, select_tasks
from dlplora.data.wrappers import wrapped
from dlplora.errors import ConfigError
from dlplora.tasks.registry import get_suite
from dlplora.tasks.types import Split

log = logging.getLogger(__name__)


class ExpertDataModule(SuiteDataModule):
    """Prompts with answers, for one adapter trained on one or several tasks.

    One Lightning epoch is ``num_steps`` batches; several tasks are sampled equally often, regardless of size.

    Args:
        suite: Name of the suite, as ``get_suite`` takes it.
        tasks: ``all``, names separated by commas, or a list of names.
        num_train: Training items of a task (fewer if a local file holds fewer).
        num_validation: Validation items of a task.
        num_test: Test items of a task (held-out phrasing).
        batch_size: Rows per batch over all processes; of a pool, rows of each expert.
        num_steps: Batches per epoch; of a pool, of each expert.
        eval_batch_size: Rows a validation or test batch.
        max_length: Longest sequence in tokens; longer prompts lose their beginning, which is counted and logged.
        length_group: Batches cut from one window of rows sorted by length; 1 turns sorting off.
        seed: Seed of the items and of their order. None: the seed of the run (``seed_everything``), 0 outside the command line.
        data_root: Folder of the rows of a ``local:`` suite.
        max_tokens: Most tokens, padding not counted, that an epoch's batches hold together; fewer than ``num_steps`` batches are made
            where they would hold more. None sets no bound. A pool of experts has none.
    """

    def __init__(
        self,
        suite: str = "nano",
        tasks: str | list[str] = "all",
        num_train: int = 3000,
        num_validation: int = 64,
        num_test: int = 100,
        batch_size: int = 16,
        num_steps: int = 800,
        eval_batch_size: int = 64,
        max_length: int = 512,
        length_group: int = 8,
        seed: int | None = None,
        data_root: str | None = None,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name in ("num_train", "num_validation", "num_test", "batch_size", "num_steps", "eval_batch_size", "length_group"):
            self._require(name)
        if max_tokens is not None:
            self._require("max_tokens")
        self._require("max_length", 2)
        self._sets: dict[Split, dict[str, EncodedSet]] = {}

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks trained on, in order."""
        assert self.suite is not None, "setup comes first"
        return self.suite.names

    @property
    def is_whole_suite(self) -> bool:
        """Whether every task of the suite takes part."""
        return set(self.task_names) == set(get_suite(self.hparams["suite"], self.hparams["data_root"]).names)

    def setup(self, stage: str | None = None) -> None:
        """Draw and encode the splits that the stage needs."""
        h = self.hparams
        self.suite = select_tasks(h["suite"], h["tasks"], h["data_root"])
        for split in self.splits(stage):
            if split not in self._sets:
                self._sets[split] = self._encode(split)

    def splits(self, stage: str | None) -> tuple[Split, ...]:
        """Splits that a stage needs."""
        by_stage: dict[str | None, tuple[Split, ...]] = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
        return by_stage.get(stage, ("train", "validation", "test"))

    def _encode(self, split: Split) -> dict[str, EncodedSet]:
        h = self.hparams
        assert self.suite is not None
        num = h[f"num_{split}"]
        encoded = {task.name: encode_items(self.tokenizer, task.items(split, num, self.seed), h["max_length"]) for task in self.suite.tasks}
        truncated = {name: one.num_truncated for name, one in encoded.items() if one.num_truncated}
        if truncated:
            log.warning("%s prompts shortened to max_length=%d at their beginning: %s", split, h["max_length"], truncated)
        return encoded

    def encoded(self, split: Split) -> Mapping[str, EncodedSet]:
        """Encoded items of a split by task name."""
        return self._sets[split]

    def num_truncated(self, split: Split) -> int:
        """Prompts of a split that had to be shortened."""
        return sum(one.num_truncated for one in self._sets[split].values())

    def schedule(self, names: Sequence[str]) -> BatchSchedule:
        """The batches over some of the tasks."""
        h = self.hparams
        return BatchSchedule({name: self._sets["train"][name].lengths for name in names}, h["batch_size"], self.seed, h["length_group"])

    def training_tokens(self, num_batches: int) -> int:
        """Tokens, padding not counted, of the first ``num_batches`` training batches over all processes."""
        return self._tokens_of(self.task_names, num_batches)

    def _tokens_of(self, names: Sequence[str], num_batches: int) -> int:
        schedule, lengths = self.schedule(names), {name: self._sets["train"][name].lengths for name in names}
        return sum(lengths[name][row] for step in range(num_batches) for name, row in schedule.batch(step))

    def _steps_within(self, schedule: BatchSchedule) -> int:
        """Batches of an epoch, as many as ``max_tokens`` has room for.

        Raises:
            ConfigError: If it has room for none.
        """
        steps, most = int(self.hparams["num_steps"]), self.hparams["max_tokens"]
        if most is None:
            return steps
        lengths = {name: self._sets["train"][name].lengths for name in self.task_names}
        total = 0
        for step in range(steps):
            total += sum(lengths[name][row] for name, row in schedule.batch(step))
            if total > most:
                if step == 0:
                    raise ConfigError(f"data: 'max_tokens' is {most}, the first batch alone has {total} tokens.")
                return step
        return steps

    def rows(self, batch: Sequence[tuple[str, int]]) -> list[EncodedItem]:
        """The training items a batch of a schedule names."""
        return [self._sets["train"][name].items[index] for name, index in batch]

    def batch(self, items: Sequence[EncodedItem], weights: Sequence[float] | None = None) -> dict[str, Any]:
        """Tensors of some items; subclasses add what their module reads."""
        return collate(items, self.pad_id, weights)

    def _step_rows(self, schedule: BatchSchedule, step: int, num_steps: int) -> list[EncodedItem]:
        """The rows of the whole optimiser step that batch ``step`` belongs to."""
        return [item for other in self._accumulated(step, num_steps) for item in self.rows(schedule.batch(other))]

    def _parts(self, whole: Sequence[EncodedItem]) -> list[list[EncodedItem]]:
        """This process's batches of an optimiser step, rows of similar length together; no batch is larger than ``batch_size`` rows as long
        as the longest of them would be."""
        count = -(-len(whole) // self.hparams["batch_size"])
        if count == 1:
            return [list(self._share(whole))]
        mine = self._share(sorted(whole, key=len))
        ends = parts_by_length([len(item) for item in mine], count)
        return [list(mine[start:end]) for start, end in pairwise([0, *ends])]

    def shares(self, mine: Sequence[EncodedItem], whole: Sequence[EncodedItem]) -> dict[str, Any]:
        """What else a batch says about its part of the optimiser step; nothing here.

        Args:
            mine: Rows of the batch.
            whole: Rows of the optimiser step, over all its batches and all processes.
        """
        return {}

    def train_dataloader(self) -> StepLoader:
        """``num_steps`` batches; the loss weights make the average over processes and accumulated batches the mean over the step."""
        schedule = self.schedule(self.task_names)
        steps = self._steps_within(schedule)

        def make(step: int) -> dict[str, Any]:
            whole = self._step_rows(schedule, step, steps)
            weight = self._num_parts / num_targets(whole)
            mine = self._parts(whole)[step - self._accumulated(step, steps).start]
            return {**self.batch(mine, [weight] * len(mine)), **self.shares(mine, whole)}

        return StepLoader(make, steps, self._epoch)

    def _eval_loader(self, split: Split) -> StepLoader:
        """Batches of one task each, in order; the task's name is under ``task``.

        Lightning needs a batch for every process: a process without one gets a batch without rows, with task None.
        """
        size = self.hparams["eval_batch_size"]
        batches: list[tuple[str, Sequence[EncodedItem]]] = []
        for name, encoded in self._sets[split].items():
            ordered = sorted(encoded.items, key=len)
            batches += [(name, ordered[start : start + size]) for start in range(0, len(ordered), size)]
        mine = self._share(batches)
        if not mine:
            return StepLoader(lambda step: {"task": None}, 1)
        return StepLoader(lambda step: {**self.batch(mine[step][1]), "task": mine[step][0]}, len(mine))

    def val_dataloader(self) -> StepLoader:
        """Validation items: phrasings of the training set, entities it never shows."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> StepLoader:
        """Test items: the held-out phrasing."""
        return self._eval_loader("test")


class ExpertPoolDataModule(ExpertDataModule):
    """Prompts with answers, for one adapter per task; used with ``LitExpertPool``, which says which experts train together.

    The epoch runs through the groups of experts, ``num_steps`` batches each. A batch holds ``batch_size`` rows of every expert
    of the group, expert by expert; every expert's loss is the mean over its own supervised tokens. Arguments as for
    ``ExpertDataModule``.
    """

    def splits(self, stage: str | None) -> tuple[Split, ...]:
        """The training split always: its lengths decide which experts train together."""
        return tuple(dict.fromkeys(("train", *super().splits(stage))))

    def training_tokens(self, num_batches: int) -> int:
        """As above; the batches of every group of experts count, each with the rows of all its experts."""
        groups: Sequence[Sequence[str]] = self.trainer.lightning_module.groups  # type: ignore[union-attr, assignment]
        steps = self.hparams["num_steps"]
        done = [(name, min(max(num_batches - index * steps, 0), steps)) for index, group in enumerate(groups) for name in group]
        return sum(self._tokens_of([name], number) for name, number in done)

    def train_dataloader(self) -> StepLoader:
        """``num_steps`` batches for every group; the group's index is under ``group``."""
        groups: Sequence[Sequence[str]] = self.trainer.lightning_module.groups  # type: ignore[union-attr, assignment]
        schedules = {name: self.schedule([name]) for group in groups for name in group}
        steps = self.hparams["num_steps"]

        def make(step: int) -> dict[str, Any]:
            index, local = divmod(step, steps)
            items: list[EncodedItem] = []
            weights: list[float] = []
            for name in groups[index]:
                weight = self._num_parts / num_targets(self._step_rows(schedules[name], local, steps))
                mine = self._share(self.rows(schedules[name].batch(local)))
                items += mine
                weights += [weight] * len(mine)
            return {**self.batch(items, weights), "group": index}

        return StepLoader(make, steps * len(groups))


class FusionDataModule(ExpertDataModule):
    """Prompts with answers and task labels, for fusion methods with trained parameters. Arguments as for ``ExpertDataModule``."""

    def shares(self, mine: Sequence[EncodedItem], whole: Sequence[EncodedItem]) -> dict[str, Any]:
        """``row_share`` and ``token_share``: a mean over the batch's rows (tokens) times it, averaged over the parts of the step, is the
        mean over the step's rows (tokens). Both are 1 if the batch is the step.

        Beside them ``num_parts``, accumulated batches times processes, and ``step_batches()``, this process's batches of the step.
        """
        tokens = sum(map(len, mine)) / sum(map(len, whole))
        facts = {"row_share": self._num_parts * len(mine) / len(whole), "token_share": self._num_parts * tokens}

        def step_batches() -> Iterator[dict[str, Any]]:
            for rows in self._parts(whole):
                yield self.batch(rows) | {"token_share": self._num_parts * sum(map(len, rows)) / sum(map(len, whole))}

        return {**facts, "num_parts": self._num_parts, "step_batches": step_batches}

    def batch(self, items: Sequence[EncodedItem], weights: Sequence[float] | None = None) -> dict[str, Any]:
        """Adds the prompts alone: ``prompt_ids`` and ``prompt_mask`` (B, T), ``prompt_texts``, and ``task_names``."""
        prompts = pad_rows([item.ids[: item.num_prompt] for item in items], self.pad_id)
        names = {"prompt_texts": tuple(item.prompt for item in items), "task_names": tuple(item.task for item in items)}
        return {**super().batch(items, weights), "prompt_ids": prompts[0], "prompt_mask": prompts[1], **names}


def num_targets(items: Sequence[EncodedItem]) -> int:
    """Supervised tokens of some items."""
    return sum(len(item) - item.num_prompt for item in items)


def pad_rows(rows: Sequence[Sequence[int] | np.ndarray[Any, Any]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded token ids and mask, each int64 (B, T)."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


class RouterDataModule(SuiteDataModule):
    """Prompts and the index of their task, for the router.

    Training and validation show the phrasings the experts were trained on (validation with other entities); the test split
    has a phrasing that occurs in no training data.

    Args:
        suite, tasks, data_root: As for ``ExpertDataModule``; the order of the tasks is the order of the router's classes.
        num_train, num_validation, num_test: Prompts of a task.
        batch_size: Prompts per batch over all processes.
        wrapper_noise: Share of the training prompts that are put into a system text or an instruction format, as noise (``data.wrappers``);
            0 where the question is taken out of its wrapper at inference and nothing else is expected.
        seed: Seed of the prompts and of their order; None as above.
    """

    def __init__(
        self,
        suite: str = "nano",
        tasks: str | list[str] = "all",
        num_train: int = 900,
        num_validation: int = 100,
        num_test: int = 100,
        batch_size: int = 64,
        seed: int | None = None,
        data_root: str | None = None,
        wrapper_noise: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= wrapper_noise <= 1.0:
            raise ConfigError(f"data: 'wrapper_noise' must be in [0, 1], got {wrapper_noise}.")
        self.save_hyperparameters()
        for name in ("num_train", "num_validation", "num_test", "batch_size"):
            self._require(name)
        self._tensors: dict[Split, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def task_names(self) -> tuple[str, ...]:
        """Class names in order."""
        assert self.suite is not None, "setup comes first"
        return self.suite.names

    def setup(self, stage: str | None = None) -> None:
        """Draw and encode all splits; prompts are short and calibration needs validation in every stage."""
        h = self.hparams
        self.suite = select_tasks(h["suite"], h["tasks"], h["data_root"])
        splits: tuple[Split, ...] = ("train", "validation", "test")
        for split in splits:
            if split not in self._tensors:
                items = [
                    (label, item) for label, task in enumerate(self.suite.tasks) for item in task.items(split, h[f"num_{split}"], self.seed)
                ]
                prompts = wrapped([item.prompt for _, item in items], h["wrapper_noise"] if split == "train" else 0.0, self.seed)
                ids, mask = pad_rows(encode_texts(self.tokenizer, prompts), self.pad_id)
                self._tensors[split] = (ids, mask, torch.tensor([label for label, _ in items]))

    def tensors(self, split: Split) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (n, T), mask (n, T) and labels (n,) of a whole split."""
        return self._tensors[split]

    def _batch(self, split: Split, rows: Sequence[int]) -> dict[str, Any]:
        ids, mask, labels = self._tensors[split]
        index = torch.tensor(rows, dtype=torch.long)
        return {"input_ids": ids[index], "attention_mask": mask[index], "labels": labels[index], "rows": index, "split": split}

    def _rows_of_step(self) -> Callable[[int], list[int]]:
        """Step -> rows of the training tensors."""
        labels = self._tensors["train"][2]
        start = {name: int((labels < label).sum()) for label, name in enumerate(self.task_names)}
        lengths = {name: [1] * int((labels == label).sum()) for label, name in enumerate(self.task_names)}
        schedule = BatchSchedule(lengths, self.hparams["batch_size"], self.seed, length_group=1)
        return lambda step: [start[name] + row for name, row in schedule.batch(step)]

    def training_tokens(self, num_batches: int) -> int:
        """Tokens of prompts, padding not counted, in the first ``num_batches`` training batches over all processes."""
        rows, lengths = self._rows_of_step(), self._tensors["train"][1].sum(dim=1).tolist()
        return sum(lengths[row] for step in range(num_batches) for row in rows(step))

    def train_dataloader(self) -> StepLoader:
        """One pass over the prompts per epoch, every task equally often; an incomplete last batch is left to the next pass."""
        rows = self._rows_of_step()
        steps = max(1, len(self._tensors["train"][2]) // self.hparams["batch_size"])

        def make(step: int) -> dict[str, Any]:
            mine = self._share(rows(step))
            whole = sum(len(rows(other)) for other in self._accumulated(step, steps))
            return {**self._batch("train", mine), "row_share": self._num_parts * len(mine) / whole}

        return StepLoader(make, steps, self._epoch)

    def _eval_loader(self, split: Split) -> StepLoader:
        rows = list(self._share(range(len(self._tensors[split][2]))))
        chunks = [rows[first : first + 512] for first in range(0, max(len(rows), 1), 512)]  # one without rows if there are none
        return StepLoader(lambda step: self._batch(split, chunks[step]), len(chunks))

    def val_dataloader(self) -> StepLoader:
        """Known phrasings, unseen entities."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> StepLoader:
        """The held-out phrasing."""
        return self._eval_loader("test")
