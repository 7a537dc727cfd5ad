"""Group records into tables: one protocol and one base model per table. Numbers of two base models are never averaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dlplora.reporting.comparison import REFERENCE_METHOD, Scores, collect
from dlplora.reporting.doubt import Doubt, find_doubt
from dlplora.reporting.latency.join import LatencyColumns, latency_columns
from dlplora.reporting.schema import Record
from dlplora.reporting.store import OutcomeReader, is_publishable
from dlplora.reporting.tuning import Trial, load_trials, of_table


@dataclass(frozen=True, kw_only=True)
class Group:
    """The newest records of one suite under one protocol on one base model."""

    suite: str
    protocol: str
    backbone: str
    records: tuple[Record, ...]
    scores: Scores
    """Outcomes of single questions."""
    latency: LatencyColumns | None = None
    """Ratios of a bench record; None if there is none for the suite."""
    trials: Mapping[str, Sequence[Trial]] = field(default_factory=dict)
    """Preset -> trials of its settings on the validation split."""

    doubt: Doubt | None = None
    """Prompts for which ``dlp`` keeps several adapters; None if there are hardly any."""

    @property
    def title(self) -> str:
        """For headings, where a suite has several groups."""
        return f"protocol `{self.protocol}`, base model `{self.backbone}`"

    @property
    def slug(self) -> str:
        """For file names."""
        return f"{self.suite}_{self.protocol}_{self.backbone}".replace("/", "-")


def backbone_of(record: Record) -> str:
    """Name of a record's base model."""
    return str(record.backbone.get("name"))


def latest(records: Iterable[Record]) -> list[Record]:
    """Publishable records, the newest for each suite, protocol, base model, method configuration and seed."""
    newest: dict[tuple[str, str, str, str, int], Record] = {}
    for record in sorted((record for record in records if is_publishable(record)), key=lambda record: record.created):
        newest[record.suite, record.protocol_name, backbone_of(record), record.method_name, record.seed] = record
    return list(newest.values())


def by_setting(records: Sequence[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """(Suite, protocol, base model) -> records, sorted; a protocol named like its suite comes first."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.suite, record.protocol_name, backbone_of(record)), []).append(record)
    return dict(sorted(found.items(), key=lambda pair: (pair[0][0], pair[0][1] != pair[0][0], pair[0][1:])))


def different_pools(records: Sequence[Record]) -> str:
    """A sentence that names the methods of one seed with different adapters as experts; empty if all use the same."""
    sentences = []
    for seed in sorted({record.seed for record in records}):
        pools: dict[str, set[str]] = {}
        for record in records:
            if record.seed == seed and record.method_name != "base":  # the base model gives the same answers with any pool
                pools.setdefault(record.pool_hash, set()).add(record.method_name)
        if len(pools) > 1:
            named = "; ".join(f"{pool[:8]}: {', '.join(sorted(pools[pool]))}" for pool in sorted(pools))
            sentences.append(f"Seed {seed} mixes pools of different experts; compare methods of one pool only ({named}).")
    return " ".join(sentences)


def group(records: Iterable[Record], reader: OutcomeReader) -> list[Group]:
    """The newest records in groups, their outcomes read once, and the latency columns of their suite.

    Raises:
        RecordError: If a record's outcomes, a bench record or a trial are damaged.
    """
    trials = load_trials(reader.root)
    settings = by_setting(latest(records))
    latency = {suite: latency_columns(reader.root / "bench", suite) for suite in {suite for suite, _, _ in settings}}
    scores = {setting: collect(rows, reader.numbers) for setting, rows in settings.items()}
    return [
        Group(
            suite=suite,
            protocol=protocol,
            backbone=backbone,
            records=tuple(rows),
            scores=scores[suite, protocol, backbone],
            latency=latency[suite],
            trials=of_table(trials, rows),
            doubt=find_doubt(rows, scores[suite, protocol, backbone], reader, REFERENCE_METHOD),
        )
        for (suite, protocol, backbone), rows in settings.items()
    ]
