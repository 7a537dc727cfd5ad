"""Documents and metrics of the paper's tasks, as lm-eval reads them (``!function docs.…``)."""

from __future__ import annotations

from typing import Any

import datasets

from dlplora.tasks.paper import load_task, settings_of
from dlplora.tasks.paper.judging import judged
from dlplora.tasks.paper.sources import source_of
from dlplora.tasks.text_metrics import item_row, text_metrics
from dlplora.tasks.types import Split

__all__ = ["paper_dataset", "paper_metrics"]


def paper_dataset(task: str, data_root: str | None = None, suite: str = "paper", split: Split = "test", **_: Any) -> datasets.DatasetDict:
    """Train rows (few-shot examples) and test rows of one task.

    Args:
        task: Task name in the list.
        data_root: Folder of local rows; None reads ``DLPLORA_DATA``, and without it the hub. lm-eval passes it with
            ``--metadata '{"data_root": "DIR"}'``.
        suite: Suite that defines the splits.
        split: Where the questions come from; lm-eval calls them ``test`` in any case.
    """
    rows, judge = load_task(task, data_root, settings_of(suite)).rows, source_of(task).judge
    splits = {name: its for name, its in (("train", "train"), ("test", split)) if its in rows}
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{**item_row(item), "judge": judge} for item in rows[its]]) for name, its in splits.items()}
    )


def paper_metrics(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """The text metrics, with ``exact_match`` as the task judges an answer."""
    return text_metrics(doc, results) | {"exact_match": float(judged(doc["judge"], doc["answer"], results[0]))}
