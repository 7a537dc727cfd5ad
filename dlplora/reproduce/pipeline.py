"""The steps of ``dlplora reproduce``: train missing artifacts, evaluate every method. Finished steps are reused."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dlplora.evaluation.cache import EvalCache, eval_cache
from dlplora.evaluation.protocol import Protocol
from dlplora.evaluation.runner import Artifacts, Run, execute, finished, prepare
from dlplora.methods.registry import MethodSpec, load_method_spec
from dlplora.progress import Progress, duration
from dlplora.reporting import tables
from dlplora.reporting.columns import REFERENCE_ROWS
from dlplora.reporting.schema import Record, read_record
from dlplora.reporting.store import RESULTS, load_all
from dlplora.reporting.tuning import Trial, tuned_name, validated_settings
from dlplora.reproduce import artifacts
from dlplora.reproduce.recipe import NANO, Setting
from dlplora.reproduce.training import train

NANO_METHODS = (
    *REFERENCE_ROWS,
    "dlp_top1",
    "ties",
    "arrow_out",
    "lorauter",
    "retriever_mixture",
    "meteora_gate",
    "mole",
    "xlora",
)
"""Methods of ``dlplora reproduce nano`` unless others are named: the reference rows, and of every family of methods one or two (merging,
routing without training, retrieval, trained gates). Together they take about two minutes on two cores."""
SECONDS = {"pool": 600, "router": 60, "evaluate": 25}
"""What a step took on two cores of a server CPU, for the announcement only."""
SECONDS_OF_ANOTHER_TRAINING = 420
UNFINISHED = ".fresh_unfinished"
Folders = dict[tuple[int, str], Path]
"""Seed and role -> folder."""
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ReproduceJob:
    """What a run of ``reproduce`` will do."""

    artifacts: tuple[artifacts.Artifact, ...]
    specs: tuple[MethodSpec, ...]
    """The methods, as their files were read."""
    seeds: tuple[int, ...]
    setting: Setting = NANO

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods."""
        return tuple(spec.name for spec in self.specs)

    def lines(self) -> Iterator[str]:
        """The announcement, one line per step."""
        for artifact in self.artifacts:
            known = self.setting.shipped and not artifact.ready
            cost = f", about {SECONDS.get(artifact.role, SECONDS_OF_ANOTHER_TRAINING)} s on two cores" if known else ""
            yield f"{artifact.label}: {artifact.source} ({artifact.folder}){cost}"
        total = f"at most {SECONDS['evaluate'] * len(self.methods) * len(self.seeds)} s; " if self.setting.shipped else ""
        seeds = ", ".join(map(str, self.seeds))
        yield f"evaluate {', '.join(self.methods)} with seed(s) {seeds}: {total}finished cells are reused"


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The records of a job, in order."""

    records: tuple[Record, ...]
    num_reused: int
    """Records that an earlier run had finished."""


def roles_of(methods: Sequence[str | MethodSpec]) -> list[str]:
    """Artifacts that the methods read, each once; the pool first, since gates are trained over it."""
    return list(dict.fromkeys(role for method in methods for role in artifacts.roles_of(method)))


def begin_fresh(methods: Sequence[str], seeds: Sequence[int], runs: Path, results: Path | None) -> None:
    """Start a fresh training, or continue one that was interrupted.

    Args:
        methods, seeds: Whose artifacts are deleted.
        runs: Folder of the artifacts.
        results: Folder of records to delete as well, so that every method is evaluated again; None keeps them.
    """
    marker = runs / UNFINISHED
    if marker.exists():
        return
    for seed in seeds:
        artifacts.delete_artifacts(runs, roles_of(methods), seed)
    if results is not None:
        shutil.rmtree(results, ignore_errors=True)
    runs.mkdir(parents=True, exist_ok=True)
    marker.touch()


def make_job(methods: Sequence[str], seeds: Sequence[int], runs: Path, *, fresh: bool, setting: Setting = NANO) -> ReproduceJob:
    """Find out what has to be trained and evaluated."""
    specs = tuple(load_method_spec(method) for method in methods)
    found = tuple(artifacts.locate(role, runs, fresh=fresh, seed=seed, setting=setting) for seed in seeds for role in roles_of(specs))
    return ReproduceJob(artifacts=found, specs=specs, seeds=tuple(seeds), setting=setting)


def train_missing(job: ReproduceJob, runs: Path, say: Say) -> Folders:
    """Train what is missing, in order; returns the folder of each seed and role."""
    folders: Folders = {}
    for artifact in job.artifacts:
        if not artifact.ready:
            say(f"training {artifact.label} …")
            start = time.perf_counter()
            train(artifact.role, runs, seed=artifact.seed, pool=folders.get((artifact.seed, "pool")), setting=job.setting)
            say(f"training {artifact.label}: {duration(time.perf_counter() - start)}")
        folders[artifact.seed, artifact.role] = artifact.folder
    return folders


def runs_of(
    job: ReproduceJob, protocol: Protocol, name: str, folders: Folders, limit: int | None, trials: Sequence[Trial] = ()
) -> list[Run]:
    """One run per method and seed; names and folders are checked before the first one starts.

    Args:
        job: What is evaluated.
        protocol, name: How, and what the records call it.
        folders: Of the artifacts.
        limit: Questions per task; None takes all.
        trials: Of any method. One that is better off with other settings than the preset's gets a second run with these.
    """
    runs = []
    for spec in job.specs:
        for seed in job.seeds:
            own = {role.partition("/")[0]: folders[seed, role] for role in artifacts.roles_of(spec)}
            given = Artifacts(pool=own.pop("pool"), others=own)
            runs.append(prepare(protocol, name, spec, seed, artifacts=given, limit=limit))
            if not trials:
                continue  # the name of the base model is a hash of its weights
            settings = validated_settings(trials, spec.name, protocol.suite, name, runs[-1].backbone_name, runs[-1].task_names)
            if settings:
                tuned = replace(load_method_spec(str(spec.path or spec.name), settings), name=tuned_name(spec.name))
                runs.append(prepare(protocol, name, tuned, seed, artifacts=given, limit=limit))
    return runs


def evaluate_missing(runs: Sequence[Run], root: Path, say: Say) -> Evaluated:
    """Evaluate what has no record yet."""
    with eval_cache() as cache:
        return _evaluate_missing(runs, root, say, cache)


def _evaluate_missing(runs: Sequence[Run], root: Path, say: Say, cache: EvalCache) -> Evaluated:
    known = [finished(run, root) for run in runs]
    missing = sum(path is None for path in known)
    begun = time.perf_counter()
    records: list[Record] = []
    num_done = 0
    for number, (run, path) in enumerate(zip(runs, known, strict=True), start=1):
        label = f"[{number}/{len(runs)}] {run.spec.name}, seed {run.seed}"
        if path is not None:
            say(f"{label}: reused {path}")
            records.append(read_record(path))
            continue
        say(f"{label} …")
        start = time.perf_counter()
        with Progress(label, unit="request", brief=True) as progress:
            path, record = execute(run, root, cache, progress)
        num_done += 1
        now = time.perf_counter()
        left = duration((now - begun) / num_done * (missing - num_done))
        say(f"{label}: {now - start:.0f} s, {path}" + (f"; about {left} left" if num_done < missing else ""))
        records.append(record)
    return Evaluated(records=tuple(records), num_reused=len(runs) - missing)


def finish(runs: Path) -> None:
    """Mark a fresh training as complete, so that the next one starts again."""
    (runs / UNFINISHED).unlink(missing_ok=True)


def refresh_tables(suite: str, root: Path = RESULTS, readme: Path | None = None) -> list[Path]:
    """Rewrite tables and README block from all publishable records."""
    records, _ = load_all(root, suite)
    return tables.build(records, suite, root, readme)
