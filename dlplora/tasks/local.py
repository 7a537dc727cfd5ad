"""Tasks read from local JSONL files, one folder per task: ``ROOT/TASK/train.jsonl`` and ``ROOT/TASK/test.jsonl``.

One object per line, UTF-8. Multiple choice: ``{"question", "choices": [...], "answer": index}``, where ``choices`` may be called
``options`` and the answer may be an option's text or letter; generation: ``{"question", "answer"}``. The root is given, or
taken from ``DLPLORA_DATA``.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlplora.documents import parse_json, require_mapping
from dlplora.errors import TaskError, nearest
from dlplora.tasks.types import Item, Suite, Task

log = logging.getLogger(__name__)

ENV_ROOT = "DLPLORA_DATA"
VALIDATION_SHARE = 0.1
MAX_DIGITS = 4000
"""Most digits of a number in a row; answers may be long numbers."""
MAX_LINE = 1 << 24
"""Most bytes of a row; longer rows are a sign of a damaged file."""
OPTIONS = ("choices", "options")
"""Names of the column of options."""
LIKE_OPTIONS = re.compile(
    r"(mc_?)?(choices?|options?|candidates|endings|alternatives|distractors|(?-i:[A-E])|(choice|option)_?[a-e0-9])", re.IGNORECASE
)
"""Columns that look like options: a row with one of them and without ``choices`` would become generation without a word."""
EXPECTED = "A row needs question and answer and, for multiple choice, choices: a list of options"


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
        row: ``{"question", "choices": [...], "answer": index, letter or text}`` or ``{"question", "answer": text}``.
        task: Task name.
        where: File and line, for errors.

    Raises:
        TaskError: Naming the file, the line and the field that is missing or wrong.
    """
    for key in ("question", "answer"):
        if key not in row:
            raise TaskError(f"{where}: field '{key}' is missing. {EXPECTED}.")
    question = str(_plain(row["question"], "question", where)).rstrip()
    if not question:
        raise TaskError(f"{where}: 'question' is empty.")
    given = [key for key in OPTIONS if row.get(key) is not None]
    if not given:
        unread = next((key for key in row if LIKE_OPTIONS.fullmatch(key) and row[key] is not None), None)
        if unread is not None:
            raise TaskError(f"{where}: column '{unread}' is not read. {EXPECTED}.")
        return Item(task, question, str(_plain(row["answer"], "answer", where)).strip())
    if len(given) > 1:
        raise TaskError(f"{where}: 'choices' and 'options' are the same column; give one of them.")
    (column,) = given
    if not isinstance(row[column], list) or len(row[column]) < 2:
        raise TaskError(f"{where}: '{column}' must be a list of at least two options.")
    options = tuple(str(_plain(choice, f"{column}[{number}]", where)).strip() for number, choice in enumerate(row[column]))
    if not all(options):
        raise TaskError(f"{where}: option {options.index('')} of '{column}' is empty; nothing can be scored for it.")
    gold = _gold(row["answer"], options)
    if gold is None:
        raise TaskError(
            f"{where}: 'answer' must be an index from 0 to {len(options) - 1}, a letter from A to {chr(64 + min(len(options), 26))} or the "
            f"text of one option, got {json.dumps(row['answer'], ensure_ascii=False)[:60]}."
        )
    return Item(task, question, options[gold], options, gold)


def _gold(answer: Any, options: Sequence[str]) -> int | None:
    """Index of the right option; the text of an option counts before a letter. None if the answer is neither, or names two options."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(options) else None
    if not isinstance(answer, str):
        return None
    text = answer.strip()
    for same in (str, str.casefold):
        named = [number for number, option in enumerate(options) if same(option) == same(text)]
        if named:
            return named[0] if len(named) == 1 else None
    letter = re.fullmatch(r"\(?([A-Za-z])[).:]?", text)
    place = ord(letter[1].upper()) - ord("A") if letter else len(options)
    return place if place < len(options) else None


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
        raise TaskError(f"'{name}' is not a task name; write local:all, or names of folders of the data root: local:TASK,TASK.")
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
        raise TaskError(f"{folder}: some rows have options ('choices') and some do not; a task must be one or the other.")
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
    return not isinstance(row, dict) or bool({"question", "answer", *OPTIONS} & row.keys())


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
    tasks = tuple(_local_task(folder, name) for name in wanted)
    for task in tasks:
        trained = {(row.prompt, row.choices, row.answer) for split in ("train", "validation") for row in task.rows.get(split, ())}
        asked = task.rows.get("test", ())
        both = sum((row.prompt, row.choices, row.answer) in trained for row in asked)
        if both:
            _warn_once(f"{folder / task.name}: {both} of {len(asked)} rows of test.jsonl are also in train.jsonl; scores are too high.")
    return Suite("local", tasks)


@functools.cache
def _warn_once(text: str) -> None:
    """A suite is read several times in one process."""
    log.warning(text)
