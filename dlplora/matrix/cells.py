"""Do the work of a cell: the trainings and evaluations of ``reproduce``, written into the folder of the attempt."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.errors import ConfigError
from dlplora.evaluation.runner import Artifacts, execute, finished, prepare
from dlplora.matrix.plan import Cell, Plan, below
from dlplora.matrix.profiles import Subject
from dlplora.matrix.staging import Moves
from dlplora.progress import Progress
from dlplora.reporting.schema import read_record
from dlplora.reporting.store import samples_path
from dlplora.reproduce import artifacts
from dlplora.reproduce.training import assemble_pool, train, train_experts

if TYPE_CHECKING:
    from dlplora.evaluation.cache import EvalCache

EXPERTS = "experts"
"""Folder, below the shared one, of experts that wait for the others of their pool."""


@dataclass(frozen=True)
class Outcome:
    """Result of a cell."""

    moves: Moves = ()
    """Files to move to their places; empty if they were there already."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For readers of the board."""


class CellRunner:
    """Does cells of a plan in this process; what consecutive evaluations have in common is kept between them.

    Args:
        plan: The plan.
        subjects: Its profiles by name.
        device: Of evaluations; None leaves it to them.
    """

    def __init__(self, plan: Plan, subjects: Mapping[str, Subject], device: str | None = None) -> None:
        self.plan, self.subjects, self.device = plan, subjects, device
        self._kept: tuple[str, EvalCache, ExitStack] | None = None

    def close(self) -> None:
        """Forget the base model that evaluations share."""
        if self._kept is not None:
            self._kept[2].close()
            self._kept = None

    def do(self, cell: Cell, folder: Path) -> Outcome:
        """Do one cell.

        Args:
            cell: The cell; those it needs are done.
            folder: Of the attempt; may hold what an earlier one left to resume from.

        Raises:
            DLPLoRAError: If it cannot be done.
            KeyboardInterrupt: If it was interrupted.
        """
        subject = self.subjects[cell.profile]
        if cell.kind == "evaluate":
            return self._evaluate(cell, subject, folder)
        self.close()  # its memory is the training's now
        with _one_node():
            return self._train(cell, subject, folder)

    def _evaluate(self, cell: Cell, subject: Subject, folder: Path) -> Outcome:
        protocol, setting = subject.over_backbone()
        found = {}
        for role in artifacts.roles_of(cell.name):
            artifact = artifacts.locate(role, subject.runs, fresh=False, seed=cell.seed, setting=setting)
            if not artifact.ready:
                raise ConfigError(f"{artifact.label} is not in {artifact.folder}; was it removed? Plan again.")
            found[role.partition("/")[0]] = artifact.folder
        given = Artifacts(pool=found.pop("pool"), others=found)
        run = prepare(
            protocol, subject.protocol_name, cell.name, cell.seed, artifacts=given, limit=subject.limit, device=self.device
        )  # fmt: skip
        known = finished(run, self.plan.results)
        if known is not None:
            return Outcome(facts={"record": self._place(known), "reused": True})
        with Progress(cell.label, unit="request", brief=True) as progress:
            path, record = execute(run, folder, self._cache(cell.profile), progress)
        inside, target = path.relative_to(folder), self.plan.results / path.relative_to(folder)
        moves = [(str(samples_path(inside)), self._place(samples_path(target)))] if read_record(path).samples_sha256 is not None else []
        return Outcome([*moves, (str(inside), self._place(target))], {"record": self._place(target), "aggregates": record.aggregates})

    def _place(self, target: Path) -> str:
        """Where a file of a cell goes, as the board notes it: relative to the board's folder wherever the plan's folder holds both."""
        inside = below(self.plan.path.parent, target)
        return inside if Path(inside).is_absolute() else str(Path("..") / inside)

    def _cache(self, profile: str) -> EvalCache:
        from dlplora.evaluation.cache import eval_cache

        if self._kept is not None and self._kept[0] != profile:
            self.close()
        if self._kept is None:
            stack = ExitStack()
            self._kept = (profile, stack.enter_context(eval_cache()), stack)
        return self._kept[1]

    def _train(self, cell: Cell, subject: Subject, folder: Path) -> Outcome:
        if cell.kind == "backbone":
            train("backbone", folder, setting=subject.setting)
            return Outcome([("backbone", self._place(subject.runs / "backbone"))])
        setting = subject.over_backbone()[1]
        if cell.kind == "experts":
            train_experts(cell.name.split(","), folder / "part", folder / "resume", seed=cell.seed, setting=setting)
            return Outcome([("part", f"{EXPERTS}/{cell.id}")])
        artifact = artifacts.locate(cell.name, subject.runs, fresh=False, seed=cell.seed, setting=setting)
        if artifact.ready:
            return Outcome(facts={"reused": True})
        inside = artifacts.artifact_dir(folder, cell.seed) / cell.name
        if cell.name == "pool":
            self._assemble(cell, setting.chosen().names, inside)
            artifacts.write_recipe("pool", inside, cell.seed, setting)
        else:
            pool = artifacts.locate("pool", subject.runs, fresh=False, seed=cell.seed, setting=setting)
            train(cell.name, folder, seed=cell.seed, pool=pool.folder, setting=setting)
        return Outcome([(str(inside.relative_to(folder)), self._place(artifact.folder))])

    def _assemble(self, cell: Cell, names: tuple[str, ...], inside: Path) -> None:
        parts = {}
        for part in (one for one in self.plan.cells if one.id in set(cell.after)):
            parts.update(dict.fromkeys(part.name.split(","), self.plan.folder / EXPERTS / part.id))
        assemble_pool(parts, inside, names)


@contextmanager
def _one_node() -> Iterator[None]:
    """Keep Lightning from taking the tasks of a Slurm array for the processes of one training; it looks at the job's name."""
    before = os.environ.get("SLURM_JOB_NAME")
    if "SLURM_JOB_ID" in os.environ:
        os.environ["SLURM_JOB_NAME"] = "interactive"
    try:
        yield
    finally:
        if before is not None:
            os.environ["SLURM_JOB_NAME"] = before
