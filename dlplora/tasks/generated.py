"""Rows of a generated suite as a data set for lm-eval."""

from __future__ import annotations

from typing import Any

import datasets

from dlplora.tasks.registry import get_suite
from dlplora.tasks.text_metrics import item_row
from dlplora.tasks.types import Split


def generated_dataset(
    suite: str, /, task: str, num_test: int = 100, num_train: int = 100, data_seed: int = 0, split: Split = "test", **_: Any
) -> datasets.DatasetDict:
    """Train rows (few-shot examples) and test rows of one task.

    Whatever else the harness tells a task (its ``metadata``, which may name a suite too) is ignored.

    Args:
        suite: Name of the suite.
        task: Task name in the suite.
        num_test: Questions.
        num_train: Rows of the train split, used for few-shot prompts only.
        data_seed: Seed of both.
        split: Where the questions come from; lm-eval calls them ``test`` in any case.
    """
    source = get_suite(suite).task(task)
    return datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([item_row(item) for item in source.items("train", num_train, data_seed)]),
            "test": datasets.Dataset.from_list([item_row(item) for item in source.items(split, num_test, data_seed)]),
        }
    )
