"""``dlplora eval`` and ``dlplora reproduce``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.cli.terminal import split_names
from dlplora.config import require_writable
from dlplora.errors import ConfigError

if TYPE_CHECKING:
    from dlplora.evaluation.cache import EvalCache
    from dlplora.evaluation.protocol import Protocol
    from dlplora.evaluation.runner import Run
    from dlplora.reporting.schema import Record


def say(text: str) -> None:
    """Progress, to standard error."""
    print(text, file=sys.stderr, flush=True)


def parse_parameter(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` with the value read as YAML."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--method-param must be KEY=VALUE, got '{text}'.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--method-param {key}: cannot read {value!r} as a YAML value.") from error


def chosen_methods(text: str | None) -> list[str]:
    """Methods of a comparison: the reference rows, ``all`` presets, or names separated by commas."""
    from dlplora.methods.registry import available_presets
    from dlplora.reproduce.pipeline import METHODS

    if text is None:
        return list(METHODS)
    if text == "all":
        return list(dict.fromkeys([*METHODS, *available_presets()]))
    return split_names(text)


def chosen_seeds(text: str) -> list[int]:
    """Seeds from ``0,1,2``.

    Raises:
        ConfigError: If one is not a whole number, out of range, or named twice.
    """
    from dlplora.evaluation.preconditions import require_seed

    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds takes whole numbers separated by commas, got '{text}'.") from error
    for seed in seeds:
        require_seed(seed)
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seeds takes different numbers, got '{text}'.")
    return seeds


def _protocol(arguments: argparse.Namespace) -> Protocol:
    """The protocol of ``dlplora eval`` with what the command line changes."""
    from dlplora.evaluation.protocol import fitted_to_suite, load_protocol

    overrides: dict[str, Any] = {key: getattr(arguments, key) for key in ("suite", "data_root") if getattr(arguments, key)}
    if arguments.tasks:
        overrides["tasks"] = split_names(arguments.tasks)
    if arguments.pretrained:
        overrides["backbone"] = arguments.pretrained
    protocol = load_protocol(arguments.protocol, overrides)
    if arguments.suite and not arguments.tasks:  # the protocol's list of tasks was written for its own suite
        protocol, left_out = fitted_to_suite(protocol)
        if left_out:
            say(f"{protocol.suite} has too few tasks with rows for {', '.join(left_out)}: left out (--tasks names others)")
    return protocol


def _runs(arguments: argparse.Namespace) -> list[Run]:
    """One run a method, all checked before the first one starts."""
    from dlplora.evaluation.runner import Artifacts, prepare

    methods = list(dict.fromkeys(chosen_methods(arguments.method)))
    for option, value in (("--method-param", arguments.method_param), ("--trained", arguments.trained)):
        if value and len(methods) > 1:
            raise ConfigError(f"{option} belongs to one method, but --method names {len(methods)}; evaluate that one by itself.")
    folders: dict[str, Any] = {role: Path(value) for role in ("pool", "router", "multitask") if (value := getattr(arguments, role))}
    if arguments.trained:
        folders["others"] = {"trained": Path(arguments.trained)}
    params = dict(parse_parameter(text) for text in arguments.method_param)
    protocol, artifacts = _protocol(arguments), Artifacts(**folders)
    name = Path(arguments.protocol).stem
    return [
        prepare(protocol, name, method, arguments.seed, artifacts=artifacts, method_params=params, limit=arguments.limit)
        for method in methods
    ]


def run_eval(arguments: argparse.Namespace) -> int:
    """Evaluate one method or several; standard output has one line of JSON for each."""
    from dlplora.cli.terminal import quiet_loading
    from dlplora.evaluation.cache import eval_cache

    quiet_loading(arguments.pretrained)
    runs = _runs(arguments)
    if arguments.dry_run:
        for run in runs:
            described = {"cell": run.cell(), **run.description(), "protocol": run.protocol.resolved()}
            print(json.dumps(described, indent=2 if len(runs) == 1 else None))
        return 0
    root = Path(arguments.out)
    require_writable(root, "--out")
    with eval_cache() as cache:
        for run in runs:
            evaluated = _released(run, root, arguments) if arguments.released_code else _evaluated(run, root, arguments, cache)
            print(json.dumps(evaluated), flush=True)
    return 0


def _released(run: Run, root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One method as the released code measures."""
    from dlplora.evaluation.released_code import execute_released

    say(f"{run.spec.name} on {len(run.task_names)} task(s) of {run.suite.name}, as the released code measures …")
    path, record = execute_released(run, root, force=arguments.force)
    return {"record": str(path), "tasks": {name: task.metrics for name, task in record.tasks.items()}}


def _evaluated(run: Run, root: Path, arguments: argparse.Namespace, cache: EvalCache) -> dict[str, Any]:
    """One method through lm-eval, or its record if there is one."""
    from dlplora.evaluation.runner import execute, finished, power_note
    from dlplora.progress import Progress
    from dlplora.reporting.schema import read_record

    path = None if arguments.force else finished(run, root)
    if path is None:
        say(f"evaluating {run.spec.name} on {len(run.task_names)} task(s) of {run.suite.name}: {power_note(run)} …")
        with Progress(run.spec.name, unit="request", brief=True) as progress:
            path, record = execute(run, root, cache, progress)
    else:
        say(f"reusing {path} (--force evaluates again)")
        record = read_record(path)
    return {"record": str(path), "aggregates": record.aggregates, "routing": record.routing}


