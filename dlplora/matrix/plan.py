"""The plan file: a header line, then one line per cell, each after the cells it needs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dlplora.atomic import write_atomically
from dlplora.config import build, config_hash
from dlplora.documents import parse_json, read_text
from dlplora.errors import ConfigError
from dlplora.provenance import git_state, versions

PLAN_VERSION = 1
MAX_PLAN_BYTES = 200_000_000
Kind = Literal["backbone", "experts", "artifact", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One piece of work; equal pieces have equal ids."""

    id: str
    kind: Kind
    profile: str
    """One of the header's."""
    name: str
    """Expert names (comma-separated), a role of ``reproduce.artifacts``, or a method; what ``kind`` says."""
    seed: int
    after: list[str]
    """Ids of the cells that it depends on."""
    minutes: float | None = None
    """Predicted; None where nothing is known."""
    memory_gb: float | None = None
    """Predicted, of the device; None likewise."""

    @property
    def label(self) -> str:
        """How messages call it."""
        what = self.name if len(self.name) <= 40 else f"{self.name[:37]}..."
        return f"{self.kind} {what}, {self.profile}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The request: everything a worker needs to find the same profiles again."""

    profiles: list[str]
    """``nano``, names or files as ``reproduce paper --backbone`` takes them, base models."""
    methods: list[str] | None = None
    """None takes each profile's own."""
    seeds: list[int] | None = None
    """None takes each protocol's own."""
    tasks: list[str] | None = None
    data_root: str | None = None
    limit: int | None = None
    """Questions per task."""
    experts_per_cell: int = 1
    results: str | None = None
    """Results folder; None is a folder next to the plan."""
    lease_s: float = 120.0
    """How long a worker may be silent before its cell is taken over."""
    max_deaths: int = 5
    """Workers that may die over a cell before it counts as failed."""

    def __post_init__(self) -> None:
        if not self.profiles or len(set(self.profiles)) != len(self.profiles):
            raise ConfigError("'profiles' must name at least one profile, each once.")
        for name, least in (("experts_per_cell", 1), ("lease_s", 1), ("max_deaths", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"'{name}' must be at least {least}, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What holds for the whole plan."""

    request: Request
    profile_hashes: dict[str, str]
    """Profile -> hash of everything that decides its numbers: protocol, training configurations, methods' parameters, rows."""
    versions: dict[str, str | None]
    commit: str | None
    num_cells: int
    cells_hash: str
    kind: str = "matrix"
    version: int = PLAN_VERSION


@dataclass(frozen=True)
class Plan:
    """A plan that was read."""

    path: Path
    header: Header
    cells: Sequence[Cell] = field(repr=False)

    @property
    def folder(self) -> Path:
        """Folder next to the plan that the workers share."""
        return self.path.with_suffix(".work")

    @property
    def results(self) -> Path:
        """The results folder."""
        given = self.header.request.results
        return self.folder / "results" if given is None else (self.path.parent / given)


def below(folder: Path, place: Path) -> str:
    """A path for others to use: relative to a folder that it lies in, since machines mount a shared folder in different places."""
    place, folder = place.resolve(), folder.resolve()
    return str(place.relative_to(folder)) if place.is_relative_to(folder) else str(place)


def make_header(request: Request, hashes: Mapping[str, str], cells: Sequence[Cell]) -> Header:
    """The header for some cells, with the versions of this process."""
    return Header(
        request=request, profile_hashes=dict(hashes), versions=versions(), commit=git_state()["commit"], num_cells=len(cells),
        cells_hash=_cells_hash(cells),
    )  # fmt: skip


def _cells_hash(cells: Sequence[Cell]) -> str:
    return config_hash([dataclasses.asdict(cell) for cell in cells])


def write_plan(path: Path, header: Header, cells: Sequence[Cell]) -> None:
    """Write a plan atomically."""
    lines = [json.dumps(one, ensure_ascii=False) for one in (dataclasses.asdict(header), *map(dataclasses.asdict, cells))]
    write_atomically(path, "\n".join(lines) + "\n")


def read_plan(path: Path) -> Plan:
    """Read a plan strictly.

    Raises:
        ConfigError: If a line is missing, changed or misspelt, or a cell needs one that does not come before it.
    """
    first, *lines = read_text(path, max_bytes=MAX_PLAN_BYTES).splitlines() or [""]
    raw = parse_json(first, f"{path}: line 1")
    if not isinstance(raw, dict) or (raw.get("kind"), raw.get("version")) != ("matrix", PLAN_VERSION):
        raise ConfigError(f"{path}: expected a plan of version {PLAN_VERSION} in line 1. `dlplora matrix plan` writes one.")
    header = build(Header, raw, f"{path}: line 1")
    cells = [build(Cell, parse_json(line, f"{path}: line {n}"), f"{path}: line {n}") for n, line in enumerate(lines, start=2)]
    if len(cells) != header.num_cells or _cells_hash(cells) != header.cells_hash:
        raise ConfigError(f"{path}: its {len(cells)} cells are not the {header.num_cells} that were written. Plan again.")
    known: set[str] = set()
    for cell in cells:
        if cell.id in known or not known.issuperset(cell.after):
            raise ConfigError(f"{path}: cell {cell.id} comes twice, or before one that it needs.")
        known.add(cell.id)
    return Plan(path, header, cells)


def require_same_code(plan: Plan) -> None:
    """Refuse to work with other packages than those of the plan: cells of one table must come from the same code.

    Raises:
        ConfigError: Naming the first difference.
    """
    again = "Use the plan's, or plan again with these: finished cells are kept."
    here = versions()
    for name, wanted in plan.header.versions.items():
        if name == "python":
            continue  # a patch release moves no number
        if here.get(name) != wanted:
            raise ConfigError(f"{plan.path} was made with {name} {wanted}, here is {here.get(name)}. {again}")
    commit = git_state()["commit"]
    if None not in (commit, plan.header.commit) and commit != plan.header.commit:
        raise ConfigError(f"{plan.path} was made at commit {str(plan.header.commit)[:9]}, here is {str(commit)[:9]}. {again}")


def require_same_profiles(plan: Plan, hashes: Mapping[str, str]) -> None:
    """Refuse to work on a profile that is not the plan's any more.

    Args:
        plan: The plan.
        hashes: Profile -> its hash here and now.

    Raises:
        ConfigError: Naming the profile.
    """
    for name, wanted in plan.header.profile_hashes.items():
        if hashes.get(name) != wanted:
            raise ConfigError(
                f"profile '{name}' has changed since {plan.path} was made (protocol, training configurations, methods or rows). "
                "Plan again: cells that are still the same are kept."
            )
