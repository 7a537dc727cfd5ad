"""One evaluation through lm-eval, with our tasks and plain results; called by the runner and by ``dlplora eval``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from dlplora.errors import ConfigError, TaskError, nearest
from dlplora.lm_eval.distributed import without_messages
from dlplora.lm_eval.versions import TESTED
from dlplora.tasks import lm_eval_dir

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

NO_FILTER = ",none"


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """What one evaluation measured.

    Metric names carry lm-eval's filter only where a task has one: ``acc``, but ``exact_match,strict-match``.
    """

    results: dict[str, dict[str, float]]
    """Task to metric to value, tasks in the order they were run."""
    stderr: dict[str, dict[str, float | None]]
    """Task to metric to standard error; None where lm-eval gives none."""
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    """Aggregates of the groups that define one."""
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Task to one mapping per question, as lm-eval logs it; empty unless samples are logged."""
    versions: dict[str, Any] = field(default_factory=dict)
    """Task to the version in its YAML file."""
    num_samples: dict[str, int] = field(default_factory=dict)
    """Task to the number of questions evaluated."""
    num_fewshot: dict[str, int] = field(default_factory=dict)
    """Task to the number of examples in the prompt."""
    higher_is_better: dict[str, dict[str, bool]] = field(default_factory=dict)
    """Task to metric to direction."""


def fast_task_manager(include_path: str | Path | Sequence[str | Path] = (), metadata: Mapping[str, Any] | None = None) -> TaskManager:
    """A task manager that knows our tasks and ``include_path`` only, and hands ``metadata`` to their data sets.

    Indexing lm-eval's own tasks takes about 20 s on two cores; use ``lm_eval.tasks.TaskManager`` where they are wanted.
    """
    from lm_eval.tasks import TaskManager

    extra = [include_path] if isinstance(include_path, (str, Path)) else list(include_path)
    return TaskManager(include_path=[lm_eval_dir(), *extra], include_defaults=False, metadata=dict(metadata) if metadata else None)


@contextmanager
def without_environment_report() -> Iterator[None]:
    """While open, lm-eval adds neither a list of the machine's packages (seconds of ``pip list``) nor the commit of the working folder.

    Neither is read here, and outside a git repository the latter prints git's error message. Records name the commit of this code.
    """
    from lm_eval import evaluator

    with replaced(evaluator, "add_env_info", lambda storage: None), replaced(evaluator, "get_git_commit_hash", lambda: None):
        yield


@contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """While open, names of a module are replaced; names that this version of the module lacks are left out."""
    if not hasattr(module, name):
        yield
        return
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)


@contextmanager
def with_progress(lm: LM, progress_bar: Callable[..., Any] | None) -> Iterator[None]:
    """While open, the model shows its requests with ``progress_bar`` in place of tqdm, and lm-eval draws none of its own.

    Args:
        lm: The model; its attribute ``progress_bar`` is set.
        progress_bar: Takes ``total``, ``disable`` and ``desc`` and returns a context manager with ``update(count)``; None changes nothing.
    """
    if progress_bar is None:
        yield
        return
    from lm_eval.api import model as harness_model
    from lm_eval.api import task as harness_task

    kept = lm.progress_bar  # type: ignore[attr-defined]
    lm.progress_bar = progress_bar  # type: ignore[attr-defined]
    with replaced(harness_task, "tqdm", _plain_rows), replaced(harness_model, "tqdm", _plain_rows):
        try:
            yield
        finally:
            lm.progress_bar = kept  # type: ignore[attr-defined]


def _plain_rows(rows: Any, **options: Any) -> Any:
    """In place of tqdm: the rows, without a bar."""
    return rows


def _no_tasks() -> TaskManager:
    """A task manager for tasks that are built already; it reads no folder."""
    from lm_eval.tasks import TaskManager

    from dlplora.lm_eval.task_index import task_index

    with task_index("as called"):
        return TaskManager(include_defaults=False)


def load_tasks(task_names: Sequence[str], manager: TaskManager) -> list[Task]:
    """The named tasks, built; several evaluations may use the same objects, one after the other.

    Raises:
        TaskError: If a task is unknown, or none is given.
        ConfigError: If the installed lm-eval cannot build tasks by themselves.
    """
    if not hasattr(manager, "load"):
        raise ConfigError(
            f"dlplora eval needs lm-eval 0.4.12 or newer, {version('lm-eval')} is installed; lm_eval --model dlplora works with "
            f"{TESTED[0]} to {TESTED[1]}, which are tested."
        )
    names = _matching(task_names, manager)
    with without_messages([f"{name}: Custom kwargs can be passed" for name in names], "lm_eval.api.task"):  # of rows made by code
        return list(manager.load(names)["tasks"].values())


