"""The paper's tasks: MeteoRA's list of 28, of which the paper uses 26, from the hub or from local files.

``paper`` has all 28, ``paper26`` the 26 of ``sources.PAPER26``, ``paper_local`` those with rows under the data root and prompts short
enough for a small base model. With a data root nothing is looked up on the hub.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from dlplora.errors import TaskError
from dlplora.tasks.local import ENV_ROOT, data_root, parse_row, read_rows, rows_state
from dlplora.tasks.paper.hub import hub_rows
from dlplora.tasks.paper.sources import PAPER26, SOURCES, Source, source_of
from dlplora.tasks.paper.splits import Splits, SplitSettings, draw_splits
from dlplora.tasks.types import Item, Suite, Task

SUITES = ("paper", "paper26", "paper_local")
PREFIX = "dlplora_"
SMALL = SplitSettings(num_test=40, max_prompt_chars=2400)
"""Longest prompt of ``paper_local`` in characters, for machines without a GPU; 2400 are about 600 tokens of a small vocabulary."""
TRAILING_MARK = re.compile(r"(?:\s*\n)?\s*A:$")


LISTED_OPTION = re.compile(r"^[ \t]*choice:.*\n?", re.MULTILINE)


def shuffled(item: Item) -> Item:
    """The item with its options in an order drawn from the question: several sources list the right one first, or in a fixed place."""
    if item.choices is None:
        return item

    def key(choice: str) -> bytes:
        return hashlib.sha256(f"{item.task}\0{item.prompt}\0{choice}".encode()).digest()

    choices = tuple(sorted(item.choices, key=key))
    return dataclasses.replace(item, choices=choices, gold=choices.index(item.answer))


def with_options(source: Source, item: Item) -> Item:
    """The item with its options in drawn order, and listed so in the prompt where the task shows them or the text lists them already."""
    if item.choices is None:
        return item
    listed_already = f"choice: {item.choices[0]}" in item.prompt
    if listed_already:
        item = dataclasses.replace(item, prompt=LISTED_OPTION.sub("", item.prompt).rstrip())
    item = shuffled(item)
    assert item.choices is not None
    if not (source.shows_options or listed_already):
        return item
    mark = TRAILING_MARK.search(item.prompt)
    question = (item.prompt[: mark.start()] if mark else item.prompt).rstrip()
    listed = "".join(f"\nchoice: {choice}" for choice in item.choices)
    return dataclasses.replace(item, prompt=f"{question}{listed}" + ("\nA:" if mark else ""))


def _kind_checked(source: Source, items: list[Item], where: str) -> list[Item]:
    for item in items:
        if (item.choices is None) != (source.kind == "gen"):
            wanted = "needs 'choices'" if source.kind == "mcq" else "has no 'choices'"
            raise TaskError(f"{where}: a row of task '{source.name}' {wanted}: {item.prompt[:60]!r}.")
    return [with_options(source, item) for item in items]


def _local(source: Source, root: Path, settings: SplitSettings) -> tuple[Splits, str]:
    folder = root / source.name
    found: dict[str, list[Item] | None] = {}
    for split in ("train", "test"):
        path = folder / f"{split}.jsonl"
        found[split] = _kind_checked(source, read_rows(path, source.name), str(path)) if path.is_file() else None
    if found["train"] is None and found["test"] is None:
        known = sorted(path.name for path in root.iterdir() if (path / "test.jsonl").is_file())
        raise TaskError(f"no rows of task '{source.name}' under {root}: expected {source.name}/train.jsonl. Found: {', '.join(known)}.")
    return draw_splits(source.name, found["train"] or [], found["test"], settings), "local files"


def _from_hub(source: Source, settings: SplitSettings) -> tuple[Splits, str]:
    def items(split: str, num: int) -> tuple[list[Item], str]:
        rows, commit = hub_rows(source, split, num, settings.seed)
        where = f"{source.hub_id} split {split}"
        parsed = [parse_row(row, source.name, f"{where}, row {index}") for index, row in enumerate(rows)]
        return [with_options(source, item) for item in parsed], commit

    wanted = settings.num_train + settings.num_validation
    train, commit = items(source.train, wanted + (settings.num_test if source.test is None else 0))
    test = items(source.test, settings.num_test)[0] if source.test is not None else None
    return draw_splits(source.name, train, test, settings), f"{source.hub_id}@{commit}"


def load_task(name: str, root: str | None, settings: SplitSettings) -> Task:
    """One task with its splits; from ``root`` or ``DLPLORA_DATA`` if given, else from the hub.

    Raises:
        TaskError: If its rows are missing or malformed.
    """
    return load_source(source_of(name), root, settings)


def load_source(source: Source, root: str | None, settings: SplitSettings) -> Task:
    """As ``load_task``, for a source that need not be in the paper's list."""
    return _load_task(source, root, dataclasses.replace(settings, asks_by_options=source.asks_by_options), rows_state(root))


@lru_cache(maxsize=128)
def _load_task(source: Source, root: str | None, settings: SplitSettings, state: tuple[object, ...]) -> Task:
    """``load_source``; the state of local rows is part of what is remembered."""
    given = root or os.environ.get(ENV_ROOT)
    splits, origin = _local(source, data_root(given), settings) if given else _from_hub(source, settings)
    facts: Mapping[str, Any] = {"origin": origin, "seed": settings.seed, **splits.facts()}
    return Task(name=source.name, kind=source.kind, rows=splits.rows, facts=facts)


def local_names(root: str | None) -> list[str]:
    """Tasks of the list that have a folder of rows under the data root, in the list's order.

    Raises:
        TaskError: If there is none.
    """
    folder = data_root(root)
    names = [source.name for source in SOURCES if any((folder / source.name / f"{split}.jsonl").is_file() for split in ("train", "test"))]
    if not names:
        raise TaskError(f"{folder} has no rows of the paper's tasks; expected folders such as gsm8k/ with train.jsonl and test.jsonl.")
    return names


def settings_of(suite: str) -> SplitSettings:
    """How a suite draws its splits."""
    return SMALL if suite == "paper_local" else SplitSettings()


def paper_names(name: str) -> tuple[str, ...]:
    """Task names of ``paper`` or ``paper26``, in order."""
    return tuple(source.name for source in SOURCES) if name == "paper" else PAPER26


def paper_suite(name: str, root: str | None = None) -> Suite:
    """``paper``, ``paper26`` or ``paper_local``.

    Raises:
        TaskError: If a task's rows are missing or malformed.
    """
    names = local_names(root) if name == "paper_local" else paper_names(name)
    return Suite(name, tuple(load_task(task, root, settings_of(name)) for task in names), prefix=PREFIX)
