"""Check that the first logits of every generation are finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from dlplora.errors import NotFiniteError

NOT_FINITE = "the model's logits are NaN or infinite. Check the adapters (dlplora pool check) and the dtype; float16 ends at 65504."


def is_finite(logits: Tensor) -> Tensor:
    """Whether the logits (..., V) of each row are numbers, boolean (...); minus infinity marks a forbidden token and is allowed."""
    return (logits < torch.inf).all(dim=-1)  # false for NaN too


def require_finite(logits: Tensor) -> None:
    """Check logits (..., V).

    Raises:
        NotFiniteError: If one is NaN or plus infinity.
    """
    if not bool(is_finite(logits).all()):
        raise NotFiniteError(NOT_FINITE)


class FiniteLogits(LogitsProcessor):
    """Stops a generation if its first logits are NaN or infinite; later logits are not checked, since each check waits for the device."""

    def __init__(self) -> None:
        self._seen = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores (B, V), as they are; see ``require_finite``."""
        if not self._seen:
            self._seen = True
            require_finite(scores)
        return scores


def with_finite_check(processors: Iterable[Any] | None) -> LogitsProcessorList:
    """A caller's logits processors, after the check."""
    return LogitsProcessorList([FiniteLogits(), *(processors or ())])
