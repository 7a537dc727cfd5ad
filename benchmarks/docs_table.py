"""Benchmarks that write a table from their record into a documentation page: the actions ``run`` and ``report``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlplora.atomic import write_atomically
from dlplora.reporting.store import RESULTS


def command(
    about: str | None,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    *,
    name: str,
    size: str,
    default: int,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    name_of: Callable[[argparse.Namespace, argparse.ArgumentParser], str] | None = None,
) -> None:
    """Read the command line; measure, or write the table into the page.

    Args:
        about: Help text.
        measure: Arguments, with ``size`` -> record.
        table: Record -> Markdown.
        name: Of the record, ``results/bench/NAME.json``.
        size: Option that sets the size.
        default: Its default.
        add_options: Adds further options.
        name_of: Arguments that may not fit together -> another name of the record.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument(size, type=int, default=default, dest="size")
    parser.add_argument("--out", default=str(RESULTS), metavar="DIR")
    parser.add_argument("--page", default="docs/prompts_and_routing.md", metavar="FILE")
    add_options(parser)
    arguments = parser.parse_args()
    name = name if name_of is None else name_of(arguments, parser)
    path = Path(arguments.out) / "bench" / f"{name}.json"
    if arguments.action == "run":
        write_atomically(path, json.dumps(measure(arguments), indent=2) + "\n")
        print(path)
        return
    page = Path(arguments.page)
    page_text, record = page.read_text(encoding="utf-8"), json.loads(path.read_text(encoding="utf-8"))
    write_atomically(page, with_table(page_text, name, table(record)))
    print(f"wrote {page}")


def with_table(page: str, name: str, table: str) -> str:
    """A page with the table between the markers of ``name`` replaced.

    Raises:
        SystemExit: If the markers are missing.
    """
    begin, end = (f"<!-- dlplora:{name}:{which} -->" for which in ("begin", "end"))
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"the page has no {begin} … {end}; put the markers where the table belongs.")
    return f"{head}{begin}\n\n{table}\n\n{end}{tail}"
