"""Tasks read from local JSONL files, one folder per task: ``ROOT/TASK/train.jsonl`` and ``ROOT/TASK/test.jsonl``.

One object per line, UTF-8. Multiple choice: ``{"question", "choices": [...], "answer": index}``; generation:
``{"question", "answer"}``. The root is given, or taken from ``DLPLORA_DATA``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlplora.documents import parse_json, require_mapping
from dlplora.errors import TaskError, nearest
from dlplora.tasks.types import Item, Suite, Task

ENV_ROOT = "DLPLORA_DATA"
VALIDATION_SHARE = 0.1
MAX_DIGITS = 4000
"""Most digits of a number in a row; answers may be long numbers."""
MAX_LINE = 1 << 24
"""Most bytes of a row; longer rows are a sign of a damaged file."""


def data_root(given: str | None) -> Path:
    """The folder of local rows.

    Raises:
        TaskError: If none is given or it does not exist.
    """
    root = given or os.environ.get(ENV_ROOT)
    if not root:
        raise TaskError(f"local tasks need a folder of rows: pass --data-root DIR or set {ENV_ROOT}.")
    if not Path(root).is_dir():
        raise TaskError(f"data root not found: {root}. It must hold TASK/train.jsonl and TASK/test.jsonl.")
    return Path(root)


def rows_state(given: str | None) -> tuple[object, ...]:
    """Place, size and time of the files under the data root, empty without one: what is remembered of rows must not outlive them."""
    root = Path(given or os.environ.get(ENV_ROOT) or "\0")
    if not root.is_dir():
        return ()
    found = [(str(path), path.stat()) for path in sorted(root.glob("*/*.jsonl"))]
    return (str(root.resolve()), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in found))


def parse_row(row: Mapping[str, Any], task: str, where: str) -> Item:
    """One JSON row of the local schema to an item.

    Args:
        row: ``{"question", "choices": [...], "answer": index}`` or ``{"question", "answer": text}``.
        task: Task name.
        where: File and line, for errors.

    Raises:
        TaskError: Naming the file, the line and the field that is missing or wrong.
    """
    for key in ("question", "answer"):
        if key not in row:
            raise TaskError(f"{where}: field '{key}' is missing; a row needs question, answer and, for multiple choice, choices.")
    question = str(_plain(row["question"], "question", where)).rstrip()
    if not question:
        raise TaskError(f"{where}: 'question' is empty.")
    choices = row.get("choices")
    if choices is None:
        return Item(task, question, str(_plain(row["answer"], "answer", where)).strip())
    gold = row["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise TaskError(f"{where}: 'choices' must be a list of at least two options.")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise TaskError(f"{where}: 'answer' must be an index from 0 to {len(choices) - 1}, got {json.dumps(gold)[:60]}.")
    options = tuple(str(_plain(choice, f"choices[{number}]", where)).strip() for number, choice in enumerate(choices))
    if not all(options):
        raise TaskError(f"{where}: option {options.index('')} of 'choices' is empty; nothing can be scored for it.")
    return Item(task, question, options[gold], options, gold)


def _plain(value: Any, name: str, where: str) -> str | int | float:
    """A text or a number; ``null``, ``true``, a list or an object would be scored as Python writes it.

    Raises:
        TaskError: For anything else.
    """
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise TaskError(f"{where}: '{name}' must be text or a number, got {json.dumps(value)[:60]}.")
    return value


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not empty.

    Raises:
        TaskError: If it is not a regular file (others may never end), or a line is longer than any row.
    """
    if not path.is_file():
        raise TaskError(f"{path} is not a file.")
    with path.open("rb") as handle:
        for number, line in enumerate(iter(lambda: handle.readline(MAX_LINE + 1), b""), start=1):
            if len(line) > MAX_LINE:
                raise TaskError(f"{path}:{number}: the line is longer than {MAX_LINE:,} bytes.")
            if line.strip():
                yield number, line


def read_rows(path: Path, task: str) -> list[Item]:
    """All rows of one JSONL file.

    Raises:
        TaskError: With file and line for text that is not JSON, a missing field, or an index out of range.
    """
    items: list[Item] = []
    for number, line in _lines(path):
        where = f"{path}:{number}"
        row = require_mapping(parse_json(line, where, error=TaskError, max_digits=MAX_DIGITS), where, error=TaskError)
        items.append(parse_row(row, task, where))
    if not items:
        raise TaskError(f"{path}: no rows.")
    return items


def _local_task(root: Path, name: str) -> Task:
    if "/" in name or name in {"", ".", ".."} or "\\" in name or any("\ud800" <= one <= "\udfff" for one in name):
        raise TaskError(f"'{name}' is not a task name.")
    folder = root / name
    if not folder.is_dir():
        known = sorted(path.parent.name for path in root.glob("*/test.jsonl"))
        raise TaskError(f"no task '{name}' under {root}.{nearest(name, known)} Known: {', '.join(known) or 'none'}.")
    paths = {split: folder / f"{split}.jsonl" for split in ("train", "test")}
    rows = {split: tuple(read_rows(path, name)) for split, path in paths.items() if path.exists() or path.is_symlink()}
    if not rows:
        raise TaskError(f"{folder} has neither train.jsonl nor test.jsonl.")
    kinds = {item.choices is None for split in rows.values() for item in split}
    if len(kinds) > 1:
        raise TaskError(f"{folder}: some rows have 'choices' and some do not; a task must be one or the other.")
    train = rows.get("train", ())
    cut = len(train) - max(1, round(len(train) * VALIDATION_SHARE)) if len(train) > 1 else len(train)
    # The end of the training file is the validation split; both readers of the file cut it at the same place.
    splits = {"train": train[:cut], "validation": train[cut:], "test": rows.get("test", ())}
    return Task(name=name, kind="gen" if kinds == {True} else "mcq", rows={key: value for key, value in splits.items() if value})


def readable_tasks(root: str | None) -> list[str]:
    """Tasks of the data folder that have test rows in our schema, sorted; others are passed over."""
    names = []
    for path in sorted(data_root(root).glob("*/test.jsonl")):
        try:
            _local_task(path.parent.parent, path.parent.name)
        except TaskError:
            continue
        names.append(path.parent.name)
    return names


def _in_our_schema(path: Path) -> bool:
    """Whether the first row of a file has our fields; a file without rows, or without an object, is ours to complain about."""
    try:
        _, first = next(_lines(path), (0, b"no row"))
        row = parse_json(first, str(path), error=TaskError, max_digits=MAX_DIGITS)
    except TaskError:
        return True
    return not isinstance(row, dict) or bool({"question", "answer", "choices"} & row.keys())


def local_suite(names: Sequence[str], root: str | None) -> Suite:
    """A suite of local tasks in the order named.

    ``all`` takes every folder with a ``test.jsonl``, sorted, without those with rows of another schema. A damaged row is an error: a
    mean over the tasks that are left would be another number under the same name.

    Raises:
        TaskError: If a task is not there, named twice, or one of its rows is malformed.
    """
    folder = data_root(root)
    wanted = list(names)
    if wanted == ["all"]:
        wanted = [path.parent.name for path in sorted(folder.glob("*/test.jsonl")) if _in_our_schema(path)]
    if len(set(wanted)) != len(wanted):
        raise TaskError(f"duplicate task names: {', '.join(wanted)}.")
    return Suite("local", tuple(_local_task(folder, name) for name in wanted))
