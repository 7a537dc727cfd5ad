"""Run one method under one protocol with one seed, and write one record."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.adapters.hub import find_pool
from dlplora.adapters.pool import load_pool
from dlplora.config import config_hash
from dlplora.errors import DLPLoRAError, TaskError
from dlplora.evaluation.identity import backbone_identity, chosen_dtype, folder_hash, run_device
from dlplora.evaluation.method_code import described_method, method_code
from dlplora.evaluation.outcomes import outcomes_of, standard_errors
from dlplora.evaluation.preconditions import require_artifacts, require_limit, require_seed, require_split, require_task_facts
from dlplora.evaluation.protocol import Protocol
from dlplora.evaluation.reuse import Known, known_cell
from dlplora.evaluation.trained_parts import training_tokens
from dlplora.inference.backbones import nano_asset
from dlplora.inference.loading import method_asset
from dlplora.inference.saving import read as saved_model
from dlplora.methods.base import FusionMethod
from dlplora.methods.registry import MethodSpec, build_method, hashed_params, load_method_spec
from dlplora.progress import Progress
from dlplora.provenance import provenance
from dlplora.reporting.samples import Outcome
from dlplora.reporting.schema import SCHEMA_VERSION, Record, TaskResult, aggregate, read_record
from dlplora.reporting.statistics import detectable_difference
from dlplora.reporting.store import RESULTS, save
from dlplora.tasks.export import rows_sha256
from dlplora.tasks.registry import get_suite
from dlplora.tasks.types import Suite, Task

if TYPE_CHECKING:
    from dlplora.evaluation.cache import EvalCache
    from dlplora.lm_eval.evaluate import HarnessResult
    from dlplora.lm_eval.model import DLPLoRALM


RESULTS_VERSION = "0.1.0"
"""Part of every cell hash; raised only by a release that moves numbers, so that others leave the records of earlier ones in use."""
DISAGREEMENT = 0.1


@dataclass(frozen=True, kw_only=True)
class Artifacts:
    """Folders a run is given; None means the embedded ones where the base model is the embedded one."""

    pool: Path | None = None
    router: Path | None = None
    multitask: Path | None = None
    others: Mapping[str, Path] = field(default_factory=dict)

    def resolved(self, embedded: bool, roles: Sequence[str], preset: str) -> dict[str, Path]:
        """Folder by role, embedded ones filled in; those of a method's own roles where the pool, too, is the embedded one."""
        given: dict[str, Path | None] = {"pool": self.pool, "router": self.router, "multitask": self.multitask, **self.others}
        found: dict[str, Path] = {}
        for role, path in given.items():
            if path is not None:
                found[role] = find_pool(path) if role == "pool" else Path(path)
            elif embedded and nano_asset(role).is_dir():
                found[role] = nano_asset(role)
        for role in roles if embedded and self.pool is None else ():
            shipped = method_asset(role, preset)
            if role not in found and shipped.is_dir():
                found[role] = shipped
        return found


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a run depends on, resolved before anything is loaded."""

    protocol: Protocol
    protocol_name: str
    spec: MethodSpec
    method: FusionMethod
    """Built from ``spec`` and not bound to a pool, to read its declarations; every model gets its own instance."""
    seed: int
    suite: Suite
    folders: Mapping[str, Path]
    limit: int | None = None
    device: str | None = None
    """Where to run; None is the CPU for the embedded model, and the best device of the machine for any other."""

    @property
    def prefix(self) -> str:
        """What lm-eval's names of the tasks have before the suite's."""
        return self.suite.lm_eval_prefix

    @property
    def backbone_name(self) -> str:
        """Name of the base model, as records have it."""
        return str(backbone_identity(self.protocol.backbone, self.protocol.revision)["name"])

    @property
    def task_names(self) -> list[str]:
        """Suite names of the tasks to evaluate."""
        return list(self.protocol.tasks or self.suite.names)

    def description(self) -> dict[str, Any]:
        """What the cell hash covers; equal descriptions give equal numbers."""
        pool = load_pool(self.folders["pool"]) if "pool" in self.folders else None
        return {
            "protocol": self.protocol.hash(),
            "method": self.spec.method,
            "params": hashed_params(self.spec),
            "seed": self.seed,
            "backbone": backbone_identity(self.protocol.backbone, self.protocol.revision),
            "pool": pool.checksum() if pool else None,
            "artifacts": self.artifact_hashes(),
            "tasks": {task.name: self.task_version(task) for task in self.suite.tasks},
            "limit": self.limit,
            **({"device": self.device} if self.device is not None else {}),
            "package": RESULTS_VERSION,
            "schema": SCHEMA_VERSION,
        }

    def task_version(self, task: Task) -> int | str:
        """Version of a generated task, checksum of the rows of any other; of composites of local tasks, the hash of all of them."""
        if task.facts:
            return str(task.facts["sha256"])
        if self.suite.source is not None and any(one.rows for one in self.suite.source.tasks):
            return config_hash([task.version, *(rows_sha256(self.protocol.data_root, one.name) for one in self.suite.source.tasks)])
        return rows_sha256(self.protocol.data_root, task.name) if task.rows else task.version

    def artifact_hashes(self) -> dict[str, str]:
        """Hashes of the artifacts the method reads, by role; the pool has its own checksum."""
        return {
            role: folder_hash(self.folders[role], self.method.unread_files) for role in self.method.artifact_roles if role in self.folders
        }

    def cell(self) -> str:
        """Hash of ``description``."""
        return config_hash(self.description())


def prepare(
    protocol: Protocol,
    protocol_name: str,
    method: str | MethodSpec,
    seed: int,
    *,
    artifacts: Artifacts | None = None,
    method_params: Mapping[str, Any] | None = None,
    limit: int | None = None,
    device: str | None = None,
) -> Run:
    """Resolve a run; every name and folder is checked here. The dtype ``auto`` is resolved, and records name the result.

    A method that was read already takes no further parameters.

    Raises:
        DLPLoRAError: For an unknown suite, task or method, a package that the method needs and lacks, or a folder that does not exist.
    """
    spec = method if isinstance(method, MethodSpec) else load_method_spec(method, method_params)
    built = build_method(spec)
    built.require_packages()
    suite = get_suite(protocol.suite, protocol.data_root)
    require_split(suite, protocol.tasks or suite.names, protocol.split)
    require_limit(limit)
    require_seed(seed)
    folders = (artifacts or Artifacts()).resolved(protocol.backbone is None, built.artifact_roles, spec.name)
    for role, path in folders.items():
        if not path.is_dir():
            raise TaskError(f"{role} folder not found: {path}.")
    experts = load_pool(folders["pool"]).names if "pool" in folders else None
    if experts is not None and saved_model(protocol.backbone) is None:  # a saved model brings its own pool and artifacts
        require_artifacts(built, spec.name, folders)
    require_task_facts(built, suite, protocol.tasks or suite.names, experts)
    protocol = dataclasses.replace(protocol, dtype=chosen_dtype(protocol, device))
    return Run(
        protocol=protocol,
        protocol_name=protocol_name,
        spec=spec,
        method=built,
        seed=seed,
        suite=suite,
        folders=folders,
        limit=limit,
        device=device,
    )


def power_note(run: Run) -> str:
    """The smallest difference between two methods that the questions of a run can show, in words."""
    tasks = [run.suite.task(name) for name in run.task_names]
    counts = [run.suite.num_test(task) for task in tasks]
    num = sum(min(count, run.limit or count) for count in counts)
    smallest = detectable_difference(num, DISAGREEMENT)
    what = f"two methods that disagree on {100 * DISAGREEMENT:.0f} % of {num} questions"
    if smallest > 0.99 * DISAGREEMENT:
        return f"too few to tell apart {what}"
    return f"{what} are told apart if they differ by {100 * smallest:.1f} points (power 80 %, 5 %)"


def known_record(run: Run, root: Path = RESULTS) -> Known:
    """The record of an equal run that already finished under the present code, and what is to be said of it."""
    return known_cell(run.cell(), run.seed, run.suite.name, run.spec.name, type(run.method), root)


def finished(run: Run, root: Path = RESULTS) -> Path | None:
    """The record of an equal run that already finished under the present code, if there is one."""
    return known_record(run, root).path


def execute(run: Run, root: Path = RESULTS, cache: EvalCache | None = None, progress: Progress | None = None) -> tuple[Path, Record]:
    """Evaluate and write the record; a failure is written to ``scratch`` and raised again.

    What is refused before the evaluation begins (an unfit pool, gates of another pool, a missing encoder) leaves nothing behind.

    Args:
        run: What to evaluate.
        root: Results folder.
        cache: What this run shares with others; None shares nothing.
        progress: Shows the questions that are done; None leaves that to lm-eval.

    Raises:
        DLPLoRAError: What the evaluation raised.
    """
    begun = False

    def begin() -> None:
        nonlocal begun
        begun = True

    try:
        record, outcomes = measure(run, cache, progress, begin)
    except DLPLoRAError as error:
        if begun:
            save(dataclasses.replace(blank_record(run), status="failed", error=str(error)), root)
        raise
    path = save(record, root, outcomes)
    return path, read_record(path)  # with the checksum of its outcomes


def measure(
    run: Run, cache: EvalCache | None = None, progress: Progress | None = None, loaded: Callable[[], None] = lambda: None
) -> tuple[Record, list[Outcome]]:
    """Evaluate and write nothing; arguments and errors as for ``execute``.

    Args:
        loaded: Called when the model is there and the evaluation begins.
    """
    started = time.perf_counter()
    with open_model(run, cache) as lm:
        ready = time.perf_counter()
        loaded()
        result = evaluate_run(run, lm, cache, progress)
        timings = {"load": ready - started, "evaluate": time.perf_counter() - ready}
        outcomes = outcomes_of(result, run.prefix, lm.statistics.routes)
        return make_record(run, lm, result, timings, standard_errors(outcomes, run.protocol.bootstrap_iters)), outcomes


@contextmanager
def open_model(run: Run, cache: EvalCache | None = None) -> Iterator[DLPLoRALM]:
    """The run's model for the time of the block."""
    lm = _load(run)
    if cache is not None:
        lm.encodings = cache.encodings(run.protocol.backbone, run.protocol.revision)
    try:
        yield lm
    finally:
        lm.close()


