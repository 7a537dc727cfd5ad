"""Documents and metrics of local tasks, as lm-eval reads them (``!function docs.…``)."""

from __future__ import annotations

from typing import Any

import datasets

from dlplora.errors import TaskError
from dlplora.tasks.registry import get_suite
from dlplora.tasks.text_metrics import item_row, text_metrics
from dlplora.tasks.types import Split

__all__ = ["local_dataset", "text_metrics"]


def local_dataset(task: str, data_root: str, split: Split = "test", **_: Any) -> datasets.DatasetDict:
    """Train rows (few-shot examples) and test rows of one local task, in the order of its files.

    Args:
        task: Name of the folder.
        data_root: Where the folder is.
        split: Where the questions come from; lm-eval calls them ``test`` in any case.

    Raises:
        TaskError: If it has no rows of the split.
    """
    rows = get_suite(f"local:{task}", data_root).task(task).rows
    if split not in rows:
        needed = "test.jsonl" if split == "test" else "train.jsonl of two rows or more"
        raise TaskError(f"{data_root}/{task} has no {needed}; there is nothing to evaluate.")
    named = {"train": "train", "test": split}
    splits = {name: datasets.Dataset.from_list([item_row(item) for item in rows[its]]) for name, its in named.items() if its in rows}
    return datasets.DatasetDict(splits)
