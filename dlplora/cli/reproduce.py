"""``dlplora reproduce``: evaluate the nano suite and compare with the committed records; run the comparison on the paper's tasks."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.cli.evaluate import chosen_methods, say
from dlplora.cli.terminal import split_names
from dlplora.config import require_writable
from dlplora.documents import read_text
from dlplora.errors import ConfigError
from dlplora.progress import duration

if TYPE_CHECKING:
    from dlplora.reporting.schema import Record
    from dlplora.reporting.tuning import Trial
    from dlplora.reproduce.comparison import Comparison
    from dlplora.reproduce.pipeline import Evaluated, ReproduceJob


def add_reproduce(commands: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "reproduce", help="train missing artifacts, evaluate, compare with the committed records"
    )
    parser.add_argument(
        "suite",
        choices=["nano", "nano_linear", "paper", "real", "confusable"],
        help="nano; nano_linear: nano with adapters on all linear layers; paper: the paper's tasks; real: real26; confusable: task pairs",
    )
    parser.add_argument(
        "--track",
        choices=["in-pool", "unseen"],
        default="in-pool",
        help="unseen: tasks answered by a pool without their experts (nano, real)",
    )
    parser.add_argument("--folds", type=int, metavar="N", help="unseen: groups of tasks that are left out together (default: 5)")
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        help="paper: a profile of configs/reproduce, or a base model as in --pretrained (default: local-small)",
    )
    parser.add_argument("--tasks", help="paper: only these tasks, comma-separated (default: the protocol's)")
    parser.add_argument("--data-root", metavar="DIR", help="paper: folder of local rows (default: DLPLORA_DATA, else the hub)")
    parser.add_argument("--fresh", action="store_true", help="nano: train and evaluate everything again")
    parser.add_argument("--methods", help="comma-separated methods, or 'all' (default for nano: 14, some of each family)")
    parser.add_argument("--seeds", help="comma-separated seeds; every seed has its own experts (default: the protocol's)")
    parser.add_argument(
        "--tuned", action="store_true", help="also evaluate, as METHOD_tuned, the settings that trials of `dlplora tune` choose"
    )
    parser.add_argument("--limit", type=int, help="questions per task; tables leave such records out")
    parser.add_argument("--out", metavar="DIR", help="results folder (default: runs/nano/results, or results for the paper)")
    parser.add_argument("--runs", metavar="DIR", help="folder of trained artifacts (default: runs/nano, or runs/paper/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="print the steps, and for the paper what they need, and stop")
    return parser


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


def run_reproduce(arguments: argparse.Namespace) -> int:
    """Reproduce the nano suite, the paper's tasks or real26; exit code 1 if a nano method's results differ from the committed ones.

    Raises:
        ConfigError: For ``--folds`` without ``--track unseen``, and whatever the track refuses.
    """
    if arguments.track == "unseen":
        from dlplora.cli.reproduce_unseen import run_unseen

        return run_unseen(arguments)
    if arguments.folds is not None:
        raise ConfigError("--folds belongs to --track unseen.")
    return _reproduce_nano(arguments) if arguments.suite == "nano" else _reproduce_over_backbone(arguments)


def _reproduce_nano(arguments: argparse.Namespace) -> int:
    from dlplora.cli.terminal import quiet_loading
    from dlplora.evaluation.preconditions import require_limit
    from dlplora.evaluation.protocol import load_protocol
    from dlplora.evaluation.runner import power_note
    from dlplora.reproduce import pipeline

    given = [name for name in ("backbone", "tasks", "data_root") if getattr(arguments, name) is not None]
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} belongs to `dlplora reproduce paper`; the nano suite has a fixed base model and tasks."
        )
    start = time.monotonic()
    quiet_loading(None)
    protocol = load_protocol("nano")
    methods = chosen_methods(arguments.methods) if arguments.methods else list(pipeline.NANO_METHODS)
    seeds = chosen_seeds(arguments.seeds) if arguments.seeds else list(protocol.seeds)
    require_limit(arguments.limit)  # before hours of training
    runs = Path(arguments.runs or "runs/nano")
    # Records of this machine have a folder of their own: the committed ones stay what they are compared with.
    own = runs / "results"
    root = Path(arguments.out) if arguments.out else own
    if not arguments.dry_run:
        require_writable(root, "--out")
        require_writable(runs, "--runs")
    if arguments.fresh and not arguments.dry_run:
        pipeline.begin_fresh(methods, seeds, runs, None if arguments.out else own)
    job = pipeline.make_job(methods, seeds, runs, fresh=arguments.fresh)
    say("dlplora reproduce nano: Ctrl-C stops, the same command resumes.")
    for line in job.lines():
        say(f"  * {line}")
    if arguments.dry_run:
        return 0
    folders = pipeline.train_missing(job, runs, say)
    planned = pipeline.runs_of(job, protocol, "nano", folders, arguments.limit, _trials(arguments, root))
    say(power_note(planned[0]))
    evaluated = pipeline.evaluate_missing(planned, root, say)
    pipeline.finish(runs)
    comparisons = _compared(evaluated.records, root)
    if arguments.out:  # the tables' paired tests take as long as some methods, and the comparison is what was asked for
        _write_tables("nano", evaluated.records, root)
    print()
    print(_done(job, evaluated, time.monotonic() - start))
    if not comparisons:
        return 0
    counts = Counter(one.verdict for one in comparisons)
    print(
        f"against the committed records: {counts['equal']} of {len(comparisons)} equal, {counts['within']} within the tolerance, "
        f"{counts['differs']} differ, {counts['new']} new"
    )
    return 1 if counts["differs"] else 0


def _trials(arguments: argparse.Namespace, root: Path) -> list[Trial]:
    """Trials of ``--tuned``: those in the results folder, else the committed ones; none without the option.

    Raises:
        ConfigError: If there are none.
    """
    from dlplora.reporting.tuning import load_trials
    from dlplora.reproduce.comparison import committed_results

    if not arguments.tuned:
        return []
    folders = [folder for folder in (root, committed_results()) if folder is not None]
    found = next((trials for folder in folders if (trials := load_trials(folder))), [])
    if not found:
        raise ConfigError(f"--tuned: no trials in {' or '.join(str(folder / 'tuning') for folder in folders)}; run `dlplora tune` first.")
    return found


def _compared(records: Sequence[Record], root: Path) -> list[Comparison]:
    """Print the records as a table, beside the committed ones if they are at hand; returns the comparisons, empty if there is none."""
    from dlplora.reproduce import comparison

    folder = comparison.committed_results()
    if folder is None or folder.resolve() == root.resolve():
        why = "this installation has none" if folder is None else f"these records were written to them ({root})"
        say(f"not compared with the committed records: {why}")
        alone = [comparison.Comparison(record=record, verdict="new") for record in records]
        print(comparison.table(alone, []))
        return []
    committed = comparison.committed_records(folder, records)
    comparisons = comparison.compare(records, root, committed, folder)
    print(comparison.table(comparisons, committed))
    print(comparison.legend(comparisons))
    return comparisons


def _done(job: ReproduceJob, evaluated: Evaluated, seconds: float) -> str:
    """What was done, in one line."""
    trained = [artifact.label for artifact in job.artifacts if not artifact.ready]
    fresh = len(evaluated.records) - evaluated.num_reused
    return f"trained: {', '.join(trained) or 'nothing'}; evaluated: {fresh}, reused: {evaluated.num_reused}; time: {duration(seconds)}"


def _write_tables(suite: str, records: Sequence[Record], root: Path) -> None:
    """Rewrite the tables of a results folder; the README's as well if it is the committed one."""
    from dlplora.reporting import tables
    from dlplora.reporting.store import is_publishable
    from dlplora.reproduce import pipeline

    if not any(is_publishable(record) for record in records):
        say(f"records: {root / 'scratch' / suite} (limited runs and runs of uncommitted code are in no table)")
        return
    readme = Path("README.md")
    published = suite == tables.README_SUITE and root == Path("results")
    has_block = published and readme.is_file() and tables.BEGIN in read_text(readme)
    for path in pipeline.refresh_tables(suite, root, readme if has_block else None):
        say(f"wrote {path}")


