"""Seeded, disjoint splits: about 900 training and 90 test questions per task, for all sources."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dlplora.errors import TaskError
from dlplora.tasks.types import Item


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """How many questions, drawn how."""

    num_train: int = 900
    """Training questions of a task, validation not counted."""
    num_validation: int = 90
    """At most this many, and at most a tenth of the rows left for training."""
    num_test: int = 90
    """Test questions of a task."""
    seed: int = 0
    """Seed of the draw."""
    max_prompt_chars: int | None = None
    """Longer prompts are left out of every split, and counted: a small base model could only be shown their end."""
    asks_by_options: bool = False
    """Whether the rows share one prompt and differ in their options only; the options then identify a question."""


@dataclass(frozen=True)
class Splits:
    """The questions of one task.

    Args:
        rows: Split -> items, in drawn order.
        left_out: Reason -> rows of the source that are in no split, other than those beyond the wanted numbers.
    """

    rows: Mapping[str, tuple[Item, ...]]
    left_out: Mapping[str, int] = field(default_factory=dict)

    def sha256(self) -> str:
        """Checksum over what every split holds, in order."""
        digest = hashlib.sha256()
        for split, items in self.rows.items():
            for item in items:
                digest.update(json.dumps([split, item.prompt, item.answer, item.choices, item.gold], ensure_ascii=False).encode())
        return digest.hexdigest()

    def facts(self) -> dict[str, int | str | dict[str, int]]:
        """What a record keeps."""
        counts = {f"num_{split}": len(items) for split, items in self.rows.items()}
        return {**counts, "left_out": dict(self.left_out), "sha256": self.sha256()}


def stem(item: Item) -> str:
    """The prompt without the lines that list its options: two questions about one paragraph must not be in different splits."""
    return "\n".join(line for line in item.prompt.splitlines() if not line.lstrip().startswith("choice:"))


def _question(item: Item, settings: SplitSettings) -> str:
    """What two rows of different splits may not share."""
    return "\n".join(sorted(item.choices or ())) if settings.asks_by_options else stem(item)


def _distinct(items: Iterable[Item]) -> list[Item]:
    """The first of each question: same prompt and same options in any order."""
    kept: dict[tuple[str, tuple[str, ...]], Item] = {}
    for item in items:
        kept.setdefault((item.prompt, tuple(sorted(item.choices or ()))), item)
    return list(kept.values())


def draw_splits(name: str, train: Sequence[Item], test: Sequence[Item] | None, settings: SplitSettings) -> Splits:
    """Split one task's rows; a pure function of rows and settings.

    No question text (without its options) is in two splits: where the source's own training and test rows share one, the training row
    is dropped, since others report on the test set.

    Args:
        name: Task name.
        train: Rows of the source's training split.
        test: Rows of its test split; None if it has none, and test rows are set aside from ``train``.
        settings: How many, drawn how.

    Raises:
        TaskError: If nothing is left for the test split.
    """
    left_out: dict[str, int] = {}

    def usable(items: Sequence[Item]) -> list[Item]:
        limit = settings.max_prompt_chars
        short = [item for item in items if limit is None or len(item.prompt) <= limit]
        distinct = _distinct(short)
        for reason, count in (("too_long", len(items) - len(short)), ("repeated", len(short) - len(distinct))):
            if count:
                left_out[reason] = left_out.get(reason, 0) + count
        return distinct

    def question(item: Item) -> str:
        return _question(item, settings)

    rng = random.Random(f"{name}/splits/{settings.seed}")
    remaining = usable(train)
    rng.shuffle(remaining)
    if test is None:
        chosen = set(list(dict.fromkeys(map(question, remaining)))[: settings.num_test])
        tested = [item for item in remaining if question(item) in chosen][: settings.num_test]
    else:
        tested = usable(test)
        rng.shuffle(tested)
        # Every test question of the source is kept out of training, drawn or not, so that other draws may be compared.
        chosen = set(map(question, tested))
        tested = tested[: settings.num_test]
    if not tested:
        raise TaskError(f"task '{name}': no usable test row is left ({len(train)} training rows, left out: {left_out}).")
    apart = [item for item in remaining if question(item) not in chosen]
    if test is not None and len(apart) < len(remaining):
        left_out["question_in_test"] = len(remaining) - len(apart)
    return Splits(_with_validation(apart, tested, settings), left_out)


def _with_validation(apart: Sequence[Item], tested: Sequence[Item], settings: SplitSettings) -> dict[str, tuple[Item, ...]]:
    """Training and validation rows that share no question, and the test rows; an empty split is absent."""
    wanted = min(settings.num_validation, len(apart) // 10)
    held_out = {_question(item, settings) for item in apart[:wanted]}
    validation = tuple(item for item in apart if _question(item, settings) in held_out)
    training = tuple(item for item in apart if _question(item, settings) not in held_out)
    rows = {"train": training[: settings.num_train], "validation": validation, "test": tuple(tested)}
    return {split: items for split, items in rows.items() if items}
