"""The nano suite: 26 synthetic tasks a tiny model can learn on a CPU, shaped like the paper's 18 + 8.

It shows that the machinery works and lets methods be compared on tasks that conflict. It is not the paper's data.
"""

from __future__ import annotations

from functools import lru_cache

from dlplora.tasks.types import Suite, Task

NOT_ADMITTED = frozenset({"unit_conversion", "colored_objects", "storage_keys", "topical_chat"})
"""Candidates that missed the bar of ``docs/nano_suite.md``; kept as code because the backbone's text was written with them."""


def nano_candidates() -> tuple[Task, ...]:
    """Every task that was tried, admitted or not, in a fixed order; the pretraining text draws its wording from these."""
    from dlplora.tasks.nano import generation, multiple_choice

    return (*multiple_choice.CANDIDATES, *generation.CANDIDATES)


@lru_cache(maxsize=1)
def nano_suite() -> Suite:
    """The 18 multiple-choice and 8 generation tasks admitted on evidence (``docs/nano_suite.md``)."""
    return Suite("nano", tuple(task for task in nano_candidates() if task.name not in NOT_ADMITTED))
