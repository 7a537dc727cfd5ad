"""Documents and metrics of local tasks, as lm-eval reads them (``!function docs.…``)."""

from __future__ import annotations

from typing import Any

import datasets

from dlplora.errors import TaskError
from dlplora.tasks.registry import get_suite
from dlplora.tasks.text_metrics import item_row, text_metrics

__all__ = ["local_dataset", "text_metrics"]


def local_dataset(task: str, data_root: str, **_: Any) -> datasets.DatasetDict:
    """Train rows (few-shot examples) and test rows of one local task, in the order of its files.

    Args:
        task: Name of the folder.
        data_root: Where the folder is.

    Raises:
        TaskError: If it has no test rows.
    """
    rows = get_suite(f"local:{task}", data_root).task(task).rows
    if "test" not in rows:
        raise TaskError(f"{data_root}/{task} has no test.jsonl; there is nothing to evaluate.")
    splits = {split: datasets.Dataset.from_list([item_row(item) for item in rows[split]]) for split in ("train", "test") if split in rows}
    return datasets.DatasetDict(splits)
