"""The suite ``real26``: 26 tasks in English for a pretrained language model, selected by measurements (``docs/real26_suite.md``).

Two blocks. ``public``: tasks with rows on the hub, or under ``--data-root``. ``skills``: generated tasks (``tasks.skills``), which need no
external rows. A candidate is in a list below only if its row of the admission table supports it; rejected ones stay in that table.
"""

from __future__ import annotations

from dataclasses import replace

from dlplora.tasks.paper import load_source
from dlplora.tasks.paper.sources import Source
from dlplora.tasks.paper.splits import SplitSettings
from dlplora.tasks.real.descriptions import DESCRIPTIONS
from dlplora.tasks.real.sources import CANDIDATES
from dlplora.tasks.skills import skills_candidates
from dlplora.tasks.types import Suite, Task

SUITES = ("real26", "real26_public", "real26_skills", "real_candidates")
PREFIX = "dlplora_real26_"
NUM_TEST = 60
"""Test questions of a task, of both blocks."""
SPLITS = SplitSettings(num_train=480, num_validation=40, num_test=NUM_TEST, max_prompt_chars=1600)
"""Longest prompt in characters of the public block; 1600 characters are about 400 tokens."""
PUBLIC = (
    "hyperbaton",
    "epistemic_reasoning",
    "disambiguation_qa",
    "movie_recommendation",
    "temporal_sequences",
    "geometric_shapes",
    "tense",
    "object_counting",
)
SKILLS = (
    "ticket_desk",
    "ticket_queue",
    "review_grade",
    "review_aisle",
    "parcel_note",
    "tag_color",
    "visit_day",
    "visit_hour",
    "roster_day",
    "roster_night",
    "tray_next",
    "folder_next",
    "date_archive",
    "mail_sender",
    "mail_receiver",
    "price_tag",
    "price_ledger",
    "invoice_item",
)


def source_of(name: str) -> Source | None:
    """The candidate of the public block of that name; None for a generated task."""
    return next((source for source in CANDIDATES if source.name == name), None)


def real_task(name: str, root: str | None) -> Task:
    """One candidate of either block. Public rows come from ``root`` or ``DLPLORA_DATA`` if given, else from the hub.

    Raises:
        TaskError: If there is none of that name, or its rows are missing or malformed.
    """
    source = source_of(name)
    if source is None:
        return Suite("real_candidates", skills_candidates()).task(name)
    return replace(load_source(source, root, SPLITS), description=DESCRIPTIONS[name])


def real_names(name: str) -> tuple[str, ...]:
    """Task names of one of ``SUITES``, in order."""
    if name == "real_candidates":
        return (*(source.name for source in CANDIDATES), *(task.name for task in skills_candidates()))
    return (*(PUBLIC if name != "real26_skills" else ()), *(SKILLS if name != "real26_public" else ()))


def real_suite(name: str, root: str | None = None) -> Suite:
    """One of ``SUITES``.

    Raises:
        TaskError: If rows of a public task are missing or malformed.
    """
    return Suite(name, tuple(real_task(task, root) for task in real_names(name)), prefix=PREFIX, num_generated=NUM_TEST)
