"""``dlplora eval``: evaluate methods under a protocol."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.cli.model_options import other_artifacts, parse_parameter
from dlplora.cli.terminal import split_names
from dlplora.config import config_label, require_writable
from dlplora.errors import ConfigError, UnavailableMethodError

if TYPE_CHECKING:
    from dlplora.evaluation.cache import EvalCache
    from dlplora.evaluation.protocol import Protocol
    from dlplora.evaluation.runner import Run


def say(text: str) -> None:
    """Progress, to standard error."""
    print(text, file=sys.stderr, flush=True)


def chosen_methods(text: str) -> list[str]:
    """Methods of a comparison: ``all`` presets, the reference rows first, or names separated by commas."""
    from dlplora.methods.registry import available_presets
    from dlplora.reporting.columns import REFERENCE_ROWS

    return list(dict.fromkeys([*REFERENCE_ROWS, *available_presets()])) if text == "all" else split_names(text)


def chosen_protocol(arguments: argparse.Namespace) -> Protocol:
    """The protocol of ``dlplora eval`` or ``tune`` with what the command line changes."""
    from dlplora.evaluation.protocol import fitted_to_suite, load_protocol, require_rows_read

    overrides: dict[str, Any] = {key: getattr(arguments, key) for key in ("suite", "data_root", "dtype") if getattr(arguments, key)}
    if arguments.tasks:
        overrides["tasks"] = split_names(arguments.tasks)
    if arguments.pretrained:
        overrides["backbone"] = arguments.pretrained
    protocol = load_protocol(arguments.protocol, overrides)
    require_rows_read(protocol.suite, arguments.data_root)
    if arguments.suite and not arguments.tasks:  # the protocol's list of tasks was written for its own suite
        protocol, left_out = fitted_to_suite(protocol)
        if left_out:
            say(f"{protocol.suite} has too few tasks with rows for {', '.join(left_out)}: left out (--tasks names others)")
    return protocol


def _runs(arguments: argparse.Namespace) -> list[Run]:
    """One run per method, all checked before the first one starts; ``all`` leaves out what lacks a package or a folder, and says so."""
    from dlplora.evaluation.runner import Artifacts, prepare

    methods = list(dict.fromkeys(chosen_methods(arguments.method)))
    for option, value in (("--method-param", arguments.method_param), ("--trained", arguments.trained)):
        if value and len(methods) > 1:
            raise ConfigError(f"{option} belongs to one method, but --method names {len(methods)}; evaluate that one by itself.")
    folders: dict[str, Any] = {role: Path(value) for role in ("pool", "router", "multitask") if (value := getattr(arguments, role))}
    folders["others"] = other_artifacts(arguments)
    params = dict(map(parse_parameter, arguments.method_param))
    protocol, artifacts = chosen_protocol(arguments), Artifacts(**folders)
    common: dict[str, Any] = {"method_params": params, "limit": arguments.limit, "device": arguments.device, "artifacts": artifacts}
    runs = []
    for method in methods:
        try:
            runs.append(prepare(protocol, config_label(arguments.protocol), method, arguments.seed, **common))
        except UnavailableMethodError as error:
            if arguments.method != "all":
                raise
            say(f"left out: {error}")
    return runs


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
            evaluated = _released(run, root, arguments) if arguments.teacher_forced else _evaluated(run, root, arguments, cache)
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
    from dlplora.evaluation.reuse import Known
    from dlplora.evaluation.runner import execute, known_record, power_note
    from dlplora.progress import Progress
    from dlplora.reporting.schema import read_record
    from dlplora.reporting.store import held_back

    known = Known() if arguments.force else known_record(run, root)
    if known.path is not None:
        say(f"reusing {known.path} (--force evaluates again)" + (f"; {known.note}" if known.note else ""))
        path, record = known.path, read_record(known.path)
    else:
        if known.note:
            say(f"not reused: {known.note}")
        say(f"evaluating {run.spec.name} on {len(run.task_names)} task(s) of {run.suite.name}: {power_note(run)} …")
        with Progress(run.spec.name, unit="request", brief=True) as progress:
            path, record = execute(run, root, cache, progress)
    if reason := held_back(record):
        say(f"{path} is {reason}, so no table shows it; `dlplora report list --scratch` does")
    means, routing = ({key: value for key, value in part.items() if value is not None} for part in (record.aggregates, record.routing))
    # means are over the whole suite, so a part of it has its tasks' own numbers
    parts = {} if set(record.tasks) == set(record.suite_tasks) else {"tasks": {name: task.metrics for name, task in record.tasks.items()}}
    return {"record": str(path), "aggregates": means, **parts, "routing": routing}
