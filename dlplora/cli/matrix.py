"""``dlplora matrix``: split a comparison into cells, work on them from any number of machines, and print the status."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.cli.terminal import split_names
from dlplora.errors import ConfigError

if TYPE_CHECKING:
    from dlplora.matrix.worker import Limits


def add_matrix(commands: Any) -> None:
    """Declare ``matrix`` and its actions."""
    parser = commands.add_parser("matrix", help="run one comparison on many machines")
    inner = parser.add_subparsers(dest="action", required=True, metavar="{plan,work,status,submit}")
    _add_plan(inner.add_parser("plan", help="write the cells of a comparison to a file"))
    one = inner.add_parser("work", help="work on the cells of a plan until none is left; start one worker per machine or GPU")
    _add_work(one)
    one.set_defaults(run_action=_work)
    one = inner.add_parser("status", help="print what is done, running and failed, and the time left")
    one.add_argument("plan", metavar="PLAN", help="file written by `dlplora matrix plan`")
    one.set_defaults(run_action=_status)
    one = inner.add_parser("submit", help="start workers as a Slurm array, through submitit")
    _add_work(one)
    one.add_argument("--workers", type=int, default=1, metavar="N", help="jobs of the array (default: 1)")
    one.add_argument("--partition", metavar="NAME", help="Slurm partition")
    one.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs per worker (default: 0)")
    one.add_argument("--cpus", type=int, default=4, metavar="N", help="cores per worker (default: 4)")
    one.add_argument("--memory-gb", type=float, metavar="GB", help="memory per worker")
    one.add_argument("--minutes", type=int, default=240, metavar="N", help="time limit of a job; it is queued again (default: 240)")
    one.add_argument("--setup", action="append", default=[], metavar="LINE", help="shell line before the worker, e.g. 'module load cuda'")
    one.add_argument("--cluster", choices=["slurm", "local", "debug"], default="slurm", help="submitit's executor (default: slurm)")
    one.set_defaults(run_action=_submit)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "profiles", metavar="PROFILE[,PROFILE]", help="nano, a profile of configs/reproduce, its YAML file, or a base model"
    )
    parser.add_argument("--out", required=True, metavar="PLAN", help="file to write, ending in .jsonl; workers share PLAN's folder")
    parser.add_argument("--methods", metavar="A,B", help="methods (default: each profile's)")
    parser.add_argument("--seeds", metavar="N,N", help="seeds; every seed has its own experts (default: each protocol's)")
    parser.add_argument("--tasks", metavar="A,B", help="only these tasks (default: the protocol's)")
    parser.add_argument("--data-root", metavar="DIR", help="folder of local rows, the same path on every machine")
    parser.add_argument("--limit", type=int, metavar="N", help="questions per task")
    parser.add_argument("--results", metavar="DIR", help="results folder (default: beside the plan)")
    parser.add_argument("--experts-per-cell", type=int, default=1, metavar="N", help="experts trained one after the other (default: 1)")
    parser.add_argument(
        "--lease", type=float, default=120, metavar="S", help="seconds without a heartbeat until a worker counts as dead (default: 120)"
    )
    parser.add_argument(
        "--max-deaths", type=int, default=5, metavar="N", help="workers that may die during a cell before it counts as failed (default: 5)"
    )
    parser.add_argument("--tflops", type=float, metavar="X", help="speed of a worker in TFLOP/s, to predict minutes")
    parser.set_defaults(run_action=_plan)


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="file written by `dlplora matrix plan`")
    parser.add_argument("--max-cells", type=int, metavar="N", help="stop after this many cells")
    parser.add_argument("--max-memory", type=float, metavar="GB", help="skip cells that are predicted to need more memory")
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    parser.add_argument("--device", help="device of evaluations (default: the best of this machine)")


def run_matrix(arguments: argparse.Namespace) -> int:
    """Run one action."""
    return int(arguments.run_action(arguments))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _plan(arguments: argparse.Namespace) -> int:
    from dlplora.cli.evaluate import chosen_methods
    from dlplora.cli.reproduce import chosen_seeds
    from dlplora.config import require_writable
    from dlplora.matrix.plan import Request, below, make_header, write_plan
    from dlplora.matrix.profiles import cells_of, subjects_of
    from dlplora.progress import duration

    path = Path(arguments.out)
    if path.suffix != ".jsonl":
        raise ConfigError(f"--out must end in .jsonl, got '{arguments.out}'.")
    require_writable(path.parent, "--out")
    request = Request(
        profiles=[str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name for name in split_names(arguments.profiles)],
        methods=chosen_methods(arguments.methods) if arguments.methods else None,
        seeds=chosen_seeds(arguments.seeds) if arguments.seeds else None,
        tasks=split_names(arguments.tasks) if arguments.tasks else None,
        data_root=None if arguments.data_root is None else str(Path(arguments.data_root).resolve()),
        limit=arguments.limit,
        experts_per_cell=arguments.experts_per_cell,
        results=None if arguments.results is None else below(path.parent, Path(arguments.results)),
        lease_s=arguments.lease,
        max_deaths=arguments.max_deaths,
    )
    subjects = subjects_of(request, path.with_suffix(".work"))
    cells = [cell for one in subjects for cell in cells_of(one, request, arguments.tflops)]
    write_plan(path, make_header(request, {one.name: one.hash() for one in subjects}, cells), cells)
    for kind in ("backbone", "experts", "artifact", "evaluate"):
        some = [cell for cell in cells if cell.kind == kind]
        known = [cell.minutes for cell in some if cell.minutes is not None]
        time = f", about {duration(60 * sum(known))} of one worker" if known and len(known) == len(some) else ""
        memory = max((cell.memory_gb for cell in some if cell.memory_gb is not None), default=None)
        if some:
            print(f"{kind}: {len(some)} cells{time}" + (f", at most {memory:.1f} GB" if memory is not None else ""))
    print(f"wrote {path}; start workers: dlplora matrix work {path}")
    return 0


def _limits(arguments: argparse.Namespace) -> Limits:
    from dlplora.matrix.worker import Limits

    return Limits(
        max_cells=arguments.max_cells, max_memory_gb=arguments.max_memory, retry_failed=arguments.retry_failed, device=arguments.device
    )  # fmt: skip


def _work(arguments: argparse.Namespace) -> int:
    from dlplora.cli.terminal import quiet_loading
    from dlplora.matrix.plan import read_plan
    from dlplora.matrix.slurm import requeued_when_preempted
    from dlplora.matrix.worker import work

    quiet_loading(None)
    with requeued_when_preempted():
        tally = work(read_plan(Path(arguments.plan)), _say, _limits(arguments))
    print(f"{tally.num_done_here} cells done here; {tally.num_done} done in all, {tally.num_failed} failed, {tally.num_left} left")
    return 1 if tally.num_failed else 0


def _status(arguments: argparse.Namespace) -> int:
    from dlplora.matrix.plan import read_plan
    from dlplora.matrix.status import lines

    for line in lines(read_plan(Path(arguments.plan))):
        print(line)
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    from dlplora.matrix.plan import read_plan, require_same_code
    from dlplora.matrix.slurm import Resources, submit

    path = Path(arguments.plan)
    require_same_code(read_plan(path))  # now rather than after hours in a queue
    resources = Resources(
        cluster=arguments.cluster, partition=arguments.partition, gpus=arguments.gpus, cpus=arguments.cpus,
        memory_gb=arguments.memory_gb, minutes=arguments.minutes, workers=arguments.workers, setup=tuple(arguments.setup),
    )  # fmt: skip
    for job in submit(path, resources, _limits(arguments)):
        print(f"submitted job {job.job_id}")
    return 0
