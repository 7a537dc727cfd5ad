"""Composite-n: several questions of different tasks in one request, in three forms.

The paper reports composite-n without saying how a composite is built. Its released code contains two ways, and the paper that the tasks
come from a third. So there are three forms (parameter ``reading``):

* ``mixture``: n questions one after another, each a prompt of its own, all composites in one shuffled stream;
* ``concat``: the n prompts in one, a blank line between them, and n answers in their order, each on its own line;
* ``serial``: MeteoRA's form, two worked examples and a numbered list: numbered questions first, then numbered answers.

The same n and seed give the same questions in every form, and every part records its source. An answer of several lines is joined to one
line, and a blank line inside a question becomes a line break, because line breaks separate answers and blank lines separate questions.

An *answer form* is the text before each answer (the question's own cue ``Answer:``, or ``2.``). With ``form="fill"`` the evaluation
writes it (``lm_eval.answer_form``): if a model ends its text, or a line, too early, the form of the next answer follows. Adapters trained
on single questions end their text after one answer, so otherwise only the first answer would be measured.
``form="free"`` lets the model write everything.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dlplora.errors import TaskError
from dlplora.tasks.types import TASK_SEPARATOR, Item, Split, Suite, Task

Reading = Literal["mixture", "concat", "serial"]
READINGS: tuple[Reading, ...] = ("mixture", "concat", "serial")
SIZES = (3, 5, 10)
POOL = 100
"""Test questions of a generated task that composites are drawn from: the ones that the task itself is scored on."""
NUM_EXAMPLES = 2
"""Worked examples of ``serial``."""

_CUE = re.compile(r"\n([^\n]{1,24}:)$")
_NUMBERED = re.compile(r"^[ \t]*(\d+)\.[ \t]*(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Part:
    """One question of a composite and where it came from.

    Args:
        task: Its task.
        index: Its index in the task's split (``items(split, …)`` of a generated task, the line of a file).
        question: Its prompt.
        answer: The right answer, on one line.
        kind: ``mcq`` or ``gen``.
        split: The split.
    """

    task: str
    index: int
    question: str
    answer: str
    kind: str
    split: str = "test"

    @property
    def cue(self) -> str:
        """The question's own last line if it asks for the answer (``Answer:``), else nothing."""
        match = _CUE.search(self.question)
        return match[1] if match else ""


@dataclass(frozen=True, slots=True)
class Composite:
    """n questions asked together.

    Args:
        reading: How.
        prompt: What the model reads; ends without white space.
        parts: The questions, in order.
        form: The text before each answer; the first is empty where the prompt already ends with it.
    """

    reading: Reading
    prompt: str
    parts: tuple[Part, ...]
    form: tuple[str, ...]

    @property
    def target(self) -> str:
        """The right answers with their form, as a whole; what a perfect model writes."""
        return "".join(f"{cue} {part.answer}" for cue, part in zip(self.form, self.parts, strict=True)).strip()


def _pool(task: Task, split: Split, seed: int) -> list[Item]:
    """The items of one task that parts are drawn from, by index."""
    return list(task.rows.get(split, ())) if task.rows else task.items(split, POOL, seed)


def _part(item: Item, index: int, kind: str, split: Split) -> Part:
    return Part(item.task, index, re.sub(r"\n\s*\n", "\n", item.prompt), " ".join(item.answer.split()), kind, split)


def draw_parts(suite: Suite, n: int, num: int, seed: int = 0, split: Split = "test") -> list[tuple[Part, ...]]:
    """``num`` groups of ``n`` questions of different tasks, a pure function of the arguments.

    Raises:
        TaskError: If the suite has fewer than ``n`` tasks with rows of the split.
    """
    pools = {task.name: (task.kind, _pool(task, split, seed)) for task in suite.tasks if not task.rows or split in task.rows}
    if len(pools) < n:
        raise TaskError(f"a composite of {n} needs {n} tasks with {split} rows; suite '{suite.name}' has {len(pools)}.")
    rng = random.Random(f"composite/{suite.name}/{split}/{n}/{seed}")
    groups = []
    for _ in range(num):
        group = []
        for name in rng.sample(list(pools), n):
            kind, items = pools[name]
            index = rng.randrange(len(items))
            group.append(_part(items[index], index, kind, split))
        groups.append(tuple(group))
    return groups


