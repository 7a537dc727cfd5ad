"""Which tasks an lm-eval ``TaskManager`` indexes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

MODEL_NAME = "dlplora"
Index = Literal["all", "ours", "as called"]
"""What a ``TaskManager`` indexes: its own tasks and ours, ours alone, or those of its arguments."""
_index: ContextVar[Index] = ContextVar("_index", default="all")


@contextmanager
def task_index(kind: Index) -> Iterator[None]:
    """Choose what a ``TaskManager`` indexes while open: lm-eval takes 20 s for its own thousands of tasks."""
    token = _index.set(kind)
    try:
        yield
    finally:
        _index.reset(token)


def current_index() -> Index:
    """What was chosen by ``task_index``."""
    return _index.get()
