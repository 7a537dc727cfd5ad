"""The main job on the nano suite: artefacts, evaluation of every method, tables. Every finished step is reused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlplora.evaluation import assets
from dlplora.evaluation.protocol import Protocol
from dlplora.evaluation.runner import Artifacts, Run, execute, finished, prepare
from dlplora.reporting import tables
from dlplora.reporting.schema import Record, read_record
from dlplora.reporting.store import RESULTS, load_all

METHODS = ("base", "oracle", "multitask", "avg_delta", "dlp", "dlp_code")
SECONDS = {"pool": 600, "multitask": 420, "router": 45, "evaluate": 25}
"""What a step took on two cores of a server CPU, for the announcement only."""
UNFINISHED = ".fresh_unfinished"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run of ``reproduce`` will do."""

    artefacts: tuple[assets.Asset, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]

    def lines(self) -> Iterator[str]:
        """The announcement, one line a step."""
        for asset in self.artefacts:
            cost = "" if asset.ready else f", about {SECONDS[asset.role]} s on two cores"
            yield f"{asset.role}: {asset.source} ({asset.folder}){cost}"
        total = SECONDS["evaluate"] * len(self.methods) * len(self.seeds)
        seeds = ", ".join(map(str, self.seeds))
        yield f"evaluate {', '.join(self.methods)} with seed(s) {seeds}: at most {total} s; finished cells are reused"


def begin_fresh(runs: Path) -> None:
    """Start a fresh training, or go on with one that was interrupted."""
    marker = runs / UNFINISHED
    if not marker.exists():
        assets.forget(runs)
        runs.mkdir(parents=True, exist_ok=True)
        marker.touch()


def plan(protocol: Protocol, methods: Sequence[str], runs: Path, *, fresh: bool) -> Plan:
    """What has to be trained and evaluated."""
    artefacts = tuple(assets.locate(role, runs, fresh=fresh) for role in assets.CONFIGS)
    return Plan(artefacts=artefacts, methods=tuple(methods), seeds=tuple(protocol.seeds))


def train_missing(planned: Plan, runs: Path, say: Callable[[str], None]) -> Artifacts:
    """Train what is missing, in order; returns the folders to evaluate."""
    folders: dict[str, Path] = {}
    for asset in planned.artefacts:
        if not asset.ready:
            say(f"training the {asset.role} …")
            assets.train(asset.role, runs)
        folders[asset.role] = asset.folder
    return Artifacts(pool=folders["pool"], router=folders["router"], multitask=folders["multitask"])


def runs_of(planned: Plan, protocol: Protocol, name: str, artefacts: Artifacts, limit: int | None) -> list[Run]:
    """One run per method and seed; names and folders are checked before the first one starts."""
    return [prepare(protocol, name, method, seed, artifacts=artefacts, limit=limit) for method in planned.methods for seed in planned.seeds]


def evaluate_missing(runs: Sequence[Run], root: Path, say: Callable[[str], None]) -> list[Record]:
    """Evaluate what has no record yet; returns all records in order."""
    records = []
    for number, run in enumerate(runs, start=1):
        label = f"[{number}/{len(runs)}] {run.spec.name}, seed {run.seed}"
        known = finished(run, root)
        if known is not None:
            say(f"{label}: reused {known}")
            records.append(read_record(known))
            continue
        start = time.perf_counter()
        path, record = execute(run, root)
        say(f"{label}: {time.perf_counter() - start:.0f} s, {path}")
        records.append(record)
    return records


def finish(runs: Path) -> None:
    """Mark a fresh training as complete, so that the next one starts anew."""
    (runs / UNFINISHED).unlink(missing_ok=True)


def refresh_tables(suite: str, root: Path = RESULTS, readme: Path | None = None) -> list[Path]:
    """Rewrite tables and README block from all publishable records."""
    records, _ = load_all(root, suite)
    return tables.build(records, suite, root, readme)
