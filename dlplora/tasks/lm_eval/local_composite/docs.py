"""Documents and metrics of composites of local tasks, as lm-eval reads them (``!function docs.…``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import datasets

from dlplora.tasks.composite import composite_row, composites
from dlplora.tasks.composite_metrics import composite_metrics
from dlplora.tasks.composite_rows import read_composites
from dlplora.tasks.registry import get_suite

__all__ = ["composite_metrics", "local_composites"]


def local_composites(
    data_root: str,
    tasks: Sequence[str] = (),
    reading: str = "serial",
    n: int = 3,
    rows: str | None = None,
    num_composites: int = 100,
    data_seed: int = 0,
    form: Literal["fill", "free"] = "fill",
    **_: Any,
) -> datasets.DatasetDict:
    """Test rows of one reading over local tasks, or of a file of ready-made composites.

    Args:
        data_root: Where the folders of the tasks are.
        tasks, reading, n: What to draw from, and how.
        rows: A folder of ready-made composites; the three before are then not read.
        num_composites, data_seed, form: Set by ``--metadata``.
    """
    if rows is not None:
        made = read_composites(Path(data_root) / rows / "test.jsonl")
    else:
        made = composites(get_suite(f"local:{','.join(tasks)}", data_root), reading, n, num_composites, data_seed)
    return datasets.DatasetDict({"test": datasets.Dataset.from_list([composite_row(one, form) for one in made])})
