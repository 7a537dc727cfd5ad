"""Find suites by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from dlplora.errors import TaskError, nearest
from dlplora.tasks.composite import composite_suite
from dlplora.tasks.local import ENV_ROOT, local_suite, rows_state
from dlplora.tasks.nano import nano_suite
from dlplora.tasks.paper import SUITES, paper_names, paper_suite
from dlplora.tasks.real import SUITES as REAL_SUITES
from dlplora.tasks.real import real_names, real_suite
from dlplora.tasks.several import several_suite
from dlplora.tasks.skills import confusable_suite, skills_suite
from dlplora.tasks.types import Item, Suite

GENERATED = frozenset({"nano", "nano_composite", "skills", "skills_confusable", "skills_several"})
"""Suites that read no rows."""


def get_suite(name: str, data_root: str | None = None) -> Suite:
    """A suite by name, made again where the rows under the data root are others than last time.

    Args:
        name: ``nano``; ``local:TASK,TASK`` for JSONL rows under ``data_root/TASK/{train,test}.jsonl``; ``nano_composite`` or
            ``local_composite:TASK,TASK`` for composites of either; ``skills``, ``skills_confusable``, ``skills_several``; or one of the
            paper's.
        data_root: Folder of local rows; None reads ``DLPLORA_DATA``.

    Raises:
        TaskError: If the suite is unknown, or local rows are missing or malformed.
    """
    return _suite(name, data_root, () if name in GENERATED else rows_state(data_root))


TrainingItems = Callable[[str, int], Sequence[Item]]
"""(Task, number) -> its first training items, for methods that need a few (``MethodContext.few_shot``)."""


def training_items(suite: str, data_root: str | None = None) -> TrainingItems:
    """Training items of a suite, which is made when the first are asked for; arguments as for ``get_suite``."""
    return lambda task, num: get_suite(suite, data_root).task(task).items("train", num)


def local_training_items(data_root: str | None = None) -> TrainingItems | None:
    """Training items of local rows, where only the task that is asked for needs a folder; None without a data root."""
    if data_root is None and not os.environ.get(ENV_ROOT):
        return None
    return lambda task, num: training_items(f"local:{task}", data_root)(task, num)


def suite_names(name: str) -> tuple[str, ...]:
    """Task names of a suite in order; its rows may still be on the hub."""
    if name in REAL_SUITES:
        return real_names(name)
    return paper_names(name) if name in SUITES else tuple(get_suite(name).names)


@lru_cache(maxsize=8)
def _suite(name: str, data_root: str | None, state: tuple[object, ...]) -> Suite:
    """``get_suite``; the state of the rows is part of what is remembered."""
    if name.partition(":")[0].endswith("_composite"):
        return composite_suite(get_suite(name.replace("_composite", "", 1), data_root))
    if name == "nano":
        return nano_suite()
    if name == "skills":
        return skills_suite()
    if name == "skills_confusable":
        return confusable_suite()
    if name == "skills_several":
        return several_suite()
    if name.startswith("local:"):
        return local_suite([one.strip() for one in name.removeprefix("local:").split(",")], data_root)
    if name in SUITES:
        return paper_suite(name, data_root)
    if name in REAL_SUITES:
        return real_suite(name, data_root)
    known = (
        "nano, skills, skills_confusable, skills_several, local:TASK,TASK (rows under --data-root); with _composite, their composites; "
        "paper, paper26, paper_local; real26, real26_public, real26_skills"
    )
    hint = nearest(name, [*sorted(GENERATED), *SUITES, *REAL_SUITES, "local:all"])
    if data_root is not None and (Path(data_root) / name).is_dir():
        hint = f" Did you mean 'local:{name}'?"
    raise TaskError(f"unknown suite '{name}'.{hint} Known: {known}.")
