"""Documents and metrics of the real26 suite, as lm-eval reads them (``!function docs.…``)."""

from __future__ import annotations

from typing import Any

import datasets

from dlplora.tasks.paper.judging import judged
from dlplora.tasks.real import NUM_TEST, real_task, source_of
from dlplora.tasks.text_metrics import item_row, text_metrics
from dlplora.tasks.types import Split

__all__ = ["real_dataset", "real_metrics"]
NUM_EXAMPLES = 100
"""Rows of the training split, for few-shot prompts only."""


def real_dataset(
    task: str, data_root: str | None = None, num_test: int = NUM_TEST, split: Split = "test", **_: Any
) -> datasets.DatasetDict:
    """Train rows (few-shot examples) and test rows of one task.

    Args:
        task: Task name in the suite.
        data_root: Folder of local rows of the public block; None reads ``DLPLORA_DATA``, and without it the hub. lm-eval passes it with
            ``--metadata '{"data_root": "DIR"}'``.
        num_test: Most questions.
        split: Where the questions come from; lm-eval calls them ``test`` in any case.
    """
    drawn, source = real_task(task, data_root), source_of(task)
    extra = {} if source is None else {"judge": source.judge}
    return datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([item_row(item) | extra for item in drawn.items("train", NUM_EXAMPLES)]),
            "test": datasets.Dataset.from_list([item_row(item) | extra for item in drawn.items(split, num_test)]),
        }
    )


def real_metrics(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """The text metrics, with ``exact_match`` as the task judges an answer."""
    return text_metrics(doc, results) | {"exact_match": float(judged(doc.get("judge", "exact"), doc["answer"], results[0]))}
