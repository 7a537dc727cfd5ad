"""Which records stand in one table: those of one protocol and one backbone. Numbers of two backbones are never averaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dlplora.reporting.comparison import Scores, collect
from dlplora.reporting.latency.tables import interleaved
from dlplora.reporting.schema import Record
from dlplora.reporting.store import OutcomeReader, is_publishable


@dataclass(frozen=True, kw_only=True)
class Group:
    """The newest records of one suite under one protocol on one backbone."""

    suite: str
    protocol: str
    backbone: str
    records: tuple[Record, ...]
    scores: Scores
    """Outcomes of single questions."""

    @property
    def title(self) -> str:
        """For headings, where a suite has several groups."""
        return f"protocol `{self.protocol}`, backbone `{self.backbone}`"

    @property
    def slug(self) -> str:
        """For file names."""
        return f"{self.suite}_{self.protocol}_{self.backbone}".replace("/", "-")


def backbone_of(record: Record) -> str:
    """Name of a record's backbone."""
    return str(record.backbone.get("name"))


def latest(records: Iterable[Record]) -> list[Record]:
    """Publishable records, the newest for each suite, protocol, backbone, method configuration and seed."""
    newest: dict[tuple[str, str, str, str, int], Record] = {}
    for record in sorted((record for record in records if is_publishable(record)), key=lambda record: record.created):
        newest[record.suite, record.protocol_name, backbone_of(record), record.method_name, record.seed] = record
    return list(newest.values())


def by_setting(records: Sequence[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """(Suite, protocol, backbone) -> records, sorted; a protocol named like its suite comes first."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.suite, record.protocol_name, backbone_of(record)), []).append(record)
    return dict(sorted(found.items(), key=lambda pair: (pair[0][0], pair[0][1] != pair[0][0], pair[0][1:])))


def group(records: Iterable[Record], reader: OutcomeReader) -> list[Group]:
    """The newest records in groups, with the latencies of the newest bench record, and their outcomes read once.

    Raises:
        RecordError: If a record's outcomes are missing or damaged.
    """
    return [
        Group(suite=suite, protocol=protocol, backbone=backbone, records=tuple(rows), scores=collect(rows, reader.numbers))
        for (suite, protocol, backbone), rows in by_setting(interleaved(latest(records), reader.root)).items()
    ]
