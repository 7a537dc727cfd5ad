"""Documents and metrics of the skills tasks, as lm-eval reads them (``!function docs.…``)."""

from __future__ import annotations

from typing import Any

import datasets

from dlplora.tasks.generated import generated_dataset
from dlplora.tasks.text_metrics import text_metrics

__all__ = ["skills_dataset", "text_metrics"]


def skills_dataset(**options: Any) -> datasets.DatasetDict:
    """Rows of one task; options as of ``generated_dataset``."""
    return generated_dataset("skills", **options)
