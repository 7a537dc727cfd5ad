"""Tables from records as Markdown, CSV and LaTeX, and the generated block of the README. A missing number is an empty cell."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlplora.atomic import write_atomically
from dlplora.errors import RecordError
from dlplora.reporting.comparison import Scores, Verdict, against, by_task, ranking, task_means, task_wins, ties_with_best
from dlplora.reporting.groups import Group, by_setting, group
from dlplora.reporting.latency.tables import latency_source, speed_page
from dlplora.reporting.notes import NOTES
from dlplora.reporting.reported import reported_page
from dlplora.reporting.schema import AGGREGATES, Record
from dlplora.reporting.store import OutcomeReader

BEGIN, END = "<!-- dlplora:results:begin -->", "<!-- dlplora:results:end -->"


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
    Column("MCQ accuracy %", "mcq_acc"),
    Column("exact match %", "gen_exact_match"),
    Column("BLEU", "gen_bleu", percent=False),
    Column("ROUGE-1 %", "gen_rouge1"),
    Column("ROUGE-L %", "gen_rougeL"),
    Column("experts kept", "routing.mean_experts_kept", percent=False, larger_is_better=None, digits=2),
    Column("router accuracy %", "routing.router_accuracy", larger_is_better=None),
    Column("routing parameters", "trained_parameters", percent=False, larger_is_better=None, digits=0),
    Column("training tokens (M)", "training_tokens", percent=False, larger_is_better=None, digits=2, factor=1e-6),
    Column("prefill ÷ one LoRA", "latency.ttft_ratio", percent=False, larger_is_better=None, digits=2),
    Column("decode ÷ one LoRA", "latency.tpot_ratio", percent=False, larger_is_better=None, digits=2),
)
REFERENCE_ROWS = ("base", "oracle", "multitask", "avg_delta", "dlp", "dlp_code")
"""First rows of every table, and the only ones in the README."""
REFERENCE_METHOD = "dlp"
"""What the others are compared with in pairs."""
TIE = "°"
"""Mark of an entry that is not significantly worse than the best of its column."""


def value_of(record: Record, key: str) -> float | None:
    """An aggregate, or ``routing.…`` / ``latency.…`` of a record."""
    room, _, name = key.partition(".")
    if room == "routing":
        value = record.routing.get(name)
    elif key in {"trained_parameters", "training_tokens"}:
        value = getattr(record, key)
    elif room == "latency":
        value = (record.latency or {}).get(name)
    else:
        value = record.aggregates.get(key)
    return None if value is None else float(value)


def _group(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.method_name, []).append(record)
    return groups


def _summary(rows: Sequence[Record], key: str) -> tuple[float | None, float | None]:
    """Mean over seeds and its standard error: over questions for one seed, and the larger of both spreads for several.

    Latency ratios are medians over seeds without an error: each is a median of interleaved runs, and a busy machine spoils some.
    """
    values = [value for value in (value_of(row, key) for row in rows) if value is not None]
    if len(values) != len(rows) or not values:
        return None, None
    if key.startswith("latency."):
        return statistics.median(values), None
    mean = sum(values) / len(values)
    if key not in AGGREGATES:
        return mean, None
    errors = [row.aggregates.get(f"{key}_stderr") for row in rows]
    known = [error for error in errors if error is not None]
    within = math.sqrt(sum(error**2 for error in known) / len(known)) if known else None
    between = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    both = [error for error in (within, between) if error is not None]
    return mean, max(both) if both else None


def _cell(column: Column, mean: float | None, error: float | None, best: float | None, ties: bool) -> str:
    if mean is None:
        return ""
    text = f"{mean * column.scale:.{column.digits}f}"
    if best is not None and math.isclose(mean, best):
        text, ties = f"**{text}**", False
    text = text if error is None else f"{text} ± {error * column.scale:.{column.digits}f}"
    return f"{text} {TIE}" if ties else text


def row_order(record: Record) -> tuple[int, str]:
    """Sort key of a table's rows: the reference rows first, then by name."""
    known = REFERENCE_ROWS
    return (known.index(record.method_name) if record.method_name in known else len(known), record.method_name)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The main table before it is printed."""

    summaries: Mapping[str, Mapping[str, tuple[float | None, float | None]]]
    """Method -> column key -> mean over seeds and standard error."""
    best: Mapping[str, float | None]
    """Column key -> best mean; None where larger is not better."""
    ties: Mapping[str, set[str]]
    """Column key -> methods not significantly worse than the best."""


def rows_of(records: Sequence[Record], scores: Scores | None = None) -> Rows:
    """Means, errors, and what is best, for the methods of some records.

    Args:
        records: Newest of each method and seed.
        scores: Outcomes of single questions; without them nothing is said about significance.
    """
    groups = _group(sorted(records, key=row_order))
    summaries = {name: {column.key: _summary(group, column.key) for column in COLUMNS} for name, group in groups.items()}
    best: dict[str, float | None] = {}
    for column in COLUMNS:
        present = [mean for mean in (summary[column.key][0] for summary in summaries.values()) if mean is not None]
        best[column.key] = max(present) if present and column.larger_is_better else None
    chosen = scores.of(list(groups)) if scores is not None else None
    ties = {key: ties_with_best(chosen, key) for key in AGGREGATES} if chosen is not None and len(chosen.methods) == len(groups) else {}
    return Rows(summaries=summaries, best=best, ties=ties)


def main_table(records: Sequence[Record], scores: Scores | None = None) -> str:
    """One row a method, mean over seeds; the best of a column is bold, what is not significantly worse is marked."""
    rows = rows_of(records, scores)
    if not rows.summaries:
        return "*No results yet: run `make reproduce`.*"
    lines = ["| method | " + " | ".join(column.title for column in COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name, summary in rows.summaries.items():
        cells = [_cell(column, *summary[column.key], rows.best[column.key], name in rows.ties.get(column.key, ())) for column in COLUMNS]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def csv_table(records: Sequence[Record]) -> str:
    """The main tables as CSV, unrounded, in the records' units, with a column for every standard error; one row a method and setting."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["protocol", "backbone", "method", *(name for column in COLUMNS for name in (column.key, f"{column.key}_stderr"))])
    for (_, protocol, backbone), rows in by_setting(records).items():
        for name, summary in rows_of(rows).summaries.items():
            values = [value for column in COLUMNS for value in summary[column.key]]
            writer.writerow([protocol, backbone, name, *("" if value is None else repr(value) for value in values)])
    return buffer.getvalue()


