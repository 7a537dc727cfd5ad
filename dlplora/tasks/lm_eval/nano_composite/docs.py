"""Documents and metrics of composites of the nano suite, as lm-eval reads them (``!function docs.…``)."""

from __future__ import annotations

from typing import Any, Literal

import datasets

from dlplora.tasks.composite import composite_row, composites
from dlplora.tasks.composite_metrics import composite_metrics
from dlplora.tasks.registry import get_suite

__all__ = ["composite_metrics", "nano_composites"]


def nano_composites(
    reading: str, n: int, num_composites: int = 100, data_seed: int = 0, form: Literal["fill", "free"] = "fill", **_: Any
) -> datasets.DatasetDict:
    """Test rows of one reading; ``--metadata`` sets the last three.

    Args:
        reading: ``mixture``, ``concat`` or ``serial``.
        n: Questions per composite.
        num_composites: Composites; ``mixture`` has n rows of each.
        data_seed: Seed of the choice of questions.
        form: Who writes the cue of an answer: ``fill`` the evaluation, ``free`` the model.
    """
    rows = [composite_row(one, form) for one in composites(get_suite("nano"), reading, n, num_composites, data_seed)]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
