"""The skills suite: procedural tasks in ordinary English for a pretrained language model of about 135 M parameters.

Each task is a convention of an invented office (a format, a code, whose name counts). A base model cannot know it; an expert learns it from
about 400 rows. See ``docs/real26_suite.md``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from dlplora.tasks.skills.descriptions import DESCRIPTIONS
from dlplora.tasks.types import Suite, Task

NOT_ADMITTED: frozenset[str] = frozenset()
"""Candidates that an expert does not learn to the bar of ``docs/real26_suite.md``."""

CONFUSABLE: tuple[tuple[str, str], ...] = (
    ("ticket_desk", "ticket_queue"),
    ("parcel_note", "parcel_contents"),
    ("tag_color", "tag_use"),
    ("mail_sender", "mail_receiver"),
)
"""Pairs that a router confuses: the prompts are the same text, and the two tasks differ in one word of the question
(``ticket_*``, ``mail_*``), a rule that is mentioned in passing (``parcel_*``), or only two examples (``tag_*``)."""


@lru_cache(maxsize=1)
def skills_candidates() -> tuple[Task, ...]:
    """Every task that was tried, admitted or not, in a fixed order: multiple choice, then generation."""
    from dlplora.tasks.skills import generation, multiple_choice

    return tuple(replace(task, description=DESCRIPTIONS[task.name]) for task in (*multiple_choice.CANDIDATES, *generation.CANDIDATES))


def conflicting() -> tuple[tuple[str, str], ...]:
    """Pairs of candidates that draw the same texts and never give the same answer."""
    from dlplora.tasks.skills import generation, multiple_choice

    return (*multiple_choice.CONFLICTING, *generation.CONFLICTING)


@lru_cache(maxsize=1)
def skills_suite() -> Suite:
    """The admitted candidates."""
    return Suite("skills", tuple(task for task in skills_candidates() if task.name not in NOT_ADMITTED))


@lru_cache(maxsize=1)
def confusable_suite() -> Suite:
    """The suite ``skills_confusable``: both tasks of every pair that a router confuses. lm-eval knows them by their names in ``skills``."""
    return Suite("skills_confusable", skills_suite().select([name for pair in CONFUSABLE for name in pair]).tasks, prefix="dlplora_skills_")