def latex_table(records: Sequence[Record], scores: Scores | None = None) -> str:
    """The main table for a LaTeX document with booktabs."""
    rows = rows_of(records, scores)
    escaped = {column.title: column.title.replace("%", r"\%").replace("÷", r"$\div$") for column in COLUMNS}
    lines = [r"% needs \usepackage{booktabs}", r"\begin{tabular}{l" + "r" * len(COLUMNS) + "}", r"\toprule"]
    lines += ["method & " + " & ".join(escaped[column.title] for column in COLUMNS) + r" \\", r"\midrule"]
    for name, summary in rows.summaries.items():
        cells = []
        for column in COLUMNS:
            text = _cell(column, *summary[column.key], rows.best[column.key], name in rows.ties.get(column.key, ()))
            text = text.replace(" ± ", r" $\pm$ ").replace(f" {TIE}", r"$^{\circ}$")
            cells.append(re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text))
        lines.append(r"\texttt{" + name.replace("_", r"\_") + "} & " + " & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


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
    short = sorted({name for name, group in _group(records).items() if {record.seed for record in group} != set(seeds)})
    fewer = f" (not every seed: {', '.join(short)})" if short else ""
    items = "–".join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1])))
    return (
        f"Suite `{records[0].suite}`, protocol `{records[0].protocol_name}`, {len(records[0].suite_tasks)} tasks × {items} questions, "
        f"seeds {', '.join(map(str, seeds))}{fewer}, ± one standard error, code {', '.join(commits)}, {', '.join(threads)}. "
        f"Bold: best of the column; {TIE}: not significantly worse (paired bootstrap over questions, Holm over the methods, 5 %). "
        f"{latency_source(records)} Generated from `results/runs` by `dlplora report build`."
    )


def readme_block(records: Sequence[Record], scores: Scores | None = None) -> str:
    """The text between the README's markers: the reference rows."""
    rows = [record for record in records if record.method_name in REFERENCE_ROWS]
    others = len({record.method_name for record in records} - set(REFERENCE_ROWS))
    more = f" {others} more methods: [results/tables](results/tables)." if others else ""
    return f"{BEGIN}\n{main_table(rows, scores)}\n\n{caption(rows)}{more}\n{END}".replace("\n\n\n", "\n\n")


