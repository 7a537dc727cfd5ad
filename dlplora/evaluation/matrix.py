"""What the runs of a matrix have in common, made once: the backbone, lm-eval's task objects, tokenised texts.

Methods differ in the layers that are put into the backbone and taken out again, and in nothing else that is kept here. A matrix serves
one run at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.inference.loading import backbones_kept
from dlplora.tasks.export import local_tasks

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from dlplora.evaluation.runner import Run

Encodings = dict[Any, "array[int]"]
"""Text and options of the tokenizer -> token ids."""


@dataclass
class Matrix:
    """Kept between the runs of one ``shared_matrix`` block."""

    _tasks: dict[Any, list[Task]] = field(default_factory=dict)
    _encodings: dict[Any, Encodings] = field(default_factory=dict)
    _folders: ExitStack = field(default_factory=ExitStack)

    def tasks(self, run: Run) -> list[Task]:
        """The run's tasks as lm-eval objects; lm-eval asks them for new requests at every evaluation."""
        from dlplora.evaluation.harness import fast_task_manager, load_tasks

        protocol = run.protocol
        source = run.suite.source or run.suite
        key = (run.suite.name, source.names, protocol.data_root, tuple(run.task_names), protocol.num_fewshot)
        if key not in self._tasks:
            local = [task.name for task in source.tasks if task.rows and not task.facts]
            folder = self._folders.enter_context(local_tasks(local, protocol.data_root))
            # exported local tasks name their folder themselves
            given = {} if protocol.data_root is None or local else {"data_root": str(Path(protocol.data_root).resolve())}
            manager = fast_task_manager([] if folder is None else folder, {"suite": run.suite.name, **given})
            self._tasks[key] = load_tasks([f"{run.prefix}{name}" for name in run.task_names], manager)
        return self._tasks[key]

    def encodings(self, run: Run) -> Encodings:
        """Token ids that earlier runs over the same backbone looked up."""
        return self._encodings.setdefault((run.protocol.backbone, run.protocol.revision), {})


@contextmanager
def shared_matrix() -> Iterator[Matrix]:
    """A matrix; inside the block a backbone of equal name, dtype and device is loaded once."""
    matrix = Matrix()
    with matrix._folders, backbones_kept():
        yield matrix
