"""``dlplora reproduce nano|real --track unseen``: answer every task with a pool without its expert."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from dlplora.cli.evaluate import say
from dlplora.cli.terminal import quiet_loading, split_names
from dlplora.config import require_writable
from dlplora.errors import ConfigError


def run_unseen(arguments: argparse.Namespace) -> int:
    """Train a router a fold, evaluate, write records and the tables of the suite ``<suite>_unseen``."""
    from dlplora.evaluation.preconditions import require_limit
    from dlplora.reporting import tables
    from dlplora.reporting.store import is_publishable
    from dlplora.reproduce import pipeline, unseen

    if arguments.suite not in {"nano", "real"}:
        raise ConfigError(f"--track unseen runs on nano and real; {arguments.suite} has the in-pool track only.")
    if arguments.fresh:
        raise ConfigError("--fresh and --track exclude each other; remove the folder of --runs instead.")
    if arguments.seeds not in {None, "0"}:
        raise ConfigError(f"--track unseen has one seed, 0; got --seeds {arguments.seeds}.")
    require_limit(arguments.limit)
    quiet_loading(None)
    methods = split_names(arguments.methods) if arguments.methods else list(unseen.METHODS)
    unseen.require_possible(methods)
    nano = arguments.suite == "nano"
    runs = Path(arguments.runs or ("runs/nano_unseen" if nano else "runs/real26_unseen"))
    root = Path(arguments.out) if arguments.out else (runs / "results" if nano else Path("results"))
    if not arguments.dry_run:
        require_writable(root, "--out")
        require_writable(runs, "--runs")
    track = _track(arguments, runs)
    say(f"dlplora reproduce {arguments.suite}, track unseen: Ctrl-C stops, the same command resumes.")
    for number, left_out in enumerate(track.folds, start=1):
        say(f"  * fold {number} leaves out {', '.join(left_out)}")
    say(f"  * evaluate {', '.join(methods)}: finished cells are reused")
    if arguments.dry_run:
        return 0
    records = unseen.evaluate_unseen(track, methods, root, say, arguments.limit).records
    if any(is_publishable(record) for record in records):
        for path in pipeline.refresh_tables(records[0].suite, root):
            say(f"wrote {path}")
    print(f"{tables.main_table(records)}\n\n{tables.caption(records)}")
    return 0


def _track(arguments: argparse.Namespace, runs: Path) -> Any:
    """The track over nano's shipped pool, or over the pool of ``dlplora reproduce real``, which is trained if it is missing."""
    from dlplora.evaluation.protocol import load_protocol
    from dlplora.evaluation.unseen import NUM_FOLDS, unseen_name
    from dlplora.inference.loading import nano_asset
    from dlplora.reproduce import paper, pipeline, profile, unseen
    from dlplora.reproduce.recipe import NANO

    folds = NUM_FOLDS if arguments.folds is None else arguments.folds
    if arguments.suite == "nano":
        if arguments.backbone or arguments.tasks or arguments.data_root:
            raise ConfigError("--backbone, --tasks and --data-root belong to other suites; nano has a fixed base model and tasks.")
        return unseen.UnseenTrack(
            protocol=load_protocol("nano"),
            protocol_name=unseen_name("nano"),
            setting=NANO,
            pool=nano_asset("pool"),
            runs=runs,
            num_folds=folds,
        )
    overrides: dict[str, Any] = {"data_root": arguments.data_root} if arguments.data_root else {}
    if arguments.tasks:
        overrides["tasks"] = split_names(arguments.tasks)
    job = paper.resolve(arguments.backbone or profile.PROFILES[arguments.suite], overrides, ["base"], [0], None)
    protocol, setting = job.over(*paper.backbone_folder(job))
    if arguments.dry_run:
        folder = pipeline.artifacts.locate("pool", job.runs, fresh=False, setting=setting).folder
    else:
        folder = pipeline.train_missing(paper.job_over(job, setting), job.runs, say)[0, "pool"]
    return unseen.UnseenTrack(
        protocol=dataclasses.replace(protocol, seeds=[0]), protocol_name=unseen_name(job.protocol_name), setting=setting, pool=folder,
        runs=runs, num_folds=folds,
    )  # fmt: skip
