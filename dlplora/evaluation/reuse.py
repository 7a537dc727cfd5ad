"""Which finished record stands for a run. A cell does not cover code, so a record counts only as far as the present code made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlplora.evaluation.method_code import method_code, method_files
from dlplora.methods.base import FusionMethod
from dlplora.provenance import changed_files
from dlplora.reporting.schema import Record
from dlplora.reporting.store import RESULTS, finished_records, outdated


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a run."""

    path: Path | None = None
    """Its record; None if there is none that counts."""
    note: str = ""
    """Why records of the run do not count, or what the one that counts does not cover; empty if there is nothing to say."""


def known_cell(
    cell: str,
    seed: int,
    suite: str,
    name: str,
    method: type[FusionMethod],
    root: Path = RESULTS,
    rooms: Sequence[str] = ("runs", "scratch"),
) -> Known:
    """The record of a cell that finished under the present code of its method.

    Args:
        cell: Hash of everything else that the numbers depend on.
        seed, suite, name: Of the run.
        method: Its class.
        root: Results folder.
        rooms: Folders of the records, in the order in which they are looked at.
    """
    refused = []
    for path, record in finished_records(cell, seed, suite, name, root, rooms):
        changed = set(changed_files() or ())
        own = sorted(one.name for one in method_files(method).values() if one.resolve() in changed)
        reason = outdated(record.provenance, method_code(method))
        if reason is None and own and "method_code" not in record.provenance:
            reason = f"does not say which code of the method made it, and {', '.join(own)} has changed"
        if reason is None:
            return Known(path=path, note=_uncovered(record, changed))
        refused.append(f"{path} {reason}")
    return Known(note="; ".join(refused))


def _uncovered(record: Record, changed: set[Path]) -> str:
    """What could make a repeated run differ from its record."""
    if changed and record.provenance.get("git", {}).get("dirty") is False:
        return f"it was made without the uncommitted changes in {len(changed)} file{'s' if len(changed) > 1 else ''}"
    return "" if "method_code" in record.provenance else "it does not say which code of the method made it"
