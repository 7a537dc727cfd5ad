"""Checks of a run before anything is loaded. A refused run leaves no files behind."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from dlplora.errors import ConfigError, MethodError, TaskError, UnavailableMethodError, nearest
from dlplora.inference.saving import untrained_method
from dlplora.methods.base import FusionMethod
from dlplora.tasks.composite import CompositeTask
from dlplora.tasks.types import Suite, Task

MAX_SEEDS = 2**32
"""Number of different seeds of numpy's legacy generator, which lm-eval seeds."""

MAX_LIMIT = 10**9
"""Questions per task; lm-eval cannot count further than a machine word."""


def require_limit(limit: int | None) -> None:
    """Refuse a limit that is not a valid number of questions."""
    if limit is not None and not 1 <= limit <= MAX_LIMIT:
        raise TaskError(f"limit must be from 1 to {MAX_LIMIT} questions per task, got {limit}.")


def require_seed(seed: int) -> None:
    """Refuse a seed that numpy's generator cannot take."""
    if not 0 <= seed < MAX_SEEDS:
        raise ConfigError(f"seed must be from 0 to {MAX_SEEDS - 1}, got {seed}.")


def require_split(suite: Suite, names: Sequence[str], split: str) -> None:
    """Refuse tasks that have no questions of the split.

    Raises:
        TaskError: If a task is unknown, named twice or without rows of it, or a composite, which is drawn from test questions.
    """
    if split != "test" and suite.source is not None:
        raise TaskError(f"suite '{suite.name}' has composites of test questions only, no {split} split; choose settings on its source.")
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise TaskError(f"task '{twice}' is named twice.")
    lacking = [task.name for task in map(suite.task, names) if task.rows and not task.rows.get(split)]
    if lacking:
        wanted = "test.jsonl" if split == "test" else "train.jsonl, whose end is the validation split, with two rows or more"
        raise TaskError(f"no {split} questions of {', '.join(map(repr, lacking))}: add {wanted}, or leave the task out.")


def require_artifacts(method: FusionMethod, preset: str, roles: Collection[str]) -> None:
    """Refuse a method that reads a folder which was neither given nor is shipped.

    Args:
        method: Its ``artifact_roles`` are looked for.
        preset: Name under which it was requested.
        roles: Roles of the folders at hand.

    Raises:
        UnavailableMethodError: Naming the role, and how to get it.
    """
    for role in method.artifact_roles:
        if role not in roles:
            if role == "trained":
                raise untrained_method(preset)
            option = f"--{role}" if role in {"router", "multitask"} else f"--artifact {role}=FOLDER"
            raise UnavailableMethodError(
                f"method '{preset}' needs a {role}; none was given. Pass {role}=FOLDER (`dlplora eval`: {option})."
            )


def require_task_facts(method: FusionMethod, suite: Suite, names: Sequence[str], experts: Sequence[str] | None) -> None:
    """Refuse tasks that a method lacks something for: an adapter of that name, training items, or one task a prompt.

    Args:
        method: Only what its metadata say it needs is looked for.
        suite: Of the tasks.
        names: Tasks to be evaluated.
        experts: Names in the pool; None if the pool is not known yet.

    Raises:
        MethodError: Naming method and task.
    """
    wanted = set(method.metadata.needs) & {"task_id", "few_shot"}
    for task in map(suite.task, names) if wanted else ():
        mixed = isinstance(task, CompositeTask) and task.reading != "mixture"
        if "task_id" in wanted and mixed and method.granularity == "task":
            raise MethodError(
                f"method '{method.name}' has one set of weights per task, but '{task.name}' asks questions of several tasks in one prompt. "
                "Evaluate mixture_N, or a method that re-routes at the end of an answer."
            )
        for asked in _questions_of(task):
            if "task_id" in wanted and experts is not None and asked.name not in experts:
                hint = nearest(asked.name, experts)
                raise MethodError(f"method '{method.name}': no adapter for task '{asked.name}'.{hint} The pool has: {', '.join(experts)}.")
            if "few_shot" in wanted and asked.rows and not asked.rows.get("train"):
                raise MethodError(f"method '{method.name}' needs training examples of every task; '{asked.name}' has no train.jsonl.")


def _questions_of(task: Task) -> Iterator[Task]:
    """The tasks that the questions of a task are from: itself, or those that a composite is drawn from."""
    if isinstance(task, CompositeTask) and task.source is not None:
        yield from task.source.tasks
    else:
        yield task
