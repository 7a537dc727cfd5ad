"""Markdown tables from records, and the generated block of the README. A missing number is an empty cell."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlplora.errors import RecordError
from dlplora.reporting.schema import Record
from dlplora.reporting.store import is_publishable, write_atomically

BEGIN, END = "<!-- dlplora:results:begin -->", "<!-- dlplora:results:end -->"


@dataclass(frozen=True)
class Column:
    """One column of the main table: where its value is, how it is printed, and whether larger is better (None: neither)."""

    title: str
    key: str
    percent: bool = True
    larger_is_better: bool | None = True
    digits: int = 1


COLUMNS = (
    Column("MCQ accuracy %", "mcq_acc"),
    Column("exact match %", "gen_exact_match"),
    Column("BLEU", "gen_bleu", percent=False),
    Column("ROUGE-1 %", "gen_rouge1"),
    Column("ROUGE-L %", "gen_rougeL"),
    Column("experts kept", "routing.mean_experts_kept", percent=False, larger_is_better=None, digits=2),
    Column("router accuracy %", "routing.router_accuracy", larger_is_better=None),
    Column("routing parameters", "trained_parameters", percent=False, larger_is_better=None, digits=0),
    Column("prefill ÷ one LoRA", "latency.ttft_ratio", percent=False, larger_is_better=None, digits=2),
    Column("decode ÷ one LoRA", "latency.tpot_ratio", percent=False, larger_is_better=None, digits=2),
)
REFERENCE_ROWS = ("base", "oracle", "multitask", "avg_delta", "dlp", "dlp_code")
"""First rows of every table, and the only ones in the README."""


def value_of(record: Record, key: str) -> float | None:
    """An aggregate, or ``routing.…`` / ``latency.…`` of a record."""
    room, _, name = key.partition(".")
    if room == "routing":
        value = record.routing.get(name)
    elif key == "trained_parameters":
        value = record.trained_parameters
    elif room == "latency":
        value = (record.latency or {}).get(name)
    else:
        value = record.aggregates.get(key)
    return None if value is None else float(value)


def latest(records: Iterable[Record]) -> list[Record]:
    """Publishable records, the newest for each protocol, method configuration and seed."""
    newest: dict[tuple[str, str, int], Record] = {}
    for record in sorted((record for record in records if is_publishable(record)), key=lambda record: record.created):
        newest[record.protocol_name, record.method_name, record.seed] = record
    return list(newest.values())


def _group(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.method_name, []).append(record)
    return groups


def _summary(rows: Sequence[Record], key: str) -> tuple[float | None, float | None]:
    """Mean over seeds and its standard error: over questions for one seed, and the larger of both spreads for several."""
    values = [value for value in (value_of(row, key) for row in rows) if value is not None]
    if len(values) != len(rows) or not values:
        return None, None
    errors = [row.aggregates.get(f"{key}_stderr") for row in rows]
    known = [error for error in errors if error is not None]
    within = math.sqrt(sum(error**2 for error in known) / len(known)) if known else None
    between = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    both = [error for error in (within, between) if error is not None]
    return sum(values) / len(values), max(both) if both else None


def _cell(column: Column, mean: float | None, error: float | None, best: float | None) -> str:
    if mean is None:
        return ""
    factor = 100.0 if column.percent else 1.0
    text = f"{mean * factor:.{column.digits}f}"
    if best is not None and math.isclose(mean, best):
        text = f"**{text}**"
    return text if error is None else f"{text} ± {error * factor:.{column.digits}f}"


def _order(record: Record) -> tuple[int, str]:
    known = REFERENCE_ROWS
    return (known.index(record.method_name) if record.method_name in known else len(known), record.method_name)


def main_table(records: Sequence[Record]) -> str:
    """One row a method, mean over seeds; the best of a column is bold."""
    rows = sorted(records, key=_order)
    groups = _group(rows)
    if not groups:
        return "*No results yet: run `make reproduce`.*"
    summaries = {name: {column.key: _summary(group, column.key) for column in COLUMNS} for name, group in groups.items()}
    lines = ["| method | " + " | ".join(column.title for column in COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name in groups:
        cells = []
        for column in COLUMNS:
            values = [summaries[other][column.key][0] for other in groups]
            present = [value for value in values if value is not None]
            best = max(present) if present and column.larger_is_better else None
            cells.append(_cell(column, *summaries[name][column.key], best))
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def caption(records: Sequence[Record]) -> str:
    """What the table was made from."""
    if not records:
        return ""
    seeds = sorted({record.seed for record in records})
    numbers = sorted({task.num for record in records for task in record.tasks.values()})
    commits = sorted({(record.provenance.get("git", {}).get("commit") or "unknown")[:7] for record in records})
    threads = sorted(
        {str(record.provenance.get("hardware", {}).get("gpu") or record.provenance.get("hardware", {}).get("cpu")) for record in records}
    )
    items = "–".join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1])))
    return (
        f"Suite `{records[0].suite}`, protocol `{records[0].protocol_name}`, {len(records[0].suite_tasks)} tasks × {items} questions, "
        f"seeds {', '.join(map(str, seeds))}, ± one standard error, code {', '.join(commits)}, {', '.join(threads)}. "
        "Prefill and decode: medians over interleaved runs in one process, against PEFT with one unmerged adapter. "
        "Generated from `results/runs` by `dlplora report build`."
    )


def readme_block(records: Sequence[Record]) -> str:
    """The text between the README's markers: the reference rows."""
    rows = [record for record in records if record.method_name in REFERENCE_ROWS]
    others = len({record.method_name for record in records} - set(REFERENCE_ROWS))
    more = f" {others} more methods: [results/tables](results/tables)." if others else ""
    return f"{BEGIN}\n{main_table(rows)}\n\n{caption(rows)}{more}\n{END}".replace("\n\n\n", "\n\n")


