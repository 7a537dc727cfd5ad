"""From profiles to cells: what ``reproduce`` would train and evaluate, one cell per step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlplora.config import config_hash, load_yaml
from dlplora.evaluation.preconditions import require_limit, require_seed
from dlplora.evaluation.protocol import load_protocol
from dlplora.matrix.plan import Cell, Kind, Request
from dlplora.matrix.predictions import Predictions
from dlplora.matrix.subject import Subject, method_facts
from dlplora.reproduce import artifacts, paper, pipeline
from dlplora.reproduce.recipe import NANO, TRAINED
from dlplora.tasks.registry import get_suite

NANO_PROFILE = "nano"


def subjects_of(request: Request, folder: Path) -> list[Subject]:
    """The profiles of a request; every name is checked.

    Args:
        request: The request.
        folder: Shared by the workers; artifacts go below it.

    Raises:
        DLPLoRAError: For an unknown profile, method, task or seed.
    """
    require_limit(request.limit)
    for seed in request.seeds or ():
        require_seed(seed)
    return [_nano(request, folder) if name == NANO_PROFILE else _paper(request, name, folder) for name in request.profiles]


def _nano(request: Request, folder: Path) -> Subject:
    protocol = load_protocol("nano", {"tasks": request.tasks} if request.tasks else {})
    get_suite(protocol.suite).select(protocol.tasks)
    methods = tuple(dict.fromkeys(request.methods or pipeline.NANO_METHODS))
    pipeline.roles_of(methods)
    seeds = tuple(request.seeds if request.seeds is not None else protocol.seeds)
    runs = folder / "artifacts" / NANO_PROFILE
    return Subject(NANO_PROFILE, protocol, "nano", NANO, methods, seeds, runs, None, request.limit)


def _paper(request: Request, name: str, folder: Path) -> Subject:
    overrides = {key: value for key, value in (("tasks", request.tasks), ("data_root", request.data_root)) if value}
    job = paper.resolve(name, overrides, request.methods, request.seeds, folder / "artifacts" / config_hash(name), also=[NANO_PROFILE])
    return Subject(name, job.protocol, job.protocol_name, job.setting, job.methods, job.seeds, job.runs, job, request.limit)


def cells_of(subject: Subject, request: Request, speed_tflops: float | None = None) -> list[Cell]:
    """The cells of a profile that still have to be done, in an order in which every cell comes after those it needs.

    Args:
        subject: The profile.
        request: How many experts share a cell.
        speed_tflops: What a worker computes in a second, 1e12 operations, for predictions; None predicts no time but nano's.
    """
    return list(_Planner(subject, request, Predictions(subject, speed_tflops)).cells())


class _Planner:
    def __init__(self, subject: Subject, request: Request, predictions: Predictions) -> None:
        self.subject, self.request, self.predictions = subject, request, predictions
        self.setting = None if subject.trains_backbone else subject.over_backbone()[1]

    def cells(self) -> Iterator[Cell]:
        subject = self.subject
        first: list[str] = []
        if subject.trains_backbone:
            cell = self._cell("backbone", "backbone", 0, [], self._config("backbone"))
            yield cell
            first = [cell.id]
        for seed in subject.seeds:
            made: dict[str, str] = {}
            for role in subject.roles:
                if self._ready(role, seed):
                    continue
                for cell in self._training(role, seed, first, made):
                    made[role] = cell.id  # of several cells the last one is the artifact
                    yield cell
            for method in subject.methods:
                after = [made[role] for role in artifacts.roles_of(method) if role in made] or first
                configs = [self._config(role) for role in artifacts.roles_of(method)]
                yield self._cell("evaluate", method, seed, after, [method_facts(method), configs, subject.limit])

    def _ready(self, role: str, seed: int) -> bool:
        if self.setting is None:
            return False
        return artifacts.locate(role, self.subject.runs, fresh=False, seed=seed, setting=self.setting).ready

    def _training(self, role: str, seed: int, first: Sequence[str], made: Mapping[str, str]) -> Iterator[Cell]:
        config = self._config(role)
        if role != "pool":
            gates = role.startswith(TRAINED)
            after = [made["pool"]] if gates and "pool" in made else list(first)
            over = [method_facts(role.removeprefix(TRAINED)), self._config("pool")] if gates else []
            yield self._cell("artifact", role, seed, after, [config, *over])
            return
        names, size = self.subject.setting.chosen().names, self.request.experts_per_cell
        shares = [names[start : start + size] for start in range(0, len(names), size)]
        parts = [self._cell("experts", ",".join(share), seed, first, config) for share in shares]
        yield from parts
        yield self._cell("artifact", "pool", seed, [part.id for part in parts], config)

    def _config(self, role: str) -> dict[str, Any]:
        return load_yaml(artifacts.config_path(role, self.subject.setting))

    def _cell(self, kind: Kind, name: str, seed: int, after: Sequence[str], content: Any) -> Cell:
        # Dependencies are found by content, not by ``after``, which lacks artifacts that existed when the plan was made.
        told = [kind, self.subject.name, self.subject.facts, name, seed, content]
        minutes, memory_gb = self.predictions.of(kind, name)
        return Cell(
            id=config_hash(told), kind=kind, profile=self.subject.name, name=name, seed=seed, after=list(after), minutes=minutes,
            memory_gb=memory_gb,
        )  # fmt: skip
