"""Group records into tables: one protocol, one base model and one choice of tasks per table. Two base models are never averaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dlplora.config import config_hash
from dlplora.reporting.comparison import REFERENCE_METHOD, Scores, collect
from dlplora.reporting.doubt import Doubt, find_doubt
from dlplora.reporting.latency.join import LatencyColumns, latency_columns
from dlplora.reporting.schema import Record
from dlplora.reporting.store import OutcomeReader, is_publishable
from dlplora.reporting.tuning import Trial, load_trials, of_table, spelled

Setting = tuple[str, str, str, tuple[str, ...], int]
"""Suite, protocol, base model, tasks of a table, and how many the suite has."""
NOT_COMPARED = frozenset({"seeds", "tasks", "data_root", "backbone", "suite"})
"""Settings of a protocol that are told otherwise, or have no effect on one run."""
MOST_NAMED = 6
"""Most tasks that a heading names one by one."""


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
    tasks: tuple[str, ...] = ()
    """Tasks of the records, where other records of the protocol and base model have others."""

    doubt: Doubt | None = None
    """Prompts for which ``dlp`` keeps several adapters; None if there are hardly any."""

    @property
    def setting(self) -> str:
        """The protocol and, where they tell groups apart, the tasks."""
        listed = ", ".join(self.tasks) if len(self.tasks) <= MOST_NAMED else f"{len(self.tasks)} tasks, {self.tasks[0]} to {self.tasks[-1]}"
        of = len(self.records[0].suite_tasks)
        return f"{self.protocol} ({listed}{f', of {of} tasks' if of > len(self.tasks) else ''})" if self.tasks else self.protocol

    @property
    def title(self) -> str:
        """For headings, where a suite has several groups."""
        return f"protocol `{self.setting}`, base model `{self.backbone}`"

    @property
    def slug(self) -> str:
        """For file names."""
        tasks = f"_{len(self.tasks)}_tasks_{config_hash([*self.tasks, len(self.records[0].suite_tasks)])[:6]}" if self.tasks else ""
        return f"{self.suite}_{self.protocol}_{self.backbone}{tasks}".replace("/", "-")


def backbone_of(record: Record) -> str:
    """Name of a record's base model."""
    return str(record.backbone.get("name"))


def latest(records: Iterable[Record]) -> list[Record]:
    """Publishable records that belong into tables: for each table, row and seed the newest, of the rows that the newest record has.

    A record of other parameters than its preset's has a row of its own, which is named after them.
    """
    return _sorted_out(records)[0]


def left_out(records: Iterable[Record]) -> list[str]:
    """What ``latest`` leaves out and why, one sentence a record."""
    return _sorted_out(records)[1]


def _labelled(record: Record) -> Record:
    """The record under the name of its row; the name of its preset, which its file has, is kept."""
    changed = record.method.get("changed")
    if not changed or "preset" in record.method:
        return record
    name = f"{record.method_name} ({spelled(changed)})"
    return replace(record, method_name=name, method={**record.method, "preset": record.method_name})


def _sorted_out(records: Iterable[Record]) -> tuple[list[Record], list[str]]:
    newest: dict[tuple[Setting, str, int], Record] = {}
    rows: dict[tuple[Setting, str], str] = {}
    said = []
    ordered = sorted((_labelled(one) for one in records if is_publishable(one)), key=lambda one: one.created)
    for record in reversed(ordered):
        setting, row = setting_of(record), (setting_of(record), record.method_name, record.seed)
        data = _data_of(record)
        others = [task for task, checksum in data.items() if rows.setdefault((setting, task), checksum) != checksum]
        if row in newest:
            said.append(_told(record, f"a newer one has {_difference(record, newest[row])}"))
        elif others:
            said.append(_told(record, f"newer ones have other rows of {', '.join(others)}; evaluate again"))
        else:
            newest[row] = record
    return list(reversed(newest.values())), said


def _told(record: Record, reason: str) -> str:
    return f"{record.suite}: the record of {record.method_name}, seed {record.seed}, made {record.created}, is left out: {reason}."


def _data_of(record: Record) -> dict[str, str]:
    """Task -> checksum of its rows, as far as the record tells."""
    facts = record.provenance.get("data", {})
    return {**record.provenance.get("rows", {}), **{task: str(one["sha256"]) for task, one in facts.items() if "sha256" in one}}


def _difference(old: Record, new: Record) -> str:
    """What tells two records of one row apart."""
    data = _data_of(new)
    parts = [f"another {key}" for key in new.protocol if key in old.protocol and new.protocol[key] != old.protocol[key]]
    parts += ["other parameters"] if old.method_hash != new.method_hash else []
    parts += ["another pool"] if old.pool_hash != new.pool_hash else []
    parts += [f"another {role}" for role in new.artifact_hashes if new.artifact_hashes[role] != old.artifact_hashes.get(role)]
    changed = [task for task, checksum in _data_of(old).items() if data.get(task, checksum) != checksum]
    parts += [f"other rows of {', '.join(changed)}"] if changed else []
    return " and ".join(parts) or "another cell (rows, device or version)"


def setting_of(record: Record) -> Setting:
    """Suite, protocol, base model and tasks: what the records of one table share."""
    return record.suite, record.protocol_name, backbone_of(record), tuple(sorted(record.tasks)), len(record.suite_tasks)


def by_setting(records: Sequence[Record]) -> dict[Setting, list[Record]]:
    """Setting -> records, sorted; a protocol named like its suite comes first, and more tasks before fewer."""
    found: dict[Setting, list[Record]] = {}
    for record in records:
        found.setdefault(setting_of(record), []).append(record)
    return dict(
        sorted(found.items(), key=lambda pair: (pair[0][0], pair[0][1] != pair[0][0], *pair[0][1:3], -len(pair[0][3]), *pair[0][3:]))
    )


def mixed_in(records: Sequence[Record]) -> str:
    """What a table mixes: settings of the protocol, and, for one seed, different adapters as experts; empty if all records use the same."""
    sentences = []
    for key in dict.fromkeys(key for record in records for key in record.protocol if key not in NOT_COMPARED):
        values: dict[str, set[str]] = {}
        for record in records:
            if key in record.protocol:
                values.setdefault(str(record.protocol[key]), set()).add(record.method_name)
        if len(values) > 1:
            named = "; ".join(f"{value}: {', '.join(sorted(values[value]))}" for value in sorted(values))
            sentences.append(f"The table mixes values of {key}; compare methods of one value only ({named}).")
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
    latency = {suite: latency_columns(reader.root / "bench", suite) for suite in {setting[0] for setting in settings}}
    scores = {setting: collect(rows, reader.numbers) for setting, rows in settings.items()}
    choices = Counter(setting[:3] for setting in settings)
    return [
        Group(
            suite=setting[0],
            protocol=setting[1],
            backbone=setting[2],
            records=tuple(rows),
            scores=scores[setting],
            latency=latency[setting[0]] if setting[1] == setting[0] else None,  # other protocols have other adapters or base models
            trials=of_table(trials, rows),
            tasks=tuple(rows[0].tasks) if choices[setting[:3]] > 1 else (),
            doubt=find_doubt(rows, scores[setting], reader, REFERENCE_METHOD),
        )
        for setting, rows in settings.items()
    ]
