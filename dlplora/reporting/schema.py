"""The results record: one evaluation of one method under one protocol with one seed.

Reading and reporting need no deep-learning package. Fractions are 0 to 1; BLEU is 0 to 100, as in sacreBLEU. A missing measurement is null.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dlplora.config import build
from dlplora.documents import read_json
from dlplora.errors import RecordError

SCHEMA_VERSION = 2
"""2 added ``training_tokens`` and ``samples_sha256``; records of version 1 are read, with both null."""


READABLE = (1, 2)
"""Versions this package reads. Fields that a version lacks have the defaults of ``Record``."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task's numbers."""

    kind: Literal["mcq", "gen"]
    version: str
    num: int
    """Questions evaluated."""
    metrics: dict[str, float]
    stderr: dict[str, float | None]
    """Standard error over questions; null where none is defined."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run."""

    suite: str
    protocol_name: str
    protocol: dict[str, Any]
    protocol_hash: str
    method_name: str
    """Name of the method configuration; ``method["method"]`` names the class."""
    method: dict[str, Any]
    method_hash: str
    seed: int
    backbone: dict[str, Any]
    """Name and fingerprint."""
    pool_hash: str
    artifact_hashes: dict[str, str]
    """Hashes of router and other trained artifacts the method was given, by role."""
    tasks: dict[str, TaskResult]
    suite_tasks: list[str]
    """Every task of the suite; an aggregate exists only if all of a kind are in ``tasks``."""
    routing: dict[str, float | int | None]
    latency: dict[str, Any] | None
    backend: str
    timings_s: dict[str, float]
    provenance: dict[str, Any]
    status: Literal["ok", "failed", "interrupted"] = "ok"
    limit: int | None = None
    """Questions per task if the run was cut short by ``--limit``; these runs are never in a table."""
    trained_parameters: int | None = None
    training_tokens: int | None = None
    """Tokens seen by gradient training of what the method adds to the pool (gates, router, multi-task adapter); 0 if nothing trains."""
    samples_sha256: str | None = None
    """Checksum of the Parquet file of the same name, which holds the outcomes of single questions; null if there is none."""
    error: str | None = None
    cell: str = ""
    """Hash of everything the numbers depend on; equal cells are the same experiment."""
    created: str = ""
    schema_version: int = SCHEMA_VERSION
    aggregates: dict[str, float | None] = field(default_factory=dict)
    """Means over tasks, written for readers of the file; recomputed when a record is read."""


AGGREGATES: dict[str, tuple[str, str]] = {
    "mcq_acc": ("mcq", "acc"),
    "gen_exact_match": ("gen", "exact_match"),
    "gen_bleu": ("gen", "bleu"),
    "gen_rouge1": ("gen", "rouge1"),
    "gen_rougeL": ("gen", "rougeL"),
}
"""Aggregate -> kind of task and metric."""


def aggregate(record: Record, kinds: Mapping[str, str]) -> dict[str, float | None]:
    """Unweighted means over the suite's tasks of a kind with their standard errors; null unless every task is there.

    Args:
        record: Its ``tasks`` and ``suite_tasks`` are read.
        kinds: Kind of every suite task.

    Returns:
        Each key of ``AGGREGATES``, and the same with ``_stderr`` (root of the summed squared errors over the number of tasks).
    """
    out: dict[str, float | None] = {}
    for name, (kind, metric) in AGGREGATES.items():
        wanted = [task for task in record.suite_tasks if kinds[task] == kind]
        rows = [record.tasks.get(task) for task in wanted]
        complete = bool(rows) and all(row is not None and metric in row.metrics for row in rows)
        out[name] = sum(row.metrics[metric] for row in rows if row) / len(rows) if complete else None
        errors = [row.stderr.get(metric) for row in rows if row]
        known = complete and all(error is not None for error in errors)
        out[f"{name}_stderr"] = math.sqrt(sum(error**2 for error in errors if error is not None)) / len(rows) if known else None
    return out


def to_json(record: Record) -> str:
    """The record as indented JSON; refuses NaN and infinities.

    Raises:
        RecordError: If a value is not finite.
    """
    try:
        return json.dumps(dataclasses.asdict(record), indent=2, sort_keys=False, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise RecordError(f"record of method '{record.method_name}': {error}; NaN and infinities are not results.") from error


def read_record(path: str | Path) -> Record:
    """Read one record file strictly.

    Raises:
        RecordError: Naming the file and the field for anything missing, unknown, of another type, or not finite.
    """
    raw = read_json(path, error=RecordError)
    version = raw.get("schema_version")
    if version not in READABLE:
        known = ", ".join(map(str, READABLE))
        raise RecordError(f"{path}: schema_version {version!r} is not known; this version reads {known}.")
    record = build(Record, raw, str(path), error=RecordError)
    unknown = [task for task in record.tasks if task not in record.suite_tasks]
    if unknown:
        raise RecordError(f"{path}: tasks.{unknown[0]} is not a task of suite '{record.suite}'.")
    if not isinstance(record.provenance.get("git", {}), dict):
        raise RecordError(f"{path}: 'provenance.git' must be an object, got {record.provenance['git']!r}.")
    for task, result in record.tasks.items():
        _check_ranges(result, f"{path}: tasks.{task}")
    return record


def _check_ranges(result: TaskResult, where: str) -> None:
    """Refuse numbers that no evaluation can give: every metric but BLEU is a fraction."""
    if result.num < 1 or not result.metrics:
        raise RecordError(f"{where}: needs at least one question and one metric, got {result.num} and {len(result.metrics)}.")
    for name, value in result.metrics.items():
        most = 100 if name == "bleu" else 1
        if not 0 <= value <= most * (1 + 1e-9):  # sacreBLEU's best value is a little above 100
            raise RecordError(f"{where}: metrics.{name} must be from 0 to {most}, got {value}.")
    for name, error in result.stderr.items():
        if error is not None and error < 0:
            raise RecordError(f"{where}: stderr.{name} cannot be negative, got {error}.")


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a record of the newest version, generated from the dataclasses."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dlplora results record",
        **_object_schema(Record),
        "$defs": {"TaskResult": _object_schema(TaskResult)},
    }


def _object_schema(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    required = [one.name for one in fields if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING]
    properties = {one.name: _type_schema(hints[one.name]) for one in fields}
    if "schema_version" in properties:
        properties["schema_version"] = {"const": SCHEMA_VERSION}
        required.append("schema_version")
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _type_schema(annotation: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return {}
    if annotation is TaskResult:
        return {"$ref": "#/$defs/TaskResult"}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_type_schema(option) for option in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type_schema(arguments[1])}
    if origin is list:
        return {"type": "array", "items": _type_schema(arguments[0])}
    names = {str: "string", float: "number", int: "integer", bool: "boolean", type(None): "null"}
    return {"type": names[annotation]}
