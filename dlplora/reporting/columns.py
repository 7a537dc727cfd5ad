"""Contents of the main table: its columns, mean and error of every cell, and the best value of each column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dlplora.reporting.comparison import COMPARED, MAIN_METRIC, PRIMARY, Scores, ties_with
from dlplora.reporting.latency.join import LatencyColumns
from dlplora.reporting.methods import OTHER, experts_kept, group_of, merged_experts, method_facts, trained_parameters
from dlplora.reporting.schema import Record
from dlplora.reporting.statistics import combined_stderr
from dlplora.reporting.tuning import Trial, preset_of

KEPT, ACCURACY = "routing.mean_experts_kept", "routing.router_accuracy"
TRIALS = "tuning.trials"
SEEDS = "seeds"
PREFILL, DECODE = "latency.ttft_ratio", "latency.tpot_ratio"


@dataclass(frozen=True)
class Column:
    """One column of the main table: where its value is, how it is printed, and whether larger is better (None: neither)."""

    title: str
    key: str
    percent: bool = True
    larger_is_better: bool | None = True
    digits: int = 1
    factor: float | None = None
    """What a value is multiplied with before it is printed; None: 100 for percentages, else 1."""

    @property
    def scale(self) -> float:
        """See ``factor``."""
        return self.factor if self.factor is not None else 100.0 if self.percent else 1.0


COLUMNS = (
    Column("mean score %", PRIMARY),
    Column("MCQ accuracy %", "mcq_acc"),
    Column("exact match %", "gen_exact_match"),
    Column("BLEU", "gen_bleu", percent=False),
    Column("ROUGE-1 %", "gen_rouge1"),
    Column("ROUGE-L %", "gen_rougeL"),
    Column("experts kept", KEPT, percent=False, larger_is_better=None, digits=2),
    Column("router accuracy %", ACCURACY, larger_is_better=None),
    Column("trained parameters", "trained_parameters", percent=False, larger_is_better=None, digits=0),
    Column("training tokens (M)", "training_tokens", percent=False, larger_is_better=None, digits=2, factor=1e-6),
    Column("trials", TRIALS, percent=False, larger_is_better=None, digits=0),
    Column("seeds", SEEDS, percent=False, larger_is_better=None, digits=0),
    Column("prefill ÷ one LoRA", PREFILL, percent=False, larger_is_better=None, digits=2),
    Column("decode ÷ one LoRA", DECODE, percent=False, larger_is_better=None, digits=2),
)
README_COLUMNS = tuple(
    next(column for column in COLUMNS if column.key == key)
    for key in ("mcq_acc", "gen_exact_match", "gen_rougeL", "training_tokens", DECODE)
)
REFERENCE_ROWS = ("base", "oracle", "multitask", "avg_delta", "dlp", "dlp_code")
"""First rows of every table."""
README_ROWS = ("base", "oracle", "multitask", "avg_delta", "dlp", "lorauter_tuned", "tfidf_linear", "meteora_gate")
"""The only rows in the README: the references, a method without a trained router, an ordinary classifier, and gates for each token. The
default stands in for a tuned row that there is not."""
Trials = Mapping[str, Sequence[Trial]]
"""Preset -> its trials."""
GATED = "†"
"""Mark of a router accuracy that was read from gates."""


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Method configuration -> its records, in their order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.method_name, []).append(record)
    return groups


def by_seeds(records: Sequence[Record]) -> list[list[Record]]:
    """Records in tables whose rows are means over the same seeds: the largest set of seeds first, then what has fewer.

    A mean over one seed and one over three differ by the experts that these seeds trained, so they are not put in one column. A table of
    fewer seeds repeats the reference rows and the defaults of tuned rows, from these seeds alone.
    """
    seeds = {name: frozenset(record.seed for record in rows) for name, rows in by_method(records).items()}
    found = []
    for wanted in sorted(set(seeds.values()), key=lambda some: (-len(some), sorted(some))):
        shown = {name for name, own in seeds.items() if own == wanted}
        beside = {*REFERENCE_ROWS, *map(preset_of, shown)}
        shown |= {name for name, own in seeds.items() if name in beside and own > wanted}
        found.append([record for record in records if record.method_name in shown and record.seed in wanted])
    return found


def row_order(record: Record) -> tuple[int, int, str]:
    """Sort key of a table's rows: the reference rows first, then by group and name."""
    first = REFERENCE_ROWS.index(record.method_name) if record.method_name in REFERENCE_ROWS else len(REFERENCE_ROWS)
    return first, [*method_facts().groups, OTHER].index(group_of(record)), record.method_name


