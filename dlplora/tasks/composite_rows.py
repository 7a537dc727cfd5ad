"""Composites in MeteoRA's files, one JSON object per line with ``prompt``, ``response`` and ``subtasks``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlplora.documents import parse_json
from dlplora.errors import ConfigError, TaskError
from dlplora.tasks.composite import Composite, Part
from dlplora.tasks.local import MAX_DIGITS

FIELDS = ("prompt", "response", "subtasks")


def is_composite_file(path: Path) -> bool:
    """Whether the first line of a JSONL file is a composite; a file that cannot be read is not."""
    try:
        with path.open("rb") as lines:
            first = parse_json(lines.readline(), str(path))
    except (OSError, ConfigError):
        return False
    return isinstance(first, dict) and set(FIELDS) <= set(first)


def read_composites(path: Path) -> list[Composite]:
    """Every row of a file, as reading ``serial``: the prompt stays as it is, answers are asked for as a numbered list.

    Raises:
        TaskError: Naming file, line and field of what is missing or wrong.
    """
    found = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}:{number}"
                found.append(_composite(parse_json(line, where, error=TaskError, max_digits=MAX_DIGITS), where))
    if not found:
        raise TaskError(f"{path}: no rows.")
    return found


def _composite(row: Any, where: str) -> Composite:
    if not isinstance(row, Mapping):
        raise TaskError(f"{where}: expected an object, got {type(row).__name__}.")
    for key in FIELDS:
        if not row.get(key):
            raise TaskError(f"{where}: field '{key}' is missing or empty; a composite row needs {', '.join(FIELDS)}.")
    if not isinstance(row["subtasks"], list):
        raise TaskError(f"{where}: 'subtasks' must be a list, got {type(row['subtasks']).__name__}.")
    parts = []
    for i, part in enumerate(row["subtasks"]):
        missing = [key for key in ("task", "question", "answer") if not isinstance(part, Mapping) or key not in part]
        if missing:
            raise TaskError(f"{where}: subtask {i} has no '{missing[0]}'.")
        kind = "mcq" if "choice:" in str(part["question"]) else "gen"
        parts.append(Part(str(part["task"]), i, str(part["question"]), " ".join(str(part["answer"]).split()), kind))
    return Composite("serial", str(row["prompt"]).rstrip(), tuple(parts), tuple(f"\n{i}." for i in range(1, len(parts) + 1)))
