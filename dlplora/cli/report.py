"""``dlplora report``: write tables from records. No deep-learning package is imported."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dlplora.atomic import write_atomically
from dlplora.documents import read_text
from dlplora.errors import DLPLoRAError, RecordError, one_line
from dlplora.reporting import store, tables
from dlplora.reporting.groups import Group, group, latest, left_out, mixed_in
from dlplora.reporting.schema import Record, json_schema
from dlplora.reporting.sweeps import SweepFile, load_sweeps

ADVICE = "Tables show whole runs of committed code: commit, and evaluate again without --limit. `dlplora report list --scratch` lists them."
WRITTEN = " `dlplora eval` writes records; --out names the results folder of both."
MOST_SAID = 10
"""Most records of which it is said why they are left out."""


def _require_results(root: Path, suite: str | None = None) -> None:
    if suite is not None:
        _require_suite_name(suite, root)
    folder = root / "runs" / suite if suite else root / "runs"
    wanted = f" of suite {suite!r}" if suite else ""
    if next(store.iterate(root, suite), None) is not None:
        return
    if waiting := _waiting(root, suite):
        raise RecordError(f"{root} holds no results{wanted} for tables, only {waiting}. {ADVICE}")
    if not folder.is_dir():
        found = sorted({path.parent.name for path in store.iterate(root)}) if suite else []
        others = f" It has results of {', '.join(found)} (--suite)." if found else ""
        raise RecordError(f"{root} holds no results{wanted}: folder {folder} not found.{others or WRITTEN}")


def _waiting(root: Path, suite: str | None, shown: Sequence[Record] = ()) -> str:
    """Records in ``scratch`` of methods without a row, counted by the reason why they are in no table; empty if there are none."""
    rows = {(record.suite, record.method_name) for record in shown}
    records = [one for one in store.load_all(root, suite, "scratch")[0] if one.status == "ok" and (one.suite, one.method_name) not in rows]
    counts = Counter(store.held_back(record) or "of committed code" for record in records)
    kinds = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return f"{len(records)} record{'s' if len(records) > 1 else ''} in {root / 'scratch'} ({kinds})" if records else ""


def _tell_waiting(root: Path, suite: str | None, shown: Sequence[Record]) -> None:
    if waiting := _waiting(root, suite, shown):
        print(f"dlplora: note: no table shows {waiting}. {ADVICE}", file=sys.stderr)


def _require_suite_name(suite: str, root: Path) -> None:
    """Refuse paths and patterns, which would read and write elsewhere."""
    if Path(suite).name != suite or set(suite) & set("*?[\\") or suite == "..":
        raise RecordError(f"'{suite}' is not the name of a suite; the records of a suite are a folder in {root / 'runs'}.")


def _load(arguments: argparse.Namespace, room: str = "runs") -> tuple[list[Record], list[str]]:
    _require_suite_name(arguments.suite, Path(arguments.out))
    records, problems = store.load_all(Path(arguments.out), arguments.suite, room)
    for problem in problems:
        print(f"dlplora: error: {one_line(problem)}", file=sys.stderr)
    return records, problems


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """Keep what is loaded out of garbage collection: matplotlib collects for every figure, and would search it each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _groups(records: Sequence[Record], reader: store.OutcomeReader, problems: list[str]) -> list[Group]:
    """Records in groups; one whose outcomes are damaged is named and left out."""
    sound = []
    said = left_out(records)
    for sentence in [*said[:MOST_SAID], *([f"{len(said) - MOST_SAID} more records are left out."] if len(said) > MOST_SAID else [])]:
        print(f"dlplora: warning: {one_line(sentence)}", file=sys.stderr)
    for record in latest(records):
        try:
            store.check_samples(store.record_path(record, reader.root), record)
        except RecordError as error:
            problems.append(str(error))
            print(f"dlplora: error: {one_line(error)}", file=sys.stderr)
        else:
            sound.append(record)
    groups = group(sound, reader)
    for one in groups:
        if mixed := mixed_in(one.records):
            print(f"dlplora: warning: {one.title}: {mixed}", file=sys.stderr)
    return groups


def _build(arguments: argparse.Namespace, suite: str, groups: Sequence[Group], check: bool = False) -> list[Path]:
    """The README of the working directory belongs to its own results and ``README_SUITE``; others touch it only when it is named."""
    root = Path(arguments.out)
    readme = Path(arguments.readme or "README.md")
    own = (arguments.readme is not None and suite == arguments.suite) or (root == store.RESULTS and suite == tables.README_SUITE)
    return tables.build([], suite, root, readme if own and readme.is_file() else None, check=check, groups=groups)


def run_build(arguments: argparse.Namespace) -> int:
    """Rewrite tables, or with ``--check`` say which are stale; exit 1 if any is, or if a record is damaged."""
    root = Path(arguments.out)
    _require_results(root, arguments.suite)
    records, problems = _load(arguments)
    _tell_waiting(root, arguments.suite, records)
    groups = _groups(records, store.OutcomeReader(root), problems)
    with _settled():
        stale = _build(arguments, arguments.suite, groups, arguments.check)
    for path in stale:
        print(f"{'stale' if arguments.check else 'wrote'} {path}")
    return 1 if problems or (arguments.check and stale) else 0