def _reproduce_over_backbone(arguments: argparse.Namespace) -> int:
    from dlplora.cli.terminal import quiet_loading
    from dlplora.evaluation.preconditions import require_limit
    from dlplora.evaluation.runner import power_note
    from dlplora.reporting import tables
    from dlplora.reproduce import paper, pipeline, profile

    require_limit(arguments.limit)
    if arguments.fresh:
        raise ConfigError(f"--fresh belongs to `dlplora reproduce nano`; remove {arguments.runs or 'the folder under runs/paper'} instead.")
    quiet_loading(None)
    overrides: dict[str, Any] = {"data_root": arguments.data_root} if arguments.data_root else {}
    if arguments.tasks:
        overrides["tasks"] = split_names(arguments.tasks)
    job = paper.resolve(
        arguments.backbone or profile.PROFILES[arguments.suite],
        overrides,
        split_names(arguments.methods) if arguments.methods else None,
        chosen_seeds(arguments.seeds) if arguments.seeds else None,
        Path(arguments.runs) if arguments.runs else None,
    )
    root = Path(arguments.out or "results")
    if not arguments.dry_run:
        require_writable(root, "--out")
        require_writable(job.runs, "--runs")
    say(f"dlplora reproduce {arguments.suite}, protocol {job.protocol_name}: Ctrl-C stops, the same command resumes.")
    for line in paper.announced(job):
        say(f"  * {line}")
    if arguments.dry_run:
        return 0
    protocol, setting = job.over(*paper.backbone_folder(job))
    over_backbone = paper.job_over(job, setting)
    folders = pipeline.train_missing(over_backbone, job.runs, say)
    planned = pipeline.runs_of(over_backbone, protocol, job.protocol_name, folders, arguments.limit, _trials(arguments, root))
    say(power_note(planned[0]))
    records = pipeline.evaluate_missing(planned, root, say).records
    _write_tables(protocol.suite, records, root)
    print(f"{tables.main_table(records)}\n\n{tables.caption(records)}")
    if (root / "runs" / protocol.suite).is_dir():
        from dlplora.cli.report import run_figures

        with redirect_stdout(sys.stderr):
            run_figures(argparse.Namespace(out=str(root), suite=protocol.suite))
    return 0
