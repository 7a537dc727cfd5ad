"""Sweeps: one setting of a method varied over part of a suite's questions. No deep-learning package.

A sweep file is not a record. Its runs are limited, so it appears in no table; only figures are drawn from it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlplora.atomic import write_atomically
from dlplora.config import build
from dlplora.documents import read_json
from dlplora.errors import RecordError
from dlplora.reporting.store import RESULTS

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep."""

    sweep: str
    """Name of the sweep that the run belongs to, for example ``nucleus_p``."""
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
    """Questions per task."""
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
    """Replace the file of a sweep, one point per line.

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
    raw = read_json(path, error=RecordError)
    if raw.pop("format", None) != FORMAT or not isinstance(raw.get("points"), list):
        raise RecordError(f"{path}: not a sweep file of format {FORMAT}.")
    return build(SweepFile, raw, str(path), error=RecordError)


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