def run_all(arguments: argparse.Namespace) -> int:
    """Tables, figures and page of every suite, from records read once; the table of both protocols as well."""
    from dlplora.reporting import protocols
    from dlplora.reporting.latency.figures import draw_latency

    root = Path(arguments.out)
    _require_results(root)
    reader = store.OutcomeReader(root)
    records, problems = _all_records(root)
    _tell_waiting(root, None, records)
    groups = _groups(records, reader, problems)
    with _settled():
        for suite in dict.fromkeys(one.suite for one in groups):
            own = [one for one in groups if one.suite == suite]
            for path in [*_build(arguments, suite, own), *_draw(own, reader, _sweeps(suite, root, problems))]:
                print(f"wrote {path}")
        for path in [*draw_latency(root / "bench", root / "figures"), *protocols.build(root)]:
            print(f"wrote {path}")
        _write_page(root / "index.html", groups, reader, problems)
    return 1 if problems else 0


def run_list(arguments: argparse.Namespace) -> int:
    """One line per record; with ``--scratch`` those that are in no table, with the reason."""
    if not arguments.scratch:
        _require_results(Path(arguments.out), arguments.suite)
    records, problems = _load(arguments, "scratch" if arguments.scratch else "runs")
    for record in records:
        values = {key: value for key, value in record.aggregates.items() if value is not None and not key.endswith("_stderr")}
        numbers = "  ".join(f"{key} {value:.3f}" for key, value in values.items())
        reason = f"  {store.held_back(record)}" if arguments.scratch else ""
        print(f"{record.method_name}  seed {record.seed}  {record.created}  {record.status}{reason}  {numbers}")
    if not records:
        print(f"no records of suite '{arguments.suite}' in {Path(arguments.out) / 'scratch'}", file=sys.stderr)
    return 1 if problems else 0


def _all_records(root: Path) -> tuple[list[Record], list[str]]:
    records, problems = store.load_all(root)
    for problem in problems:
        print(f"dlplora: error: {one_line(problem)}", file=sys.stderr)
    return records, problems


def _sweeps(suite: str, root: Path, problems: list[str]) -> list[SweepFile]:
    found, wrong = load_sweeps(suite, root)
    for problem in wrong:
        print(f"dlplora: error: {one_line(problem)}", file=sys.stderr)
    problems += wrong
    return found


def _draw(groups: Sequence[Group], reader: store.OutcomeReader, sweeps: Sequence[SweepFile]) -> list[Path]:
    """Figures of one suite, under its name; other base models and protocols have their own."""
    from dlplora.reporting.drawing import write_figures
    from dlplora.reporting.figures import figures

    written = []
    own = [one for one in groups if one.protocol == one.suite] if len(groups) > 1 else groups
    main = own[0] if len(own) == 1 else None
    for number, one in enumerate(groups):
        drawn = figures(one.records, reader, () if number else sweeps, one.latency)
        written += write_figures(drawn, reader.root / "figures", one.suite if one is main else one.slug)
    return written


def run_figures(arguments: argparse.Namespace) -> int:
    """Draw every figure the records and sweeps have numbers for."""
    from dlplora.reporting.latency.figures import draw_latency

    root = Path(arguments.out)
    _require_results(root, arguments.suite)
    records, problems = _load(arguments)
    reader = store.OutcomeReader(root)
    groups = _groups(records, reader, problems)
    with _settled():
        drawn = _draw(groups, reader, _sweeps(arguments.suite, root, problems))
        for path in [*drawn, *draw_latency(root / "bench", root / "figures")]:
            print(f"wrote {path}")
    return 1 if problems else 0


def _write_page(target: Path, groups: Sequence[Group], reader: store.OutcomeReader, problems: list[str]) -> None:
    from dlplora.reporting.html import page

    sweeps = {suite: _sweeps(suite, reader.root, problems) for suite in {one.suite for one in groups}}
    drawn_here = tuple(f"{one.suite}_" for one in groups)
    files = sorted(path for path in (reader.root / "figures").glob("*.svg") if not path.stem.startswith(drawn_here))
    others = {path.stem: read_text(path, error=RecordError) for path in files}
    write_atomically(target, page(groups, reader, _test_items, sweeps, others))
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")


def run_html(arguments: argparse.Namespace) -> int:
    """Write the page of all suites."""
    root = Path(arguments.out)
    _require_results(root)
    records, problems = _all_records(root)
    reader = store.OutcomeReader(root)
    groups = _groups(records, reader, problems)
    with _settled():
        _write_page(Path(arguments.page) if arguments.page else root / "index.html", groups, reader, problems)
    return 1 if problems else 0


def _test_items(suite: str, task: str) -> Sequence[Any]:
    """What was asked, where the suite can be made on this machine."""
    from dlplora.tasks.registry import get_suite

    try:
        return get_suite(suite).task(task).items("test", 100)
    except DLPLoRAError:
        return ()


def run_compare_protocols(arguments: argparse.Namespace) -> int:
    """Write the table of both protocols; with ``--check`` exit 1 if it is stale."""
    from dlplora.reporting import protocols

    root = Path(arguments.out)
    if not (root / protocols.ROOM).is_dir():
        raise RecordError(f"{root} holds no records of the released code's evaluation; `dlplora eval --teacher-forced` writes them.")
    stale = protocols.build(root, check=arguments.check)
    for path in stale:
        print(f"{'stale' if arguments.check else 'wrote'} {path}")
    return 1 if arguments.check and stale else 0


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
            store.load_samples(store.record_path(record, Path(arguments.out)), record)
        except RecordError as error:
            problems.append(str(error))
            print(f"dlplora: error: {one_line(error)}", file=sys.stderr)
    count = sum(1 for _ in store.iterate(Path(arguments.out), arguments.suite))
    print(f"{count - len(problems)} of {count} records are valid")
    return 1 if problems else 0
