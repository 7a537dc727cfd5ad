"""The project's targets, measured on this machine: ``python -m tests.tools.targets``.

Prints one row per target and writes nothing. Times depend on the machine; no test asserts them. Rows about speed come from records
(``--only-speed`` prints these alone); the others are measured or read here.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dlplora.methods.registry import available_presets
from dlplora.reporting.columns import REFERENCE_ROWS, value_of
from dlplora.reporting.groups import latest
from dlplora.reporting.latency.records import FOLDER
from dlplora.reporting.schema import Record
from dlplora.reporting.store import load_all
from tests.tools import speed_targets

ROOT = Path(__file__).resolve().parents[2]
METHODS = REFERENCE_ROWS


def help_seconds(repeats: int = 7) -> float:
    """Median wall time of ``dlplora --help``."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dlplora.cli.main", "--help"], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def repository_megabytes() -> float:
    """Size of all committed files."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sum((ROOT / file).stat().st_size for file in files if file and (ROOT / file).is_file()) / 1e6


def evaluation(limit: int | None) -> tuple[float, float]:
    """Seconds of one evaluation of ``dlp`` from a cold start, and the peak memory of its process in gigabytes."""
    command = [sys.executable, "-m", "dlplora.cli.main", "eval", "--method", "dlp", "--force", "--out", "runs/targets"]
    start = time.perf_counter()
    subprocess.run(
        [*command, *(["--limit", str(limit)] if limit else [])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True
    )
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def quality(records: dict[str, Record]) -> Iterator[tuple[str, str, str]]:
    """Targets that the committed records answer."""
    if {"oracle", "dlp", "avg_delta"} <= set(records):
        for key, what, bound in (("mcq_acc", "MCQ mean", 2), ("gen_exact_match", "exact match", 3)):
            gap = 100 * ((value_of(records["oracle"], key) or 0.0) - (value_of(records["dlp"], key) or 0.0))
            yield f"oracle minus dlp, {what}", f"{gap:.1f} points", f"<= {bound}"
        gap = 100 * ((value_of(records["oracle"], "mcq_acc") or 0.0) - (value_of(records["avg_delta"], "mcq_acc") or 0.0))
        yield "oracle minus avg_delta, MCQ mean", f"{gap:.1f} points", "far apart"
    if set(available_presets()) <= set(records):
        seconds = sum(sum(record.timings_s.values()) for record in records.values())
        yield f"evaluation of all {len(records)} methods, as recorded", f"{seconds:.0f} s", "<= 480 s"
    if set(METHODS) <= set(records):
        seconds = sum(sum(records[name].timings_s.values()) for name in METHODS)
        yield "evaluation of the six methods, as recorded", f"{seconds:.0f} s", "<= 180 s"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="questions a task of the timed evaluation (default: all)")
    parser.add_argument("--records", metavar="DIR", default=str(FOLDER), help="folder of speed records (default: results/bench)")
    parser.add_argument("--only-speed", action="store_true", help="print what speed records answer, measure nothing")
    arguments = parser.parse_args()
    limit = arguments.limit
    speed = list(speed_targets.rows(Path(arguments.records)))
    if arguments.only_speed:
        speed_targets.print_table(speed)
        return
    records = {record.method_name: record for record in latest(load_all(ROOT / "results", "nano")[0]) if record.seed == 0}
    seconds, gigabytes = evaluation(limit)
    rows = [
        ("dlplora --help", f"{help_seconds():.2f} s", "<= 0.4 s"),
        ("committed files", f"{repository_megabytes():.1f} MB", "<= 25 MB"),
        ("one evaluation of dlp, start included", f"{seconds:.0f} s", "<= 30 s (180 s for six)"),
        ("its peak memory", f"{gigabytes:.2f} GB", "<= 3 GB"),
        *quality(records),
        *speed,
    ]
    speed_targets.print_table(rows)


if __name__ == "__main__":
    main()
