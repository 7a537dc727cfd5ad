"""Run several latency benchmarks: ``python -m benchmarks.latency_ratios nano qwen2-0.5b``.

Each is a file of ``configs/bench`` (or a path), writes one record, by default under ``results/bench``, and prints its table.
``dlplora bench latency`` does the same for one file or for options given on the command line.
"""

from __future__ import annotations

import argparse
import sys

from dlplora.bench.session import run_bench
from dlplora.bench.settings import load_bench_config
from dlplora.cli.bench import target_path
from dlplora.cli.terminal import quiet_loading
from dlplora.errors import DLPLoRAError
from dlplora.reporting.latency.records import save_bench
from dlplora.reporting.latency.tables import markdown


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(names: list[str], out: str | None) -> None:
    """Run the benchmarks, write their records and print their tables.

    Args:
        names: Names in ``configs/bench``, or files.
        out: Folder; None is the default of ``dlplora bench latency``.
    """
    configs = [load_bench_config(name) for name in names]  # a misspelt name is found before anything runs
    for config in configs:
        record = run_bench(config, _tell, after_group=lambda record: save_bench(record, target_path(out, record)))
        path = target_path(out, record)
        for warning in record.warnings:
            print(f"warning: {config.shape}: {warning}; the times are not those of a quiet machine.", file=sys.stderr)
        print(f"wrote {path}", file=sys.stderr)
        print(markdown(record) + "\n")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="name in configs/bench, or a YAML file")
    parser.add_argument("--out", metavar="DIR", help="folder of the records")
    arguments = parser.parse_args()
    quiet_loading(None)
    try:
        run(arguments.configs, arguments.out)
    except DLPLoRAError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
