"""``dlplora methods`` and ``dlplora tasks``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dlplora.reporting.markdown import table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value).replace("|", "\\|").replace("\n", "⏎")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with the keys of the first row as columns."""
    if not rows:
        return ""
    keys = list(rows[0])
    return table(keys, [[_cell(row.get(key)) for key in keys] for row in rows], left=len(keys))


def _print(rows: Sequence[Mapping[str, Any]], style: str) -> None:
    print(json.dumps(list(rows), indent=2) if style == "json" else markdown(rows))


def run_methods(arguments: argparse.Namespace) -> int:
    """Methods as their classes describe themselves, with the parameters that each one trains at the embedded size."""
    from dlplora.evaluation.parameter_counts import nano_parameter_counts
    from dlplora.methods.registry import describe_methods

    num_experts, counts = nano_parameter_counts()
    column = f"trained parameters (nano, {num_experts} experts)"
    _print([{**row, column: counts[row["name"]]} for row in describe_methods()], arguments.format)
    return 0


def run_tasks(arguments: argparse.Namespace) -> int:
    """Tasks of a suite."""
    from dlplora.evaluation.protocol import require_rows_read
    from dlplora.tasks.registry import get_suite

    if arguments.export:
        return _export(arguments.suite, arguments.data_root, arguments.export)
    require_rows_read(arguments.suite, arguments.data_root)
    rows = []
    for task in get_suite(arguments.suite, arguments.data_root).tasks:
        item = task.items("test" if not task.rows or "test" in task.rows else "train", 1)[0]
        chance = round(100 / len(item.choices), 1) if item.choices else None
        rows.append(
            {
                "task": task.name,
                "kind": task.kind,
                "version": task.version,
                "chance %": chance,
                "example": item.prompt[:110],
                "answer": item.answer[:60],
            }
        )
    _print(rows, arguments.format)
    return 0


def _export(suite: str, root: str | None, folder: str) -> int:
    from dlplora.errors import TaskError
    from dlplora.tasks.export import export_local

    if not suite.startswith("local:"):
        raise TaskError(f"only local tasks are exported, the suite is '{suite}'. Pass --suite local:all or local:TASK,TASK.")
    for path in export_local(suite.removeprefix("local:").split(","), root, folder):
        print(path)
    return 0
