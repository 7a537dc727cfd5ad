"""``dlplora tune``: choose the settings of methods on the validation split."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.config import config_label
from dlplora.errors import ConfigError

if TYPE_CHECKING:
    from dlplora.evaluation.protocol import Protocol
    from dlplora.tuning.trial_jobs import TrialJob

DESCRIPTION = """Try a small grid of settings on the validation split of a protocol, at most eight trials per method, and print the best.
The grid of a method is configs/tune/METHOD.yaml, or --setting. Every trial is a record in results/tuning. A repeated command reuses what is
finished."""


def add_tune(commands: Any) -> argparse.ArgumentParser:
    """Declare the command; the caller adds model and device options."""
    parser = commands.add_parser("tune", help="choose settings of a method on the validation split", description=DESCRIPTION)
    parser.add_argument("method", metavar="METHOD", help="names in configs/method or YAML files, comma-separated")
    parser.add_argument("--protocol", default="nano", help="name in configs/protocol, or a YAML file (default: nano)")
    parser.add_argument(
        "--setting", action="append", default=[], metavar="NAME=V,V", help="values of one setting, in place of the grid file; repeatable"
    )
    parser.add_argument("--limit", type=int, default=50, help="validation questions per task (default: 50; 0 for all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the trials (default: 0)")
    parser.add_argument("--suite", help="suite of tasks (default: the protocol's)")
    parser.add_argument("--tasks", help="only these tasks, comma-separated (default: all)")
    parser.add_argument("--data-root", metavar="DIR", help="rows of local tasks (or DLPLORA_DATA)")
    parser.add_argument("--tokens", type=int, help="training tokens per trial, at most (default: 1911450, as many as the shipped router)")
    parser.add_argument("--train-config", metavar="NAME", help="configuration of trials that train (default: the profile's)")
    parser.add_argument("--out", default="results", metavar="DIR", help="results folder (default: results)")
    parser.add_argument("--runs", default="runs/tuning", metavar="DIR", help="folder of trained trials (default: runs/tuning)")
    parser.add_argument("--force", action="store_true", help="run finished trials again")
    parser.add_argument("--dry-run", action="store_true", help="print the trials and stop")
    return parser  # type: ignore[no-any-return]


def parse_setting(text: str) -> tuple[str, list[Any]]:
    """``NAME=V,V`` with every value read as YAML."""
    from dlplora.cli.model_options import parse_parameter

    name, equals, values = text.partition("=")
    if not equals or not name or not values:
        raise ConfigError(f"--setting must be NAME=VALUE,VALUE, got '{text}'.")
    return name, [parse_parameter(f"{name}={value}")[1] for value in values.split(",")]


def _jobs(arguments: argparse.Namespace, protocol: Protocol) -> list[list[TrialJob]]:
    """The trials of every method, all checked before the first one starts."""
    from dlplora.cli.terminal import split_names
    from dlplora.evaluation.runner import Artifacts
    from dlplora.methods.registry import load_method_spec
    from dlplora.tuning.grid import grid_of
    from dlplora.tuning.trial_jobs import TOKEN_CAP, budget_of, trial_jobs

    methods = list(dict.fromkeys(split_names(arguments.method)))
    for option, value in (("--setting", arguments.setting), ("--trained", arguments.trained)):
        if value and len(methods) > 1:
            raise ConfigError(f"{option} belongs to one method, but {len(methods)} are named; tune that one by itself.")
    folders: dict[str, Any] = {role: Path(value) for role in ("pool", "router", "multitask") if (value := getattr(arguments, role))}
    if arguments.trained:
        folders["others"] = {"trained": Path(arguments.trained)}
    given = [parse_setting(text) for text in arguments.setting]
    label = config_label(arguments.protocol)
    common: dict[str, Any] = {
        "artifacts": Artifacts(**folders),
        "limit": arguments.limit or None,
        "device": arguments.device,
    }
    found = []
    for method in methods:
        spec = load_method_spec(method)
        budget = budget_of(label, spec.name, TOKEN_CAP if arguments.tokens is None else arguments.tokens, arguments.train_config)
        found.append(trial_jobs(spec, grid_of(spec, given), protocol, label, arguments.seed, budget=budget, **common))
    return found


def run_tune(arguments: argparse.Namespace) -> int:
    """Run the trials of one method or several; standard output has the table of each and its best settings.

    Exit code 1 if no trial of a method has a score.
    """
    from dlplora.cli.evaluate import chosen_protocol, say
    from dlplora.cli.terminal import quiet_loading
    from dlplora.config import require_writable
    from dlplora.evaluation.cache import eval_cache
    from dlplora.reporting.tuning import best_trial, spelled, trial_table
    from dlplora.tuning.trials import run_trials

    quiet_loading(arguments.pretrained)
    several = _jobs(arguments, chosen_protocol(arguments))
    if arguments.dry_run:
        for jobs in several:
            for one in jobs:
                print(f"{one.run.spec.name}  {spelled(one.choice.settings)}{'  (default)' if one.choice.default else ''}")
        return 0
    root = Path(arguments.out)
    require_writable(root, "--out")
    code = 0
    with eval_cache() as cache:
        for jobs in several:
            trials = run_trials(jobs, root, Path(arguments.runs), say, cache, force=arguments.force)
            best, name = best_trial(trials), jobs[0].run.spec.name
            print(trial_table(trials))
            chosen = "no trial has a score" if best is None else spelled(best.settings) + (" (the default)" if best.default else "")
            print(f"\n{name}: {chosen}", flush=True)
            code = 1 if best is None else code
    return code