def _primary(record: Record) -> tuple[float | None, float | None]:
    """Mean over all tasks of the suite of accuracy or exact match, with its standard error over questions; None unless all are there."""
    rows = [record.tasks.get(task) for task in record.suite_tasks]
    if not rows or any(row is None or MAIN_METRIC[row.kind] not in row.metrics for row in rows):
        return None, None
    found = [(row.metrics[MAIN_METRIC[row.kind]], row.stderr.get(MAIN_METRIC[row.kind])) for row in rows if row is not None]
    errors = [error for _, error in found if error is not None]
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(found) if len(errors) == len(found) else None
    return sum(value for value, _ in found) / len(found), stderr


def value_of(record: Record, key: str, pools: Mapping[str, float] | None = None) -> float | None:
    """What a record says for a column: an aggregate, ``routing.…``, or a count. Latency is never in it.

    Args:
        record: Of one run.
        key: Key of a column.
        pools: Of ``merged_experts``, for the experts kept by static merges.
    """
    if key == PRIMARY:
        return _primary(record)[0]
    if key == KEPT:
        value = experts_kept(record, pools or {})
    elif key == "trained_parameters":
        value = trained_parameters(record)
    elif key == "training_tokens":
        value = record.training_tokens
    elif key in {TRIALS, SEEDS}:
        return None
    elif key.startswith("routing."):
        value = record.routing.get(key.removeprefix("routing."))
    else:
        value = record.aggregates.get(key)
    return None if value is None else float(value)


def _summary(rows: Sequence[Record], key: str, pools: Mapping[str, float] | None = None) -> tuple[float | None, float | None]:
    """Mean over seeds and its standard error, which combines questions and seeds; None unless every seed has a value."""
    values = [value for value in (value_of(row, key, pools) for row in rows) if value is not None]
    if len(values) != len(rows) or not values:
        return None, None
    mean = round(sum(values) / len(values), 12)  # results that differ only in the last bit of a sum are printed alike
    if key not in COMPARED:
        return mean, None
    errors = [_primary(row)[1] if key == PRIMARY else row.aggregates.get(f"{key}_stderr") for row in rows]
    return mean, combined_stderr([error for error in errors if error is not None], values)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The cells of the main table."""

    summaries: Mapping[str, Mapping[str, tuple[float | None, float | None]]]
    """Method -> column key -> mean over seeds and standard error."""
    best: Mapping[str, float | None]
    """Column key -> best mean; None where larger is not better."""
    ties: Mapping[str, set[str]]
    """Key of the primary column -> methods not significantly worse than the best; other columns are descriptive and have no marks."""
    gated: frozenset[str]
    """Methods with a router accuracy read from gates."""


def rows_of(
    records: Sequence[Record], scores: Scores | None = None, latency: LatencyColumns | None = None, trials: Trials | None = None
) -> Rows:
    """Means, errors, and what is best, for the methods of some records.

    Args:
        records: Newest of each method and seed.
        scores: Outcomes of the whole table, also where only some of its rows are shown; without them significance is not marked.
        latency: Ratios joined by the name of the preset.
        trials: Trials of the preset's settings on the validation split, by the name of the preset.
    """
    groups = by_method(sorted(records, key=row_order))
    pools = merged_experts(records)
    summaries = {name: {column.key: _summary(rows, column.key, pools) for column in COLUMNS} for name, rows in groups.items()}
    for name, cells in summaries.items():
        prefill, decode = (None, None) if latency is None else latency.ratios.get(name, (None, None))
        tried = len((trials or {}).get(preset_of(name), ())) or None
        cells |= {PREFILL: (prefill, None), DECODE: (decode, None), TRIALS: (tried, None), SEEDS: (len(groups[name]), None)}
    best: dict[str, float | None] = {}
    ties: dict[str, set[str]] = {}
    told = scores is not None and set(groups) <= set(scores.methods)
    for column in COLUMNS:
        present = {name: mean for name, cells in summaries.items() if (mean := cells[column.key][0]) is not None}
        best[column.key] = max(present.values()) if present and column.larger_is_better else None
        if column.key == PRIMARY and present and scores is not None and told:
            ties[column.key] = ties_with(scores, column.key, max(present, key=lambda name: present[name])) & set(groups)
    gated = frozenset(name for name, rows in groups.items() if any(row.routing.get("num_gated_prompts") for row in rows))
    return Rows(summaries=summaries, best=best, ties=ties, gated=gated)


def named_seeds(seeds: Sequence[int]) -> str:
    """Seeds in words: ``seeds 0, 1``."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def questions_a_task(records: Sequence[Record]) -> str:
    """Number of questions of a task, or the range of it."""
    numbers = sorted({task.num for record in records for task in record.tasks.values()})
    return "–".join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1])))
