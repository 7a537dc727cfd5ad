"""Record files: found, written once and atomically, never edited."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dlplora.errors import RecordError
from dlplora.reporting.schema import Record, read_record, to_json

RESULTS = Path("results")


def is_publishable(record: Record) -> bool:
    """Whether a record may stand in a table: finished, not limited, and made by committed code (or outside git)."""
    return record.status == "ok" and record.limit is None and record.provenance.get("git", {}).get("dirty") is not True


def record_path(record: Record, root: Path = RESULTS) -> Path:
    """``runs/<suite>/`` for publishable records, ``scratch/<suite>/`` for limited, failed and dirty ones."""
    room = "runs" if is_publishable(record) else "scratch"
    return root / room / record.suite / f"{record.method_name}-{record.cell}-s{record.seed}.json"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def save(record: Record, root: Path = RESULTS) -> Path:
    """Write a record where it belongs and return the path."""
    path = record_path(record, root)
    write_atomically(path, to_json(record))
    return path


def find_cell(cell: str, seed: int, suite: str, method_name: str, root: Path = RESULTS, *, scratch: bool = False) -> Path | None:
    """The finished record of a cell, if there is one."""
    rooms = ("runs", "scratch") if scratch else ("runs",)
    for room in rooms:
        path = root / room / suite / f"{method_name}-{cell}-s{seed}.json"
        if path.is_file() and read_record(path).status == "ok":
            return path
    return None


def iterate(root: Path = RESULTS, suite: str | None = None, room: str = "runs") -> Iterator[Path]:
    """Record files of one suite (None: all), sorted by path."""
    pattern = f"{room}/{suite or '*'}/*.json"
    yield from sorted(root.glob(pattern))


def load_all(root: Path = RESULTS, suite: str | None = None, room: str = "runs") -> tuple[list[Record], list[str]]:
    """Every readable record, and one message for each that is not; a damaged record does not hide the rest."""
    records: list[Record] = []
    problems: list[str] = []
    for path in iterate(root, suite, room):
        try:
            records.append(read_record(path))
        except RecordError as error:
            problems.append(str(error))
    return records, problems
