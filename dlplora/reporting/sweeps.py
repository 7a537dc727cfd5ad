"""Sweeps: one setting of a method varied over a part of a suite's questions; no deep-learning package.

A sweep file is no record: its runs are limited, so they stand in no table, and only figures are drawn from it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlplora.atomic import write_atomically
from dlplora.errors import RecordError, nearest
from dlplora.reporting.store import RESULTS

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep."""

    sweep: str
    """Which question the run belongs to, such as ``nucleus_p``."""
    series: str
    """Which curve of the sweep."""
    x: float
    """Value of the varied setting."""
    num: int
    """Questions answered."""
    metrics: dict[str, float | None]
    """Aggregates as in records (fractions, BLEU 0 to 100) with their ``_stderr``, and routing statistics; null: not measured."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Everything else that was set, enough to run the point again."""


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """The points of one benchmark on one suite."""

    name: str
    suite: str
    limit: int
    """Questions a task."""
    points: tuple[Point, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def of(self, sweep: str) -> dict[str, list[Point]]:
        """Series -> points of a sweep, by rising x."""
        found: dict[str, list[Point]] = {}
        for point in self.points:
            if point.sweep == sweep:
                found.setdefault(point.series, []).append(point)
        return {series: sorted(points, key=lambda one: one.x) for series, points in found.items()}


def sweep_path(suite: str, name: str, root: Path = RESULTS) -> Path:
    """Where the sweep of a suite is."""
    return root / "sweeps" / f"{suite}_{name}.json"


def write_sweep(sweep: SweepFile, root: Path = RESULTS) -> Path:
    """Replace the file of a sweep, one point a line.

    Raises:
        RecordError: If a number is not finite.
    """
    head = {"format": FORMAT, "name": sweep.name, "suite": sweep.suite, "limit": sweep.limit, "provenance": sweep.provenance}
    try:
        lines = [json.dumps(dataclasses.asdict(point), allow_nan=False, ensure_ascii=False) for point in sweep.points]
        text = json.dumps(head, indent=1, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise RecordError(f"sweep '{sweep.name}': {error}; NaN and infinities are not results.") from error
    path = sweep_path(sweep.suite, sweep.name, root)
    write_atomically(path, text[:-2] + ',\n "points": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n")
    return path


def read_sweep(path: Path) -> SweepFile:
    """Read a sweep file strictly.

    Raises:
        RecordError: Naming file and field of what is missing, unknown, of another type or not finite.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read: {error}.") from error
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}: not JSON ({error.msg}, line {error.lineno}).") from error
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT or not isinstance(raw.get("points"), list):
        raise RecordError(f"{path}: not a sweep file of format {FORMAT}.")
    points = tuple(_built(Point, row, f"{path}: points[{number}]") for number, row in enumerate(raw.pop("points")))
    return _built(SweepFile, {**raw, "points": points}, str(path))  # type: ignore[no-any-return]


TYPES: dict[str, type | types.UnionType] = {
    "sweep": str, "series": str, "x": int | float, "num": int, "metrics": dict, "settings": dict,
    "name": str, "suite": str, "limit": int, "points": tuple, "provenance": dict,
}  # fmt: skip


def _built(cls: type, raw: Any, where: str) -> Any:
    known = {one.name: one for one in dataclasses.fields(cls)}
    if not isinstance(raw, dict):
        raise RecordError(f"{where} must be an object, got {type(raw).__name__}.")
    for key, value in raw.items():
        if key not in known:
            raise RecordError(f"{where}: unknown field '{key}'.{nearest(key, known)}")
        numbers = value.values() if key == "metrics" and isinstance(value, dict) else [value] if key == "x" else []
        fits = all(one is None or (isinstance(one, (int, float)) and math.isfinite(one)) for one in numbers)
        if not isinstance(value, TYPES[key]) or isinstance(value, bool) or not fits:
            raise RecordError(f"{where}: field '{key}' has the wrong type or is not finite.")
    for name, one in known.items():
        if name not in raw and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise RecordError(f"{where}: field '{name}' is missing.")
    return cls(**raw)


def load_sweeps(suite: str, root: Path = RESULTS) -> tuple[list[SweepFile], list[str]]:
    """Every sound sweep file of a suite, and one message for each that is not."""
    found: list[SweepFile] = []
    problems: list[str] = []
    for path in sorted((root / "sweeps").glob(f"{suite}_*.json")):
        try:
            found.append(read_sweep(path))
        except RecordError as error:
            problems.append(str(error))
    return found, problems


def points_of(files: Sequence[SweepFile], sweep: str) -> dict[str, list[Point]]:
    """Series -> points of a sweep, of whichever file holds it."""
    found: dict[str, list[Point]] = {}
    for file in files:
        found.update(file.of(sweep))
    return found