def concat(parts: Sequence[Part]) -> Composite:
    """The prompts as they are, blank lines between them; the second and later answers begin with a new line and the question's cue."""
    prompt = "\n\n".join(part.question for part in parts)
    return Composite("concat", prompt, tuple(parts), ("", *(f"\n{part.cue}" for part in parts[1:])))


def serial(parts: Sequence[Part], examples: Sequence[Sequence[Part]]) -> Composite:
    """Worked examples, then numbered questions and ``Answers:``."""
    blocks = [f"Example {i}:\n\n{_numbered(example)}\n{_answers(example)}" for i, example in enumerate(examples, 1)]
    prompt = "\n\n".join([*blocks, f"Questions:\n\n{_numbered(parts)}"])
    return Composite("serial", prompt, tuple(parts), tuple(f"\n{i}." for i in range(1, len(parts) + 1)))


def _numbered(parts: Sequence[Part]) -> str:
    return "\n\n".join([*(f"{i}. {part.question}" for i, part in enumerate(parts, 1)), "Answers:"])


def _answers(parts: Sequence[Part]) -> str:
    return "\n".join(f"{i}. {part.answer}" for i, part in enumerate(parts, 1))


def worked_examples(suite: Suite, parts: Sequence[Part], seed: int, pools: dict[str, list[Item]] | None = None) -> list[tuple[Part, ...]]:
    """``NUM_EXAMPLES`` lists of training questions of the same tasks in the same order, drawn by the questions that they precede.

    Args:
        suite: Where they are from.
        parts: The questions that follow.
        seed: Of the draw.
        pools: Filled with the training rows of each task, so that many composites make them once.

    Raises:
        TaskError: If a task has no training rows.
    """
    pools = {} if pools is None else pools
    rng = random.Random(f"examples/{seed}/" + "/".join(f"{part.task}:{part.index}" for part in parts))
    examples = []
    for _ in range(NUM_EXAMPLES):
        example = []
        for part in parts:
            task = suite.task(part.task)
            if task.rows and "train" not in task.rows:
                raise TaskError(f"composite 'serial' shows worked examples, but task '{task.name}' has no training rows. Use concat.")
            if task.name not in pools:
                pools[task.name] = _pool(task, "train", seed)
            items = pools[task.name]
            index = rng.randrange(len(items))
            example.append(_part(items[index], index, task.kind, "train"))
        examples.append(tuple(example))
    return examples


def composites(suite: Suite, reading: str, n: int, num: int, seed: int = 0) -> list[Composite]:
    """``num`` composites, or for ``mixture`` their ``num * n`` single questions in one shuffled stream.

    Raises:
        TaskError: If the reading is unknown, ``n`` or ``num`` is below 1, or the suite has too few tasks or rows.
    """
    if reading not in READINGS:
        raise TaskError(f"unknown form '{reading}' of composite-n. Known: {', '.join(READINGS)}.")
    if n < 1 or num < 1:
        raise TaskError(f"composite-n needs n and the number of composites to be at least 1, got {n} and {num}.")
    groups = draw_parts(suite, n, num, seed)
    if reading == "concat":
        return [concat(parts) for parts in groups]
    if reading == "serial":
        pools: dict[str, list[Item]] = {}
        return [serial(parts, worked_examples(suite, parts, seed, pools)) for parts in groups]
    stream = [Composite("mixture", part.question, (part,), ("",)) for parts in groups for part in parts]
    random.Random(f"stream/{suite.name}/{n}/{seed}").shuffle(stream)
    return stream