def task_table(records: Sequence[Record]) -> str:
    """One row a task, one column a method: accuracy for multiple choice, exact match for generation, in percent."""
    groups = _group(sorted(records, key=row_order))
    if not groups:
        return ""
    first = next(iter(groups.values()))[0]
    lines = ["| task | kind | " + " | ".join(f"`{name}`" for name in groups) + " |", "|---|---|" + "---:|" * len(groups)]
    means = task_means(records)
    kinds = {task: row.kind for record in records for task, row in record.tasks.items()}
    for task in first.suite_tasks:
        cells = [f"{100 * means[name][task]:.1f}" if task in means[name] else "" for name in groups]
        lines.append(f"| {task} | {kinds.get(task, '')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pair_table(scores: Scores, reference: str = REFERENCE_METHOD) -> str:
    """Every method against one of them: differences with intervals, tasks won and lost, ranks; empty without outcomes."""
    if reference not in scores.methods or len(scores.methods) < 2:
        return ""
    by_key = {key: against(scores, key, reference) for key in AGGREGATES}
    ranks, critical, friedman = ranking(scores)
    wins = task_wins(scores, reference)
    shown = {column.key: column for column in COLUMNS if by_key.get(column.key)}
    titles = ["method", *(f"Δ {column.title}" for column in shown.values()), "tasks won–tied–lost", "of these significant", "mean rank"]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for name in ranks:
        cells = []
        for key, column in shown.items():
            verdict = by_key[key].get(name)
            cells.append("" if verdict is None else _difference(verdict, column.scale))
        record = wins.get(name)
        cells += ["", ""] if record is None else ["–".join(map(str, record[:3])), f"{record[3]}–{record[4]}"]
        lines.append(f"| `{name}` | " + " | ".join([*cells, f"{ranks[name]:.1f}"]) + " |")
    note = (
        f"Differences to `{reference}` with 95 % intervals (bootstrap over questions within their tasks); * significant at 5 % "
        f"after Holm's correction over {len(scores.methods) - 1} methods. Tasks: right answers, McNemar's exact test, Holm over tasks. "
    )
    if critical is not None:
        note += (
            f"Mean ranks over {len(scores.kinds)} tasks; ranks that differ by less than {critical:.1f} tell nothing apart (Nemenyi, 5 %)"
        )
        note += "." if friedman is None else f"; Friedman p = {friedman:.1g}."
    return "\n".join(lines) + "\n\n" + note


def pairs_csv(groups: Sequence[Group], reference: str = REFERENCE_METHOD) -> str:
    """Every method against one of them on every task and metric, as CSV in the records' units."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["protocol", "backbone", "task", "metric", "method", "reference", "difference", "low", "high", "p", "p_holm"])
    for one in groups:
        for (task, metric), verdicts in by_task(one.scores, reference).items():
            for name, verdict in verdicts.items():
                numbers = (verdict.difference, verdict.low, verdict.high, verdict.p, verdict.p_holm)
                writer.writerow([one.protocol, one.backbone, task, metric, name, reference, *(f"{number:.4g}" for number in numbers)])
    return buffer.getvalue()


def _difference(verdict: Verdict, scale: float) -> str:
    mark = " *" if verdict.significant else ""
    return f"{verdict.difference * scale:+.1f} [{verdict.low * scale:+.1f}, {verdict.high * scale:+.1f}]{mark}"


def page(records: Sequence[Record], suite: str, scores: Scores | None = None) -> str:
    """The content of ``results/tables/<suite>.md`` for one protocol and backbone."""
    return "\n\n".join(part for part in (f"# Results on `{suite}`", NOTES.get(suite, ""), *_sections(records, scores)) if part) + "\n"


def _sections(records: Sequence[Record], scores: Scores | None, depth: str = "##") -> list[str]:
    pairs = "" if scores is None else pair_table(scores)
    return [
        main_table(records, scores),
        caption(records),
        f"{depth} In pairs with `{REFERENCE_METHOD}`" if pairs else "",
        pairs,
        f"{depth} By task (accuracy or exact match, %)",
        task_table(records),
    ]


def _suite_page(groups: Sequence[Group], suite: str) -> str:
    if len(groups) < 2:
        return page(groups[0].records if groups else (), suite, groups[0].scores if groups else None)
    parts = [f"# Results on `{suite}`", NOTES.get(suite, "")]
    for one in groups:
        parts += [f"## {one.title[0].upper()}{one.title[1:]}", *_sections(one.records, one.scores, "###")]
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


def build(
    records: Sequence[Record],
    suite: str,
    root: Path,
    readme: Path | None,
    *,
    check: bool = False,
    groups: Sequence[Group] | None = None,
) -> list[Path]:
    """Write the tables of a suite, with nano's those of speed records, and the README block; with ``check`` write nothing.

    Args:
        records: Of any suite.
        suite: The one to write.
        root: Results folder.
        readme: File whose block holds the suite's first group, or None.
        check: Only say what is stale.
        groups: The suite's records with their outcomes, if they were read already.

    Returns:
        The files whose content changed, or would change.

    Raises:
        RecordError: If a record's outcomes are damaged, or the README has no markers.
    """
    if groups is None:
        groups = group([record for record in records if record.suite == suite], OutcomeReader(root))
    tables = root / "tables"
    wanted = {tables / f"{suite}.md": _suite_page(groups, suite), tables / "reported.md": reported_page()}
    speed = speed_page(root / "bench") if suite == "nano" else None
    if speed is not None:
        wanted[tables / "speed.md"] = speed
    if groups:
        chosen = [record for one in groups for record in one.records]
        latex = "\n".join((f"% {one.title}\n" if len(groups) > 1 else "") + latex_table(one.records, one.scores) for one in groups)
        wanted[tables / f"{suite}.csv"] = csv_table(chosen)
        wanted[tables / f"{suite}.tex"] = latex
        wanted[tables / f"{suite}_pairs.csv"] = pairs_csv(groups)
    if readme is not None:
        block = readme_block(groups[0].records, groups[0].scores) if groups else readme_block([])
        wanted[readme] = with_block(readme.read_text(encoding="utf-8"), block, str(readme))
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if not check:
        for path in stale:
            write_atomically(path, wanted[path])
    return stale
