"""``dlplora reproduce SUITE --track unseen``: pools without some experts, a router for each of them, one record per method."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from dlplora.adapters.pool import load_pool, write_manifest
from dlplora.config import config_hash
from dlplora.errors import MethodError
from dlplora.evaluation.cache import eval_cache
from dlplora.evaluation.protocol import Protocol
from dlplora.evaluation.runner import Artifacts, Run, prepare
from dlplora.evaluation.unseen import cell_of, folds_of, leaves_itself_out, measure_folds, unseen_name
from dlplora.progress import Progress, duration
from dlplora.reporting.schema import Record, read_record
from dlplora.reporting.store import find_cell, save
from dlplora.reproduce import artifacts
from dlplora.reproduce.pipeline import Evaluated, Say
from dlplora.reproduce.recipe import ROUTERS, Setting, kind_of
from dlplora.reproduce.training import train

METHODS = (
    "base", "random_route", "avg_delta", "ties", "dlp", "dlp_top1", "lorauter", "retriever_mixture", "arrow_out", "knn_minilm", "logreg",
    "tfidf_linear", "adapter_soup", "lorahub_leave_one_out",
)  # fmt: skip
"""Methods of the track unless others are named."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnseenTrack:
    """What is evaluated, and over what."""

    protocol: Protocol
    protocol_name: str
    setting: Setting
    pool: Path
    """The whole pool."""
    runs: Path
    """Folder of the folds' pools and routers."""
    num_folds: int

    @property
    def tasks(self) -> list[str]:
        """Tasks that are asked; the pool has an expert for each."""
        return list(self.setting.chosen().names)

    @property
    def folds(self) -> list[tuple[str, ...]]:
        """Tasks that are left out together."""
        return folds_of(self.tasks, self.num_folds)


def require_possible(methods: Sequence[str]) -> None:
    """Refuse methods that have nothing to answer an unseen task with.

    Raises:
        MethodError: If a method is told the task and needs its expert, or has gates or an adapter that were trained on all tasks.
    """
    for preset in methods:
        roles = artifacts.roles_of(preset)
        other = [kind_of(role) for role in roles if role not in {"pool", *ROUTERS}]
        if other:
            raise MethodError(
                f"method '{preset}' reads '{other[0]}', trained on the tasks that this track leaves out; it is not trained again."
            )
        if preset.startswith("oracle"):
            raise MethodError(f"method '{preset}' needs the expert of the prompt's own task, which this track takes out of the pool.")


def fold_folder(runs: Path, left_out: Sequence[str]) -> Path:
    """Where pool and router of a fold are."""
    return runs / f"without-{config_hash(list(left_out))}"


def pool_without(pool: Path, left_out: Sequence[str], folder: Path) -> Path:
    """A copy of a pool without some experts, in ``folder/pool``; the manifest is written last, and a finished copy is used again."""
    whole, target = load_pool(pool), folder / "pool"
    names = [name for name in whole.names if name not in left_out]
    if (target / "pool.json").is_file():
        known = load_pool(target)
        if known.names == tuple(names) and all(known.sha256[name] == whole.sha256[name] for name in names):
            return target
    shutil.rmtree(target, ignore_errors=True)
    for name in names:
        shutil.copytree(whole.folders[name], target / name)
    described = {name: whole.rows.get(name, {}).get("description") for name in names}
    write_manifest(target, names, whole.base_model, descriptions=described)
    return target


def setting_without(setting: Setting, left_out: Sequence[str]) -> Setting:
    """The setting in which a router is trained on the other tasks."""
    kept = tuple(name for name in setting.chosen().names if name not in left_out)
    if not setting.shipped:
        return dataclasses.replace(setting, tasks=kept)
    told = f"--data.init_args.tasks={','.join(kept)}"  # recipes of the shipped setting take every task
    return dataclasses.replace(setting, options={role: [*setting.options.get(role, ()), told] for role in ROUTERS})


def _routers(track: UnseenTrack, left_out: Sequence[str], roles: Sequence[str], say: Say) -> dict[str, Path]:
    """The fold's routers, trained where they are missing."""
    folder, setting = fold_folder(track.runs, left_out), setting_without(track.setting, left_out)
    found = {}
    for role in roles:
        artifact = artifacts.locate(role, folder, fresh=True, setting=setting)
        if not artifact.ready:
            say(f"training {role} without {', '.join(left_out)} …")
            start = time.perf_counter()
            train(role, folder, setting=setting)
            say(f"training {role}: {duration(time.perf_counter() - start)}")
        found[role] = artifact.folder
    return found


def runs_of(track: UnseenTrack, preset: str, limit: int | None, say: Say) -> list[Run]:
    """One run a fold; a method that sets the own expert aside by itself has one run over the whole pool."""
    params = leaves_itself_out(preset)
    if params:
        given = Artifacts(pool=track.pool)
        protocol = dataclasses.replace(track.protocol, tasks=track.tasks)
        return [prepare(protocol, track.protocol_name, preset, 0, artifacts=given, method_params=params, limit=limit)]
    roles = [role for role in artifacts.roles_of(preset) if role in ROUTERS]
    runs = []
    for left_out in track.folds:
        given = Artifacts(
            pool=pool_without(track.pool, left_out, fold_folder(track.runs, left_out)), others=_routers(track, left_out, roles, say)
        )
        protocol = dataclasses.replace(track.protocol, tasks=list(left_out))
        runs.append(prepare(protocol, track.protocol_name, preset, 0, artifacts=given, limit=limit))
    return runs


def evaluate_unseen(track: UnseenTrack, methods: Sequence[str], root: Path, say: Say, limit: int | None = None) -> Evaluated:
    """Train the routers and evaluate the methods that have no record yet.

    Raises:
        DLPLoRAError: For a method that the track cannot have, before anything is trained; and what training or evaluation raise.
    """
    require_possible(methods)
    records: list[Record] = []
    num_reused, checksum = 0, load_pool(track.pool).checksum()
    suite = unseen_name(track.protocol.suite)
    with eval_cache() as cache:
        for number, preset in enumerate(methods, start=1):
            label = f"[{number}/{len(methods)}] {preset}"
            runs = runs_of(track, preset, limit, say)
            path = find_cell(cell_of(runs), 0, suite, preset, root, scratch=True)
            if path is not None:
                say(f"{label}: reused {path}")
                num_reused += 1
                records.append(read_record(path))
                continue
            start = time.perf_counter()
            with Progress(label, unit="request", brief=True) as progress:
                record, outcomes = measure_folds(runs, checksum, cache, progress)
            path = save(record, root, outcomes)
            say(f"{label}: {time.perf_counter() - start:.0f} s, {path}")
            records.append(read_record(path))
    return Evaluated(records=tuple(records), num_reused=num_reused)