def parse_answers(text: str, reading: str, parts: Sequence[Part], filled: bool) -> list[str | None]:
    """The answers in a generated text; None for a question that was not answered.

    ``serial``: the text of the first line that begins with the number and a full stop; a number counts only after the one before it.
    ``concat``: the i-th line, without the question's cue if it begins with it; blank lines are passed over unless the form was written by
    the evaluation, where a line left blank is an answer not given. ``mixture``: the first line.

    Args:
        text: What was generated, with the form where the evaluation wrote it.
        reading: The reading.
        parts: The questions.
        filled: Whether the evaluation wrote the form.
    """
    if reading == "serial":
        return _by_number(text, len(parts))
    lines = text.split("\n")
    if reading == "mixture":
        lines = text.strip().split("\n")[:1]
    elif not filled:
        lines = [line for line in lines if line.strip()]
    found: list[str | None] = []
    for i, part in enumerate(parts):
        line = lines[i].strip() if i < len(lines) else ""
        for cue in {part.cue, *(other.cue for other in parts)} - {""}:
            line = line.removeprefix(cue).strip()
        found.append(line or None)
    return found


def _by_number(text: str, n: int) -> list[str | None]:
    found: list[str | None] = [None] * n
    wanted = 1
    for match in _NUMBERED.finditer(text):
        number = int(match[1])
        if wanted <= number <= n:
            found[number - 1] = match[2].strip() or None
            wanted = number + 1
    return found


def composite_row(composite: Composite, form: Literal["fill", "free"] = "fill") -> dict[str, Any]:
    """A composite as the row that lm-eval's templates read.

    Raises:
        TaskError: If the form is unknown.
    """
    if form not in ("fill", "free"):
        raise TaskError(f"unknown answer form '{form}' of a composite. Known: fill (written by the evaluation), free (by the model).")
    return {
        "task": TASK_SEPARATOR.join(part.task for part in composite.parts),
        "question": composite.prompt,
        "answer": composite.target,
        "reading": composite.reading,
        "parts": [asdict(part) for part in composite.parts],
        "answer_form": list(composite.form) if form == "fill" and composite.reading != "mixture" else None,
        "whole_prompt": True,
    }


@dataclass(frozen=True)
class CompositeTask(Task):
    """One reading with one n over a suite, as a task of a suite of its own."""

    source: Suite | None = None
    reading: str = "concat"
    n: int = 3

    def items(self, split: Split, num: int, seed: int = 0) -> list[Item]:
        """``num`` prompts with their targets; only the test split exists.

        Raises:
            TaskError: For another split.
        """
        if split != "test" or self.source is None:
            raise TaskError(f"composite task '{self.name}' has test rows only; methods are trained on the tasks it is made of.")
        return [Item(self.name, one.prompt, one.target) for one in composites(self.source, self.reading, self.n, num, seed)[:num]]


def _drawn_from(source: Suite, reading: str) -> Suite:
    """The tasks that a reading can take questions from: those with test rows, for ``serial`` with training rows too."""
    splits = {"test", "train"} if reading == "serial" else {"test"}
    return Suite(source.name, tuple(task for task in source.tasks if not task.rows or splits <= set(task.rows)))


def composite_suite(source: Suite) -> Suite:
    """The suite ``<name>_composite``: every reading with every n that the suite has tasks for.

    Raises:
        TaskError: If it has too few tasks for any, or they are the paper's; composites do not read those rows.
    """
    if any(task.facts for task in source.tasks):
        raise TaskError(f"composites are drawn from nano or local rows, not from '{source.name}'; name folders: local_composite:TASK,TASK.")
    pools = {reading: _drawn_from(source, reading) for reading in READINGS}
    tasks = tuple(
        CompositeTask(name=f"{reading}_{n}", kind="gen", source=pools[reading], reading=reading, n=n)
        for reading in READINGS
        for n in SIZES
        if n <= len(pools[reading].tasks)
    )
    if not tasks:
        with_rows = len(pools["mixture"].tasks)
        raise TaskError(f"a composite needs at least {min(SIZES)} tasks with test rows; suite '{source.name}' has {with_rows}.")
    return Suite(f"{source.name}_composite", tasks, source=source)


def not_drawable(suite: Suite, names: Sequence[str]) -> list[str]:
    """The named composites for which a suite has too few tasks; names of other tasks are not included."""
    every = {f"{reading}_{n}" for reading in READINGS for n in SIZES}
    return [name for name in names if suite.source is not None and name in every and name not in suite.names]
