"""``dlplora report``: tables from records; no deep-learning package is imported."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dlplora.reporting import store, tables
from dlplora.reporting.schema import Record


def _load(arguments: argparse.Namespace) -> tuple[list[Record], list[str]]:
    records, problems = store.load_all(Path(arguments.out), arguments.suite)
    for problem in problems:
        print(f"dlplora: error: {problem}", file=sys.stderr)
    return records, problems


def run_build(arguments: argparse.Namespace) -> int:
    """Rewrite tables, or with ``--check`` say which are stale; exit 1 if any is, or if a record is damaged."""
    records, problems = _load(arguments)
    readme = Path(arguments.readme)
    stale = tables.build(records, arguments.suite, Path(arguments.out), readme if readme.is_file() else None, check=arguments.check)
    for path in stale:
        print(f"{'stale' if arguments.check else 'wrote'} {path}")
    return 1 if problems or (arguments.check and stale) else 0


def run_list(arguments: argparse.Namespace) -> int:
    """One line a record."""
    records, problems = _load(arguments)
    for record in records:
        values = {key: value for key, value in record.aggregates.items() if value is not None and not key.endswith("_stderr")}
        numbers = "  ".join(f"{key} {value:.3f}" for key, value in values.items())
        print(f"{record.method_name}  seed {record.seed}  {record.created}  {record.status}  {numbers}")
    return 1 if problems else 0


def run_validate(arguments: argparse.Namespace) -> int:
    """Read every record of the suite strictly; exit 1 if one is damaged."""
    _, problems = _load(arguments)
    count = sum(1 for _ in store.iterate(Path(arguments.out), arguments.suite))
    print(f"{count - len(problems)} of {count} records are valid")
    return 1 if problems else 0
