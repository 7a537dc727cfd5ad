"""Objects that the runs of a comparison share: the base model, lm-eval's task objects, token ids.

Methods differ only in the layers that are put into the base model and removed again; nothing cached here depends on the method. One run at
a time uses a cache.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.errors import TaskError
from dlplora.inference.loading import backbones_kept
from dlplora.lm_eval.evaluate import fast_task_manager, load_tasks
from dlplora.tasks.export import local_tasks
from dlplora.tasks.types import Split, Suite

if TYPE_CHECKING:
    from lm_eval.api.task import Task

MANY = 10**9
"""More rows than any file has."""
Encodings = dict[Any, "array[int]"]
"""Text and options of the tokenizer -> token ids."""


@dataclass
class EvalCache:
    """Kept between the runs of one ``eval_cache`` block."""

    _tasks: dict[Any, list[Task]] = field(default_factory=dict)
    _encodings: dict[Any, Encodings] = field(default_factory=dict)
    _folders: ExitStack = field(default_factory=ExitStack)

    def tasks(self, suite: Suite, names: Sequence[str], *, data_root: str | None, num_fewshot: int, split: Split = "test") -> list[Task]:
        """Tasks of a suite as lm-eval objects; lm-eval asks them for new requests at every evaluation.

        Args:
            suite: The suite.
            names: Its tasks to load, in this order.
            data_root: Folder of local rows.
            num_fewshot: Solved examples before each question; part of the key because lm-eval sets it on the task.
            split: Where the questions come from.

        Raises:
            TaskError: If the suite's tasks for lm-eval have no questions of another split than ``test``.
        """
        source = suite.source or suite
        key = (suite.name, source.names, data_root, tuple(names), num_fewshot, split)
        if key not in self._tasks:
            local = [task.name for task in source.tasks if task.rows and not task.facts]
            folder = self._folders.enter_context(local_tasks(local, data_root))
            # exported local tasks name their folder themselves
            given = {} if data_root is None or local else {"data_root": str(Path(data_root).resolve())}
            told = {"suite": suite.name, **given, **({} if split == "test" else {"split": split})}
            manager = fast_task_manager([] if folder is None else folder, told)
            tasks = load_tasks([f"{suite.lm_eval_prefix}{name}" for name in names], manager)
            if split != "test":
                _require_split(suite, names, tasks, split)
            self._tasks[key] = tasks
        return self._tasks[key]

    def encodings(self, backbone: str | None, revision: str | None) -> Encodings:
        """Token ids that earlier runs over the same base model looked up."""
        return self._encodings.setdefault((backbone, revision), {})


def _require_split(suite: Suite, names: Sequence[str], tasks: Sequence[Task], split: Split) -> None:
    """Refuse tasks with a data set that ignores the split: test questions would be used instead."""
    for name, task in zip(names, tasks, strict=True):
        asked = [task.doc_to_text(doc) for doc in task.test_docs()]
        known = {item.prompt for item in suite.task(name).items(split, MANY if suite.task(name).rows else len(asked))}
        if not asked or not known.issuperset(asked):
            raise TaskError(f"suite '{suite.name}': lm-eval's task of '{name}' asks no {split} questions.")


@contextmanager
def eval_cache() -> Iterator[EvalCache]:
    """A cache; inside the block a base model of equal name, dtype and device is loaded once."""
    cache = EvalCache()
    with cache._folders, backbones_kept():
        yield cache
