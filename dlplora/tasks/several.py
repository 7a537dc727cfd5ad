"""Several questions on separate lines, answered in turn, one line each: rows to train on, and prompts of different tasks.

A prompt holds one to three questions of tasks from the suite ``skills``, one per line, and a single cue:

    Put Nov 19 2014 into the form that the archive uses.
    Write the words in Velka: wise bird finds old dog
    Answer:

The answers follow in the same order. Nothing numbers them, and no question is repeated before its answer. A row that an expert is trained
on asks questions of the expert's own task only (``SeveralTask``); a composed prompt asks questions of different tasks (``composed``).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dlplora.errors import TaskError
from dlplora.tasks.composite import Part, draw_parts
from dlplora.tasks.skills import skills_suite
from dlplora.tasks.types import TASK_SEPARATOR, Item, Split, Suite, Task

CUE = "Answer:"
TASKS = (
    "date_archive", "title_slug", "price_tag", "translate_velka", "invoice_item", "name_index", "date_letter", "price_ledger",
)  # fmt: skip
"""Skills with short answers on one line. Dates and prices come in pairs that apply different rules to the same text."""
SIZES = (1, 2, 3)
"""Questions of a training row; each number equally often."""


@dataclass(frozen=True, slots=True)
class Composed:
    """Questions of different tasks in one prompt.

    Args:
        prompt: What the model reads.
        parts: The questions in order.
    """

    prompt: str
    parts: tuple[Part, ...]

    @property
    def tasks(self) -> str:
        """Names of the tasks in order, as given to methods that read the task."""
        return TASK_SEPARATOR.join(part.task for part in self.parts)

    @property
    def target(self) -> str:
        """The right answers, one per line."""
        return "\n".join(part.answer for part in self.parts)


def question_line(prompt: str) -> str:
    """A question of the skills suite on one line, without its cue."""
    return " ".join(prompt.removesuffix(CUE).split())


def on_lines(questions: Sequence[str]) -> str:
    """Questions as one prompt."""
    return "\n".join([*map(question_line, questions), CUE])


@dataclass(frozen=True)
class SeveralTask(Task):
    """A skill with rows that ask one, two or three of its questions at once."""

    single: Task | None = None
    """The skill itself."""

    def items(self, split: Split, num: int, seed: int = 0) -> list[Item]:
        """``num`` rows of a split. Questions of two splits differ as the skill's do, and no question is in two rows of a split if the
        skill has enough of them.

        Raises:
            TaskError: If the split is unknown.
        """
        assert self.single is not None
        rng = random.Random(f"several/{self.name}/{split}/{seed}")
        sizes = [rng.choice(SIZES) for _ in range(num)]
        questions = iter(self.single.items(split, sum(sizes), seed))
        rows = [[next(questions) for _ in range(size)] for size in sizes]
        return [Item(self.name, on_lines([one.prompt for one in row]), "\n".join(one.answer for one in row)) for row in rows]


@lru_cache(maxsize=1)
def several_suite() -> Suite:
    """The suite ``skills_several``; experts bear the names of the skills."""
    skills = skills_suite()
    chosen = [skills.task(name) for name in TASKS]
    return Suite(
        "skills_several",
        tuple(SeveralTask(name=task.name, kind="gen", version=task.version, phrasings=task.phrasings, single=task) for task in chosen),
    )


def composed(tasks: Sequence[str], n: int, num: int, seed: int = 0, split: Split = "test") -> list[Composed]:
    """``num`` prompts of ``n`` questions of different tasks, a pure function of the arguments.

    Raises:
        TaskError: If a task is unknown, fewer than ``n`` are named, or ``n`` or ``num`` is below 1.
    """
    if n < 1 or num < 1:
        raise TaskError(f"composed prompts need at least one question and one prompt, got {n} and {num}.")
    groups = draw_parts(skills_suite().select(tasks), n, num, seed, split)
    return [Composed(on_lines([part.question for part in parts]), parts) for parts in groups]


def answers_in(text: str, n: int) -> list[str | None]:
    """The first ``n`` lines of a generated text that are not blank; None for an answer that is missing.

    >>> answers_in(" 19.11.2014\\n\\nvel sav", 3)
    ['19.11.2014', 'vel sav', None]
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return [lines[i] if i < len(lines) else None for i in range(n)]
