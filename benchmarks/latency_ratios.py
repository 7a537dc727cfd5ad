"""Run latency plans and print the targets: ``python -m benchmarks.latency_ratios nano qwen2-0.5b``.

Each plan is a file of ``configs/bench`` (or a path); each writes one record, by default under ``results/bench``. The targets that the
records answer are printed last. ``dlplora bench latency`` prints the whole table of one plan or of options given on the command line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.speed_targets import print_table, rows
from dlplora.bench.session import load_bench_config, run_plan
from dlplora.cli.bench import target_path
from dlplora.cli.terminal import quiet_loading
from dlplora.errors import DLPLoRAError
from dlplora.reporting.latency.records import FOLDER, save_bench
from dlplora.reporting.latency.tables import markdown


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(names: list[str], out: str | None, *, full: bool) -> Path:
    """Run the plans; returns the folder that their records are in.

    Args:
        names: Plans.
        out: Folder; None is the default of ``dlplora bench latency``.
        full: Whether every table is printed too.
    """
    plans = [load_bench_config(name) for name in names]  # a misspelt name is found before anything runs
    folder = FOLDER
    for plan in plans:
        record = run_plan(plan, _tell, after_group=lambda record: save_bench(record, target_path(out, record)))
        path = target_path(out, record)
        folder = path.parent
        for warning in record.warnings:
            print(f"warning: {plan.shape}: {warning}; the times are not those of a quiet machine.", file=sys.stderr)
        print(f"wrote {path}", file=sys.stderr)
        if full:
            print(markdown(record) + "\n")
    return folder


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", nargs="+", metavar="PLAN", help="name in configs/bench, or a YAML file")
    parser.add_argument("--out", metavar="DIR", help="folder of the records")
    parser.add_argument("--full", action="store_true", help="print every table before the targets")
    arguments = parser.parse_args()
    quiet_loading(None)
    try:
        folder = run(arguments.plans, arguments.out, full=arguments.full)
    except DLPLoRAError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print_table([row for row in rows(folder) if row[1]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