def _load(run: Run) -> DLPLoRALM:
    from dlplora.inference.fused_model import FusedCausalLM
    from dlplora.lm_eval.model import DLPLoRALM

    protocol = run.protocol
    fused = FusedCausalLM.from_pretrained(
        protocol.backbone,
        pool=run.folders.get("pool"),
        method=run.spec,
        artifacts={role: path for role, path in run.folders.items() if role != "pool"},
        dtype=protocol.dtype,
        device=run_device(protocol.backbone, run.device),
        **protocol.loading(),
        seed=run.seed,
        few_shot=lambda task, num: (run.suite.source or run.suite).task(task).items("train", num),
    )
    options: dict[str, Any] = {} if protocol.max_length is None else {"max_length": protocol.max_length}
    return DLPLoRALM(fused=fused, batch_size=protocol.batch_size, **options)


def evaluate_run(run: Run, lm: DLPLoRALM, cache: EvalCache | None = None, progress: Progress | None = None) -> HarnessResult:
    """The run's tasks through lm-eval, with every question's outcome."""
    from dlplora.evaluation.cache import eval_cache
    from dlplora.lm_eval.evaluate import evaluate

    protocol = run.protocol
    with nullcontext(cache) if cache is not None else eval_cache() as common:
        return evaluate(
            lm,
            common.tasks(run.suite, run.task_names, data_root=protocol.data_root, num_fewshot=protocol.num_fewshot, split=protocol.split),
            limit=run.limit,
            num_fewshot=protocol.num_fewshot,
            seed=run.seed,
            log_samples=True,
            bootstrap_iters=0,  # errors are computed from the outcomes: lm-eval's bootstrap of BLEU takes longer than the evaluation
            apply_chat_template=protocol.apply_chat_template,
            progress_bar=None if progress is None else progress.phase,
        )