def task_table(records: Sequence[Record]) -> str:
    """One row a task, one column a method: accuracy for multiple choice, exact match for generation, in percent."""
    groups = _group(sorted(records, key=_order))
    if not groups:
        return ""
    first = next(iter(groups.values()))[0]
    lines = ["| task | kind | " + " | ".join(f"`{name}`" for name in groups) + " |", "|---|---|" + "---:|" * len(groups)]
    for task in first.suite_tasks:
        rows = {name: [record.tasks.get(task) for record in group] for name, group in groups.items()}
        kind = next((row.kind for group in rows.values() for row in group if row), "")
        metric = "acc" if kind == "mcq" else "exact_match"
        cells = []
        for group in rows.values():
            values = [row.metrics.get(metric) if row else None for row in group]
            known = [value for value in values if value is not None]
            cells.append(f"{100 * sum(known) / len(known):.1f}" if known and len(known) == len(values) else "")
        lines.append(f"| {task} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(records: Sequence[Record], suite: str) -> str:
    """The content of ``results/tables/<suite>.md``."""
    parts = [
        f"# Results on `{suite}`",
        main_table(records),
        caption(records),
        "## By task (accuracy or exact match, %)",
        task_table(records),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def with_block(text: str, block: str, where: str) -> str:
    """``text`` with its generated block replaced.

    Raises:
        RecordError: If the markers are missing.
    """
    start, stop = text.find(BEGIN), text.find(END)
    if start < 0 or stop < start:
        raise RecordError(f"{where}: markers {BEGIN} and {END} are missing; put them where the table belongs.")
    return text[:start] + block + text[stop + len(END) :]


def build(records: Sequence[Record], suite: str, root: Path, readme: Path | None, *, check: bool = False) -> list[Path]:
    """Write the tables of a suite and the README block; with ``check`` write nothing.

    Returns:
        The files whose content changed, or would change.
    """
    chosen = latest([record for record in records if record.suite == suite])
    wanted = {root / "tables" / f"{suite}.md": page(chosen, suite)}
    if readme is not None:
        wanted[readme] = with_block(readme.read_text(encoding="utf-8"), readme_block(chosen), str(readme))
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if not check:
        for path in stale:
            write_atomically(path, wanted[path])
    return stale
