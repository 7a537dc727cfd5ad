"""Record files: found, written once and atomically, never edited."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlplora.atomic import replacing, write_atomically
from dlplora.errors import RecordError
from dlplora.provenance import git_state
from dlplora.reporting.samples import Outcome, TaskOutcomes, read_samples, write_samples
from dlplora.reporting.schema import Record, read_record, to_json

RESULTS = Path("results")
RESULT_FIELDS = ("tasks", "status", "routing", "protocol", "method", "backbone", "provenance", "created")
"""Fields in which two records of one cell may contradict each other, the weightiest first."""


def held_back(record: Record) -> str | None:
    """Why a record appears in no table; None if it may: finished, of the test split, not limited, of committed code (or outside git)."""
    if record.status != "ok":
        return "failed or interrupted"
    if record.limit is not None:
        return "limited to some questions (--limit)"
    if record.protocol.get("split", "test") != "test":
        return "of the validation split"
    return "of uncommitted code" if record.provenance.get("git", {}).get("dirty") is True else None


def is_publishable(record: Record) -> bool:
    """Whether a record may appear in a table."""
    return held_back(record) is None


def record_path(record: Record, root: Path = RESULTS) -> Path:
    """``runs/<suite>/`` for publishable records, ``scratch/<suite>/`` for limited, failed and dirty ones."""
    room = "runs" if is_publishable(record) else "scratch"
    name = record.method.get("preset", record.method_name)  # a table may name its row otherwise
    return root / room / record.suite / f"{name}-{record.cell}-s{record.seed}.json"


def save(record: Record, root: Path = RESULTS, outcomes: Sequence[Outcome] | None = None) -> Path:
    """Write a record where it belongs, with its questions' outcomes, and return the path.

    Both files are on disk before either appears, so a full disk leaves what was there. A record names the checksum of its outcomes, which
    appear first, so a run that is cut off between the two leaves no record.
    """
    path = record_path(record, root)
    if not outcomes:
        write_atomically(path, to_json(record))
        return path
    with replacing(path) as record_file, replacing(samples_path(path)) as samples_file:
        write_samples(samples_file, outcomes)
        record = dataclasses.replace(record, samples_sha256=file_checksum(samples_file))
        record_file.write_text(to_json(record), encoding="utf-8")
    return path


def samples_path(path: Path) -> Path:
    """Where the outcomes of a record file are."""
    return path.with_suffix(".parquet")


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_samples(path: Path, record: Record) -> None:
    """Nothing if a record's outcomes are there and the ones it was written with, or if it kept none.

    Raises:
        RecordError: Naming file and field if they are not.
    """
    if record.samples_sha256 is None:
        return
    file = samples_path(path)
    if not file.is_file():
        raise RecordError(f"{file}: missing; {path.name} names it in 'samples_sha256'.")
    if file_checksum(file) != record.samples_sha256:
        raise RecordError(f"{file}: its checksum is not the one that {path.name} names in 'samples_sha256'.")


def load_samples(path: Path, record: Record, *, texts: bool = True) -> dict[str, TaskOutcomes] | None:
    """The outcomes of a record's questions by task; None if none were kept.

    Raises:
        RecordError: If the file is missing, damaged, or not the one the record was written with.
    """
    check_samples(path, record)
    return None if record.samples_sha256 is None else read_samples(samples_path(path), texts=texts)


class OutcomeReader:
    """The outcomes of the records under one results folder. Calling it gives everything, and remembers it: figures and page ask twice.

    Args:
        root: Results folder.
    """

    def __init__(self, root: Path = RESULTS) -> None:
        self.root = root
        self._known: dict[Path, dict[str, TaskOutcomes] | None] = {}

    def __call__(self, record: Record) -> dict[str, TaskOutcomes] | None:
        """As ``load_samples``."""
        path = record_path(record, self.root)
        if path not in self._known:
            self._known[path] = load_samples(path, record)
        return self._known[path]

    def numbers(self, record: Record) -> dict[str, TaskOutcomes] | None:
        """Without answers and routing, which statistics do not need."""
        return load_samples(record_path(record, self.root), record, texts=False)


def finished_records(
    cell: str, seed: int, suite: str, method_name: str, root: Path = RESULTS, rooms: Sequence[str] = ("runs",)
) -> Iterator[tuple[Path, Record]]:
    """The finished records of a cell, in the order of the rooms."""
    for room in rooms:
        path = root / room / suite / f"{method_name}-{cell}-s{seed}.json"
        if path.is_file() and (record := read_record(path)).status == "ok":
            yield path, record


def outdated(provenance: Mapping[str, Any], code: str | None = None) -> str | None:
    """Why a finished record does not show what the present code gives; None if nothing speaks against it.

    Args:
        provenance: Of the record.
        code: Hash of the method's source now; None if unknown.
    """
    known = provenance.get("method_code")
    if None not in (known, code) and known != code:
        return "was made by other code of the method"
    git = provenance.get("git", {})
    if git.get("dirty") is True:
        now, part = git_state(), "all" if None in (known, code) else "library"
        made, here = (state.get("changes", {}).get(part) for state in (git, now))
        if made is None or (git.get("commit"), made) != (now["commit"], here):
            return "was made by uncommitted code that is not the present code"
    return None


def find_cell(cell: str, seed: int, suite: str, method_name: str, root: Path = RESULTS, *, scratch: bool = False) -> Path | None:
    """The finished record of a cell that is not outdated, if there is one."""
    rooms = ("runs", "scratch") if scratch else ("runs",)
    found = finished_records(cell, seed, suite, method_name, root, rooms)
    return next((path for path, record in found if outdated(record.provenance) is None), None)


def iterate(root: Path = RESULTS, suite: str | None = None, room: str = "runs") -> Iterator[Path]:
    """Record files of one suite (None: all), sorted by path."""
    pattern = f"{room}/{suite or '*'}/*.json"
    yield from sorted(root.glob(pattern))


def load_all(root: Path = RESULTS, suite: str | None = None, room: str = "runs") -> tuple[list[Record], list[str]]:
    """Every sound record, and one message for each that is not; a damaged record does not hide the rest.

    A record is not sound if it cannot be read, is in another suite's folder, or is the same experiment as an earlier file with
    another outcome.
    """
    records: list[Record] = []
    problems: list[str] = []
    first: dict[tuple[str, str, int], tuple[Path, Record]] = {}
    for path in iterate(root, suite, room):
        try:
            record = read_record(path)
        except RecordError as error:
            problems.append(str(error))
            continue
        if record.suite != path.parent.name:
            problems.append(f"{path}: field 'suite' is '{record.suite}', the folder is that of suite '{path.parent.name}'.")
            continue
        known = first.setdefault((record.method_name, record.cell, record.seed), (path, record)) if record.cell else (path, record)
        if known[0] != path:
            field = next((name for name in RESULT_FIELDS if getattr(record, name) != getattr(known[1], name)), None)
            if field is not None:
                problems.append(f"{path}: the same cell {record.cell} as {known[0]}, but field '{field}' differs; remove one of them.")
            continue
        records.append(record)
    return records, problems
