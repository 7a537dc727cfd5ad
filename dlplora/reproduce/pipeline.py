"""The main job: artifacts, evaluation of every method, tables. Every finished step is reused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlplora.evaluation.cache import EvalCache, eval_cache
from dlplora.evaluation.protocol import Protocol
from dlplora.evaluation.runner import Artifacts, Run, execute, finished, prepare
from dlplora.reporting import tables
from dlplora.reporting.schema import Record, read_record
from dlplora.reporting.store import RESULTS, load_all
from dlplora.reproduce import artifacts as assets
from dlplora.reproduce.recipe import NANO, Setting

METHODS = tables.REFERENCE_ROWS
SECONDS = {"pool": 600, "router": 45, "evaluate": 25}
"""What a step took on two cores of a server CPU, for the announcement only."""
SECONDS_OF_ANOTHER_TRAINING = 420
UNFINISHED = ".fresh_unfinished"
Folders = dict[tuple[int, str], Path]
"""Seed and role -> folder."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run of ``reproduce`` will do."""

    artifacts: tuple[assets.Asset, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    setting: Setting = NANO

    def lines(self) -> Iterator[str]:
        """The announcement, one line a step."""
        for asset in self.artifacts:
            known = self.setting.shipped and not asset.ready
            cost = f", about {SECONDS.get(asset.role, SECONDS_OF_ANOTHER_TRAINING)} s on two cores" if known else ""
            seed = f", seed {asset.seed}" if asset.seed else ""
            yield f"{asset.role}{seed}: {asset.source} ({asset.folder}){cost}"
        total = f"at most {SECONDS['evaluate'] * len(self.methods) * len(self.seeds)} s; " if self.setting.shipped else ""
        seeds = ", ".join(map(str, self.seeds))
        yield f"evaluate {', '.join(self.methods)} with seed(s) {seeds}: {total}finished cells are reused"


def roles_of(methods: Sequence[str]) -> list[str]:
    """Artifacts that the methods read, each once; the pool first, since gates are trained over it."""
    return list(dict.fromkeys(role for method in methods for role in assets.roles_of(method)))


def begin_fresh(methods: Sequence[str], seeds: Sequence[int], runs: Path) -> None:
    """Start a fresh training, or go on with one that was interrupted."""
    marker = runs / UNFINISHED
    if not marker.exists():
        for seed in seeds:
            assets.forget(runs, roles_of(methods), seed)
        runs.mkdir(parents=True, exist_ok=True)
        marker.touch()


def plan(methods: Sequence[str], seeds: Sequence[int], runs: Path, *, fresh: bool, setting: Setting = NANO) -> Plan:
    """What has to be trained and evaluated."""
    artifacts = tuple(assets.locate(role, runs, fresh=fresh, seed=seed, setting=setting) for seed in seeds for role in roles_of(methods))
    return Plan(artifacts=artifacts, methods=tuple(methods), seeds=tuple(seeds), setting=setting)


def train_missing(planned: Plan, runs: Path, say: Callable[[str], None]) -> Folders:
    """Train what is missing, in order; returns the folder of each seed and role."""
    folders: Folders = {}
    for asset in planned.artifacts:
        if not asset.ready:
            say(f"training {asset.role}{f', seed {asset.seed}' if asset.seed else ''} …")
            pool = folders.get((asset.seed, "pool"))
            assets.train(asset.role, runs, seed=asset.seed, pool=pool, setting=planned.setting)
        folders[asset.seed, asset.role] = asset.folder
    return folders


def runs_of(planned: Plan, protocol: Protocol, name: str, folders: Folders, limit: int | None) -> list[Run]:
    """One run per method and seed; names and folders are checked before the first one starts."""
    runs = []
    for method in planned.methods:
        for seed in planned.seeds:
            own = {role.partition("/")[0]: folders[seed, role] for role in assets.roles_of(method)}
            artifacts = Artifacts(pool=own.pop("pool"), others=own)
            runs.append(prepare(protocol, name, method, seed, artifacts=artifacts, limit=limit))
    return runs


def evaluate_missing(runs: Sequence[Run], root: Path, say: Callable[[str], None]) -> list[Record]:
    """Evaluate what has no record yet; returns all records in order."""
    with eval_cache() as cache:
        return _evaluate_missing(runs, root, say, cache)


def _evaluate_missing(runs: Sequence[Run], root: Path, say: Callable[[str], None], cache: EvalCache) -> list[Record]:
    records = []
    for number, run in enumerate(runs, start=1):
        label = f"[{number}/{len(runs)}] {run.spec.name}, seed {run.seed}"
        known = finished(run, root)
        if known is not None:
            say(f"{label}: reused {known}")
            records.append(read_record(known))
            continue
        start = time.perf_counter()
        path, record = execute(run, root, cache)
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
