"""``dlplora report``: tables from records; no deep-learning package is imported."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dlplora.errors import DLPLoRAError, RecordError
from dlplora.reporting import store, tables
from dlplora.reporting.latency_tables import interleaved
from dlplora.reporting.samples import TaskOutcomes
from dlplora.reporting.schema import Record, json_schema


def _loader(root: Path) -> Callable[[Record], dict[str, TaskOutcomes] | None]:
    return lambda record: store.load_samples(store.record_path(record, root), record)


def _require_results(root: Path, suite: str | None = None) -> None:
    folder = root / "runs" / suite if suite else root / "runs"
    if not folder.is_dir():
        raise RecordError(f"{root} holds no results{f' of suite {suite!r}' if suite else ''}: folder {folder} not found.")


def _load(arguments: argparse.Namespace) -> tuple[list[Record], list[str]]:
    records, problems = store.load_all(Path(arguments.out), arguments.suite)
    for problem in problems:
        print(f"dlplora: error: {problem}", file=sys.stderr)
    return records, problems


def run_build(arguments: argparse.Namespace) -> int:
    """Rewrite tables, or with ``--check`` say which are stale; exit 1 if any is, or if a record is damaged.

    The README of the working directory belongs to its own results and nano; others touch it only when it is named.
    """
    root = Path(arguments.out)
    _require_results(root, arguments.suite)
    records, problems = _load(arguments)
    readme = Path(arguments.readme or "README.md")
    own = arguments.readme is not None or (root == store.RESULTS and arguments.suite == "nano")
    stale = tables.build(records, arguments.suite, root, readme if own and readme.is_file() else None, check=arguments.check)
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


def run_figures(arguments: argparse.Namespace) -> int:
    """Draw every figure the records have numbers for."""
    from dlplora.reporting.figures import draw
    from dlplora.reporting.latency_figures import draw_latency

    root = Path(arguments.out)
    _require_results(root, arguments.suite)
    records, problems = _load(arguments)
    chosen = interleaved(tables.latest(records), root)
    written = draw(chosen, _loader(root), root / "figures", arguments.suite)
    for path in [*written, *draw_latency(root / "bench", root / "figures")]:
        print(f"wrote {path}")
    return 1 if problems else 0


def run_html(arguments: argparse.Namespace) -> int:
    """Write the page of all suites."""
    from dlplora.reporting.html import page

    root = Path(arguments.out)
    _require_results(root)
    records, problems = store.load_all(root)
    for problem in problems:
        print(f"dlplora: error: {problem}", file=sys.stderr)
    target = Path(arguments.page) if arguments.page else root / "index.html"
    store.write_atomically(target, page(interleaved(records, root), _loader(root), _test_items))
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")
    return 1 if problems else 0


def _test_items(suite: str, task: str) -> Sequence[Any]:
    """What was asked, where the suite can be made on this machine."""
    from dlplora.tasks.suite import get_suite

    try:
        return get_suite(suite).task(task).items("test", 100)
    except DLPLoRAError:
        return ()


def run_schema(arguments: argparse.Namespace) -> int:
    """Print the JSON Schema of a record."""
    print(json.dumps(json_schema(), indent=2))
    return 0


def run_validate(arguments: argparse.Namespace) -> int:
    """Read every record of the suite and its outcomes strictly; exit 1 if one is damaged."""
    _require_results(Path(arguments.out), arguments.suite)
    records, problems = _load(arguments)
    for record in records:
        try:
            _loader(Path(arguments.out))(record)
        except RecordError as error:
            problems.append(str(error))
            print(f"dlplora: error: {error}", file=sys.stderr)
    count = sum(1 for _ in store.iterate(Path(arguments.out), arguments.suite))
    print(f"{count - len(problems)} of {count} records are valid")
    return 1 if problems else 0