def blank_record(run: Run) -> Record:
    """A record with everything known before the run."""
    tasks = [run.suite.task(name) for name in run.task_names]
    facts = {task.name: dict(task.facts) for task in tasks if task.facts}
    rows = {task.name: version for task in tasks if not task.facts and isinstance(version := run.task_version(task), str)}
    return Record(
        suite=run.suite.name,
        protocol_name=run.protocol_name,
        protocol={**run.protocol.resolved(), "data_root": None},  # rows are named by their checksums, not by a folder of this machine
        protocol_hash=run.protocol.hash(),
        method_name=run.spec.name,
        method=described_method(run.spec),
        method_hash=config_hash([run.spec.method, hashed_params(run.spec)]),
        seed=run.seed,
        backbone=backbone_identity(run.protocol.backbone, run.protocol.revision),
        pool_hash=load_pool(run.folders["pool"]).checksum() if "pool" in run.folders else "",
        artifact_hashes=run.artifact_hashes(),
        tasks={},
        suite_tasks=list(run.suite.names),
        routing={},
        latency=None,
        backend="",
        timings_s={},
        provenance={
            **provenance(),
            "method_code": method_code(type(run.method)),
            **({"data": facts} if facts else {}),
            **({"rows": rows} if rows else {}),
        },
        limit=run.limit,
        cell=run.cell(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def make_record(
    run: Run,
    lm: DLPLoRALM,
    result: HarnessResult,
    timings: dict[str, float],
    errors: Mapping[str, Mapping[str, float | None]],
) -> Record:
    """The record of a finished evaluation.

    Args:
        run, lm, result: What was evaluated, by which model, with which outcome.
        timings: Seconds by phase.
        errors: Standard error of every metric of every task.
    """
    tasks = {
        name.removeprefix(run.prefix): TaskResult(
            kind=run.suite.task(name.removeprefix(run.prefix)).kind,
            version=str(result.versions.get(name)),
            num=result.num_samples[name],
            metrics=metrics,
            stderr={metric: errors[name.removeprefix(run.prefix)].get(metric) for metric in metrics},
        )
        for name, metrics in result.results.items()
    }
    fingerprint = lm.fused.fingerprint()
    record = dataclasses.replace(
        blank_record(run),
        tasks=tasks,
        routing={**lm.routing_statistics(), **lm.fused.method.reported},
        backend=lm.fused.backends_used(),
        timings_s={name: round(value, 3) for name, value in timings.items()},
        training_tokens=training_tokens(run.folders, run.method.artifact_roles),
        trained_parameters=lm.fused.method.num_trained_parameters,
    )
    kinds = {task.name: task.kind for task in run.suite.tasks}
    commit = getattr(lm.fused.model, "hub_commit", None)  # the commit of a hub id's revision
    backbone = {**record.backbone, "fingerprint": fingerprint, **({"commit": commit} if commit else {})}
    return dataclasses.replace(record, backbone=backbone, aggregates=aggregate(record, kinds))
