"""Types of tasks: item, task and suite.

A task is a seeded generator (or a local file) with three disjoint splits. Text convention of every suite: ``prompt + " " + answer``; a
prompt never ends with a space.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dlplora.errors import TaskError, nearest

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TASK_SEPARATOR = "+"
"""Between the task names of a prompt that asks several questions, in their order; only methods that are given the task see them."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Args:
        task: Name of its task, which is also the name of the expert trained on it.
        prompt: What the model reads; never ends with a space.
        answer: The right continuation, without the leading space.
        choices: All options in presentation order, or None for generation.
        gold: Index of ``answer`` in ``choices``, or None for generation.
        phrasing: Index of the wording used; the last one of a generated task never occurs in training.
    """

    task: str
    prompt: str
    answer: str
    choices: tuple[str, ...] | None = None
    gold: int | None = None
    phrasing: int = 0


@dataclass(frozen=True)
class Draw:
    """What a generator returns: the fields of a phrasing, the answer, and the options of a multiple-choice item."""

    fields: Mapping[str, str]
    answer: str
    choices: Sequence[str] | None = None


@dataclass(frozen=True)
class Task:
    """A named source of items.

    Args:
        name: Task name, also the expert's name.
        kind: ``mcq`` (scored by the log-likelihood of the options) or ``gen`` (scored by the generated text).
        version: Raised whenever an item changes.
        phrasings: Templates; all but the last are used in training and validation, the last one in the test split.
        draw: ``draw(rng, held_out)``; ``held_out`` selects the entities that training never shows.
        rows: Fixed rows per split instead of a generator (local files, the hub).
        facts: Where fixed rows come from and how they were split, for the record.
        description: What the task asks for, in a few words; pools that are trained on the task carry it, for methods that read it.
    """

    name: str
    kind: Literal["mcq", "gen"]
    version: int = 1
    phrasings: tuple[str, ...] = ()
    draw: Callable[[random.Random, bool], Draw] | None = None
    rows: Mapping[str, tuple[Item, ...]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""

    def items(self, split: Split, num: int, seed: int = 0) -> list[Item]:
        """``num`` items of a split (fewer if a file holds fewer), a pure function of task, split, number and seed.

        Train and validation use the known phrasings; validation and test use entities that training never shows; the test
        split uses the held-out phrasing only. No prompt occurs in two splits: the entities differ, and duplicates within
        a split are avoided as far as the task has enough distinct prompts.

        Raises:
            TaskError: If the split is unknown or empty.
        """
        if split not in SPLITS:
            raise TaskError(f"unknown split '{split}' of task '{self.name}'. Known: {', '.join(SPLITS)}.")
        if self.draw is None:
            rows = self.rows.get(split, ())
            if not rows:
                raise TaskError(f"task '{self.name}' has no {split} rows.")
            order = list(rows)
            random.Random(f"{self.name}/{split}/{seed}").shuffle(order)
            return order[:num]
        rng = random.Random(f"{self.name}/{split}/{seed}/v{self.version}")
        known = range(len(self.phrasings) - 1) if split != "test" else range(len(self.phrasings) - 1, len(self.phrasings))
        items: list[Item] = []
        seen: set[str] = set()
        attempts = 0
        while len(items) < num:
            item = self._item(rng, split != "train", rng.choice(list(known)), len(items))
            attempts += 1
            if item.prompt in seen and attempts < 20 * num:
                continue
            seen.add(item.prompt)
            items.append(item)
        return items

    def _item(self, rng: random.Random, held_out: bool, phrasing: int, position: int) -> Item:
        assert self.draw is not None
        drawn = self.draw(rng, held_out)
        prompt = self.phrasings[phrasing].format(**drawn.fields)
        if drawn.choices is None:
            return Item(self.name, prompt, drawn.answer, phrasing=phrasing)
        others = [choice for choice in drawn.choices if choice != drawn.answer]
        rng.shuffle(others)
        gold = position % len(drawn.choices)  # answer positions are balanced exactly, not only in expectation
        choices = (*others[:gold], drawn.answer, *others[gold:])
        return Item(self.name, prompt, drawn.answer, choices, gold, phrasing)


@dataclass(frozen=True)
class Suite:
    """An ordered set of tasks.

    Args:
        name: Also of the folder of its records.
        tasks: In order.
        prefix: What lm-eval's names of the tasks have before the suite's; None is ``dlplora_<name>_``.
        num_generated: Test questions of a task with generated rows.
    """

    name: str
    tasks: tuple[Task, ...]
    source: Suite | None = None
    """The suite that composites are made of; its tasks are those that adapters and methods are trained on."""
    prefix: str | None = None
    num_generated: int = 100

    def num_test(self, task: Task) -> int:
        """Test questions of one of the tasks."""
        return len(task.rows["test"]) if task.rows else self.num_generated

    @property
    def lm_eval_prefix(self) -> str:
        """See ``prefix``."""
        return f"dlplora_{self.name}_" if self.prefix is None else self.prefix

    @property
    def names(self) -> tuple[str, ...]:
        """Task names in order."""
        return tuple(task.name for task in self.tasks)

    def task(self, name: str) -> Task:
        """The task of that name.

        Raises:
            TaskError: If there is none; the message holds the nearest name.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise TaskError(f"suite '{self.name}' has no task '{name}'.{nearest(name, self.names)} Known: {', '.join(self.names)}.")

    def select(self, names: Sequence[str] | None) -> Suite:
        """The same suite with only the named tasks, in the order given (None keeps all)."""
        if names is None:
            return self
        return replace(self, tasks=tuple(self.task(name) for name in names))
