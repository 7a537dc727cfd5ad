"""Time of tables, figures and the page for many records: ``python -m tests.tools.report_speed --records 1000``.

The records are copies of the committed ones under other method names and seeds, in a temporary folder; they are not results.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dlplora.reporting.schema import to_json
from dlplora.reporting.store import RESULTS, iterate, load_all, record_path, samples_path

SEEDS = 10


def copies(source: Path, target: Path, num: int) -> None:
    """Write ``num`` records with their outcomes, ``SEEDS`` of each invented method."""
    paths = [path for path in iterate(source, "nano") if samples_path(path).is_file()]
    known = [record for record in load_all(source, "nano")[0] if record.samples_sha256]
    for number in range(num):
        path, record = paths[number % len(paths)], known[number % len(paths)]
        name = f"copy{number // SEEDS:03d}"
        copy = dataclasses.replace(
            record, method_name=name, seed=number % SEEDS, cell=f"{number:012x}", provenance={"git": {"dirty": False}}
        )
        place = record_path(copy, target)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(to_json(copy), encoding="utf-8")
        shutil.copyfile(samples_path(path), samples_path(place))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1000)
    number = parser.parse_args().records
    with tempfile.TemporaryDirectory() as folder:
        copies(RESULTS, Path(folder), number)
        start = time.perf_counter()
        command = [sys.executable, "-m", "dlplora.cli.main", "report", "all", "--readme", "none", "--out", folder]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        total, busy = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        size = (Path(folder) / "index.html").stat().st_size / 1e6
        print(f"tables, figures and page of {number} records: {total:.1f} s, {busy:.1f} s of processor (target: 20 s on two cores)")
        print(f"page: {size:.1f} MB (target: 3 MB)")


if __name__ == "__main__":
    main()