def evaluate(
    lm: LM,
    task_names: Sequence[str] | Sequence[Task],
    *,
    limit: int | None = None,
    num_fewshot: int | None = 0,
    seed: int = 0,
    batch_size: int | Literal["auto"] | None = None,
    log_samples: bool = True,
    bootstrap_iters: int = 100,
    task_manager: TaskManager | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    apply_chat_template: bool | str = False,
    progress_bar: Callable[..., Any] | None = None,
) -> HarnessResult:
    """Run lm-eval's ``simple_evaluate`` on a model that is already built.

    lm-eval seeds Python's, NumPy's and torch's generators with ``seed``; few-shot examples are drawn with it too.

    Args:
        lm: The model, usually a ``DLPLoRALM``.
        task_names: Names of tasks, groups or tags known to ``task_manager``; ``*`` matches any text. Or tasks that ``load_tasks`` built.
        limit: Questions per task, None for all.
        num_fewshot: Examples in the prompt; None leaves each task's own number. A task that fixes 0 keeps it.
        batch_size: Sets the model's batch size; None keeps it.
        log_samples: Whether to keep every question with its answers.
        bootstrap_iters: Resamples of the standard errors that have no formula (BLEU); 0 for no standard errors at all.
        task_manager: By default ``fast_task_manager()``.
        gen_kwargs: Decoding options that replace the tasks' own.
        apply_chat_template: True, or the name of one of the tokenizer's templates.
        progress_bar: See ``with_progress``.

    Raises:
        TaskError: If a task is unknown, or none is given.
    """
    from lm_eval.evaluator import simple_evaluate

    given = list(task_names)
    built = bool(given) and not any(isinstance(task, str) for task in given)
    manager = _no_tasks() if built else fast_task_manager() if task_manager is None else task_manager
    tasks: list[Any] = given if built else _matching([str(name) for name in given], manager)
    if batch_size is not None:
        lm.batch_size_per_gpu = batch_size if batch_size == "auto" else int(batch_size)  # type: ignore[attr-defined]
    # the harness prints notes; standard output belongs to the caller
    with redirect_stdout(sys.stderr), without_environment_report(), with_progress(lm, progress_bar):
        raw = simple_evaluate(
            model=lm,
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            log_samples=log_samples,
            bootstrap_iters=bootstrap_iters,
            task_manager=manager,
            gen_kwargs=dict(gen_kwargs) if gen_kwargs else None,
            apply_chat_template=apply_chat_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    if raw is None:  # another rank of a data-parallel run reports
        return HarnessResult(results={}, stderr={})
    return clean_results(dict(raw))


def clean_results(raw: Mapping[str, Any]) -> HarnessResult:
    """lm-eval's result mapping with plain metric names, groups separate from tasks, and ``None`` for a missing error."""
    results: dict[str, dict[str, float]] = {}
    groups: dict[str, dict[str, float]] = {}
    stderr: dict[str, dict[str, float | None]] = {}
    group_names = set(raw.get("group_subtasks") or {})
    for name, entry in raw["results"].items():
        values, errors = _split_metrics(entry)
        if name not in group_names:
            results[name], stderr[name] = values, errors
        elif values:
            groups[name] = values
    return HarnessResult(
        results=results,
        stderr=stderr,
        groups=groups,
        samples={name: list(rows) for name, rows in (raw.get("samples") or {}).items()},
        versions={name: raw["versions"].get(name) for name in results},
        num_samples={name: int(raw["n-samples"][name]["effective"]) for name in results},
        num_fewshot={name: int(raw["n-shot"].get(name) or 0) for name in results},
        higher_is_better={name: dict(raw["higher_is_better"].get(name) or {}) for name in results},
    )


def _split_metrics(entry: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float | None]]:
    """The metrics of one task and their standard errors; ``alias``, counts and the like are neither."""
    values: dict[str, float] = {}
    errors: dict[str, float | None] = {}
    for key, value in entry.items():
        metric, comma, kept_filter = key.partition(",")
        if not comma:
            continue
        is_error = metric.endswith("_stderr")
        name = metric.removesuffix("_stderr") + ("" if comma + kept_filter == NO_FILTER else comma + kept_filter)
        if is_error:
            errors[name] = None if value == "N/A" else float(value)
        else:
            values[name] = float(value)
    return values, errors


def _matching(task_names: Sequence[str], manager: TaskManager) -> list[str]:
    """The known names that match the given names and patterns, in the order given, each once."""
    if not task_names:
        raise TaskError("no task to evaluate. Name at least one.")
    found: dict[str, None] = {}
    for name in task_names:
        matches = manager.match_tasks([name])
        if not matches:
            raise TaskError(f"unknown task '{name}'.{nearest(name, manager.all_tasks)} `lm_eval ls tasks` lists them.")
        found |= dict.fromkeys(matches)
    return list(found)
