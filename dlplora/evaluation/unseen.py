"""The track of unseen tasks: every task is answered by a pool without its expert. Tasks are left out in folds.

The runs over all folds of one method form one record of the suite ``<suite>_unseen``; each task has the numbers of the fold that left it
out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dlplora.config import config_hash
from dlplora.errors import TaskError
from dlplora.evaluation.cache import EvalCache
from dlplora.evaluation.runner import Run, measure
from dlplora.methods.registry import build_method, load_method_spec
from dlplora.progress import Progress
from dlplora.reporting.samples import Outcome
from dlplora.reporting.schema import Record, aggregate

TRACK = "unseen"
NUM_FOLDS = 5
WEIGHTED = ("mean_experts_kept", "mean_entropy_nats", "fraction_multi", "num_merged")
"""Routing statistics that are means over prompts, and the experts of a merge, which differ from fold to fold by one."""
COUNTS = ("num_plans", "num_gated_prompts", "num_reroutes", "num_truncated_prompts")
"""Those that are counts of prompts."""


def unseen_name(name: str) -> str:
    """Suite or protocol of the track."""
    return f"{name}_{TRACK}"


def folds_of(names: Sequence[str], num: int = NUM_FOLDS) -> list[tuple[str, ...]]:
    """The tasks that are left out together: every ``num``-th one, so that similar tasks (neighbours in a suite) are in different folds.

    Raises:
        TaskError: If a fold would leave fewer than two experts, or there are fewer tasks than folds.
    """
    if not 2 <= num <= len(names) or len(names) - -(-len(names) // num) < 2:
        raise TaskError(f"{len(names)} tasks cannot be left out in {num} folds: a fold needs a task, and at least two other experts.")
    return [tuple(names[start::num]) for start in range(num)]


def leaves_itself_out(preset: str) -> dict[str, Any]:
    """Parameters with which a method excludes the expert of a prompt's own task; empty if it has none.

    Such a method knows the task's name. It gets the whole pool, and one fold is enough.
    """
    fields = {one.name for one in dataclasses.fields(build_method(load_method_spec(preset)).Config)}
    return {"leave_one_out": True} if "leave_one_out" in fields else {}


def cell_of(runs: Sequence[Run]) -> str:
    """Hash of everything the record of some folds depends on."""
    return config_hash([TRACK, *(run.cell() for run in runs)])


def measure_folds(
    runs: Sequence[Run], pool_hash: str, cache: EvalCache | None = None, progress: Progress | None = None
) -> tuple[Record, list[Outcome]]:
    """Evaluate every fold and join the results; nothing is written.

    Args:
        runs: One per fold, each with the fold's tasks in its protocol, in the order of the folds.
        pool_hash: Checksum of the whole pool.
        cache, progress: As for ``measure``.

    Raises:
        DLPLoRAError: What the evaluation raised.
    """
    measured = [measure(run, cache, progress) for run in runs]
    return joined(runs, [record for record, _ in measured], pool_hash), [one for _, outcomes in measured for one in outcomes]


def joined(runs: Sequence[Run], records: Sequence[Record], pool_hash: str) -> Record:
    """One record of the folds' records."""
    suite, first = runs[0].suite, records[0]
    tasks = {name: result for record in records for name, result in record.tasks.items()}
    hashes = [record.artifact_hashes for record in records]
    roles = hashes[0]
    whole = dataclasses.replace(
        first,
        suite=unseen_name(suite.name),
        protocol={**first.protocol, "tasks": None},
        method={key: value for key, value in first.method.items() if key != "changed"},  # ``leave_one_out`` belongs to the track
        protocol_hash=config_hash([TRACK, [record.protocol_hash for record in records]]),
        pool_hash=pool_hash,
        artifact_hashes={role: config_hash([one[role] for one in hashes]) for role in roles},
        tasks={name: tasks[name] for name in suite.names if name in tasks},
        routing=_routing(records),
        timings_s={name: round(sum(record.timings_s[name] for record in records), 3) for name in first.timings_s},
        trained_parameters=max((record.trained_parameters or 0 for record in records), default=0),
        training_tokens=_mean_tokens(records),
        provenance={**first.provenance, "unseen": {"folds": [list(run.task_names) for run in runs]}},
        cell=cell_of(runs),
    )
    return dataclasses.replace(whole, aggregates=aggregate(whole, {task.name: task.kind for task in suite.tasks}))


def _routing(records: Sequence[Record]) -> dict[str, float | int | None]:
    """Means over prompts and counts; the right expert is in no pool, so router accuracy is left out."""
    weights = [sum(task.num for task in record.tasks.values()) for record in records]
    known = [name for name in WEIGHTED if name in records[0].routing]
    found: dict[str, float | int | None] = {name: _weighted((record.routing[name] for record in records), weights) for name in known}
    counts = {name: sum(int(record.routing.get(name) or 0) for record in records) for name in COUNTS}
    return {**found, **counts, **_searched(records[0].routing)}


def _weighted(values: Iterable[float | int | None], weights: Sequence[int]) -> float | None:
    known = list(values)
    if any(value is None for value in known):
        return None
    return sum(float(value or 0.0) * weight for value, weight in zip(known, weights, strict=True)) / sum(weights)


def _searched(routing: Mapping[str, float | int | None]) -> dict[str, float | int | None]:
    return {name: value for name, value in routing.items() if name.startswith("search")}


def _mean_tokens(records: Sequence[Record]) -> int | None:
    """Tokens that the training of one fold saw, the mean over folds; None if one does not say."""
    tokens = [record.training_tokens for record in records]
    return None if any(one is None for one in tokens) else round(sum(one or 0 for one in tokens) / len(tokens))