def run_reproduce(arguments: argparse.Namespace) -> int:
    """The main job, on the nano suite or on the paper's tasks."""
    if arguments.suite == "paper":
        return _reproduce_paper(arguments)
    from dlplora.cli.terminal import quiet_loading
    from dlplora.evaluation.preconditions import require_limit
    from dlplora.evaluation.protocol import load_protocol
    from dlplora.evaluation.runner import power_note
    from dlplora.reproduce import pipeline as reproduce

    given = [name for name in ("backbone", "tasks", "data_root") if getattr(arguments, name) is not None]
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} belongs to `dlplora reproduce paper`; the nano suite has a fixed backbone and tasks."
        )
    quiet_loading(None)
    protocol = load_protocol(arguments.suite)
    methods = chosen_methods(arguments.methods)
    seeds = chosen_seeds(arguments.seeds) if arguments.seeds else list(protocol.seeds)
    require_limit(arguments.limit)  # before hours of training
    runs, root = Path(arguments.runs or "runs/nano"), Path(arguments.out)
    if not arguments.dry_run:
        require_writable(root, "--out")
        require_writable(runs, "--runs")
    if arguments.fresh and not arguments.dry_run:
        reproduce.begin_fresh(methods, seeds, runs)
    planned = reproduce.plan(methods, seeds, runs, fresh=arguments.fresh)
    say(f"dlplora reproduce {arguments.suite}: Ctrl-C stops, the same command resumes.")
    for line in planned.lines():
        say(f"  * {line}")
    if arguments.dry_run:
        return 0
    folders = reproduce.train_missing(planned, runs, say)
    runs_planned = reproduce.runs_of(planned, protocol, arguments.suite, folders, arguments.limit)
    say(power_note(runs_planned[0]))
    records = reproduce.evaluate_missing(runs_planned, root, say)
    reproduce.finish(runs)
    _tabulate(arguments.suite, records, root)
    return 0


def _tabulate(suite: str, records: Sequence[Record], root: Path) -> None:
    """Rewrite the tables of a suite and print that of some records."""
    from dlplora.reporting import tables
    from dlplora.reporting.store import is_publishable
    from dlplora.reproduce import pipeline as reproduce

    readme = Path("README.md")
    # A trial run (limited, of uncommitted code, or written elsewhere) must not replace the published table.
    published = suite == "nano" and root == Path("results") and any(is_publishable(record) for record in records)
    has_block = published and readme.is_file() and tables.BEGIN in readme.read_text(encoding="utf-8")
    for path in reproduce.refresh_tables(suite, root, readme if has_block else None):
        say(f"wrote {path}")
    if any(not is_publishable(record) for record in records):
        say("note: limited runs, and runs of uncommitted code, are under scratch/ and not in the published table.")
    print(tables.main_table(records))
    print()
    print(tables.caption(records))


def _reproduce_paper(arguments: argparse.Namespace) -> int:
    """The paper's comparison on one backbone."""
    from dlplora.cli.terminal import quiet_loading
    from dlplora.evaluation.preconditions import require_limit
    from dlplora.evaluation.runner import power_note
    from dlplora.reproduce import paper as reproduce_paper
    from dlplora.reproduce import pipeline as reproduce

    require_limit(arguments.limit)
    if arguments.fresh:
        raise ConfigError(f"--fresh belongs to `dlplora reproduce nano`; remove {arguments.runs or 'the folder under runs/paper'} instead.")
    quiet_loading(None)
    overrides: dict[str, Any] = {"data_root": arguments.data_root} if arguments.data_root else {}
    if arguments.tasks:
        overrides["tasks"] = split_names(arguments.tasks)
    job = reproduce_paper.resolve(
        arguments.backbone or "local-small",
        overrides,
        split_names(arguments.methods) if arguments.methods else None,
        chosen_seeds(arguments.seeds) if arguments.seeds else None,
        Path(arguments.runs) if arguments.runs else None,
    )
    root = Path(arguments.out)
    if not arguments.dry_run:
        require_writable(root, "--out")
        require_writable(job.runs, "--runs")
    say(f"dlplora reproduce paper, backbone {job.name}: Ctrl-C stops, the same command resumes.")
    for line in reproduce_paper.announced(job):
        say(f"  * {line}")
    if arguments.dry_run:
        return 0
    protocol, setting = job.over(*reproduce_paper.backbone_folder(job))
    planned = reproduce_paper.planned(job, setting)
    folders = reproduce.train_missing(planned, job.runs, say)
    runs_planned = reproduce.runs_of(planned, protocol, job.protocol_name, folders, arguments.limit)
    say(power_note(runs_planned[0]))
    records = reproduce.evaluate_missing(runs_planned, root, say)
    _tabulate(protocol.suite, records, root)
    if (root / "runs" / protocol.suite).is_dir():
        from dlplora.cli.report import run_figures

        with redirect_stdout(sys.stderr):
            run_figures(argparse.Namespace(out=str(root), suite=protocol.suite))
    return 0
