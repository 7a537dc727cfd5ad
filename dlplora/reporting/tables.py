"""Tables from records as Markdown, CSV and LaTeX, and the generated block of the README. A missing number is an empty cell."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

from dlplora.atomic import write_atomically
from dlplora.documents import read_text
from dlplora.errors import RecordError
from dlplora.reporting.columns import (
    ACCURACY,
    COLUMNS,
    DECODE,
    GATED,
    README_COLUMNS,
    README_ROWS,
    Column,
    Rows,
    Trials,
    by_method,
    by_seeds,
    named_seeds,
    questions_a_task,
    row_order,
    rows_of,
)
from dlplora.reporting.comparison import REFERENCE_METHOD, Scores, task_means
from dlplora.reporting.doubt import doubt_table
from dlplora.reporting.groups import Group, group, mixed_in
from dlplora.reporting.latency.join import LatencyColumns
from dlplora.reporting.latency.tables import speed_page
from dlplora.reporting.markdown import code, plain, table
from dlplora.reporting.methods import data_seen
from dlplora.reporting.notes import NOTES
from dlplora.reporting.pair_tables import pair_table, pairs_csv
from dlplora.reporting.reported import reported_page
from dlplora.reporting.schema import Record
from dlplora.reporting.store import OutcomeReader
from dlplora.reporting.tuning import chosen_table, preset_of, questions_note

BEGIN, END = "<!-- dlplora:results:begin -->", "<!-- dlplora:results:end -->"
README_SUITE = "real26"
"""The suite with a table in the README of the working directory."""
TIE = "°"
"""Mark of a primary score that is not significantly below the best."""
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "_&%$#{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)
"""What makes text of a name text in LaTeX."""


def _cell(column: Column, rows: Rows, method: str) -> str:
    mean, error = rows.summaries[method][column.key]
    if mean is None:
        return ""
    text, best = f"{mean * column.scale:.{column.digits}f}", rows.best[column.key]
    is_best = best is not None and math.isclose(mean, best)
    text = f"**{text}**" if is_best else text
    text = text if error is None else f"{text} ± {error * column.scale:.{column.digits}f}"
    if column.key == ACCURACY and method in rows.gated:
        text = f"{text} {GATED}"
    return f"{text} {TIE}" if not is_best and method in rows.ties.get(column.key, ()) else text


def main_table(
    records: Sequence[Record],
    scores: Scores | None = None,
    latency: LatencyColumns | None = None,
    columns: Sequence[Column] = COLUMNS,
    trials: Trials | None = None,
) -> str:
    """One row per method, mean over seeds; the best of a column is bold, what is not significantly worse is marked.

    Args:
        records: Newest of each method and seed.
        scores: Outcomes of the whole table, also where only some of its rows are shown.
        latency: Ratios for the latency columns; None leaves them empty.
        columns: What is shown; all of them bring the data that a method saw.
        trials: For the column of that name.
    """
    rows = rows_of(records, scores, latency, trials)
    if not rows.summaries:
        return "*No results yet: run `make reproduce`.*"
    data = {record.method_name: data_seen(record) for record in records} if columns is COLUMNS else {}
    cells = [
        [code(name), *([plain(data[name])] if data else []), *(_cell(column, rows, name) for column in columns)] for name in rows.summaries
    ]
    head = ["method", *(["data it saw"] if data else []), *(column.title for column in columns)]
    return table(head, cells, left=2 if data else 1)


def csv_table(groups: Sequence[Group]) -> str:
    """The main tables as CSV, unrounded, in the records' units, with a column for every standard error; one row per method and setting."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["protocol", "backbone", "method", "data_seen", *(name for column in COLUMNS for name in (column.key, f"{column.key}_stderr"))]
    )
    for one in groups:
        data = {record.method_name: data_seen(record) for record in one.records}
        for name, summary in rows_of(one.records, None, one.latency, one.trials).summaries.items():
            values = [value for column in COLUMNS for value in summary[column.key]]
            writer.writerow([one.setting, one.backbone, name, data[name], *("" if value is None else repr(value) for value in values)])
    return buffer.getvalue()


def latex_table(
    records: Sequence[Record], scores: Scores | None = None, latency: LatencyColumns | None = None, trials: Trials | None = None
) -> str:
    """The main table for a LaTeX document with booktabs."""
    rows = rows_of(records, scores, latency, trials)
    escaped = {column.title: column.title.replace("%", r"\%").replace("÷", r"$\div$") for column in COLUMNS}
    lines = [r"% needs \usepackage{booktabs}", r"\begin{tabular}{l" + "r" * len(COLUMNS) + "}", r"\toprule"]
    lines += ["method & " + " & ".join(escaped[column.title] for column in COLUMNS) + r" \\", r"\midrule"]
    for name in rows.summaries:
        cells = []
        for column in COLUMNS:
            text = _cell(column, rows, name).replace(" ± ", r" $\pm$ ")
            text = text.replace(f" {TIE}", r"$^{\circ}$").replace(f" {GATED}", r"$^{\dagger}$")
            cells.append(re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text))
        lines.append(r"\texttt{" + name.translate(LATEX) + "} & " + " & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _seeds(records: Sequence[Record]) -> str:
    """The seeds of some records, and which methods lack some of them."""
    groups = {name: tuple(sorted({row.seed for row in rows})) for name, rows in by_method(records).items()}
    every = tuple(sorted({record.seed for record in records}))
    fewer = [
        f"{named_seeds(seeds)} only: {', '.join(sorted(name for name, own in groups.items() if own == seeds))}"
        for seeds in sorted({*groups.values()} - {every})
    ]
    return named_seeds(every) + (f" ({'; '.join(fewer)})" if fewer else "")


def _searches(records: Sequence[Record]) -> list[str]:
    """Sentences about the cost of weights that are searched or read off further passes, which no column shows; none if there is none."""
    methods: dict[tuple[int, int], set[str]] = {}
    for record in records:
        budget, examples = (record.routing.get(key) for key in ("search_budget", "search_examples"))
        if budget and examples:
            methods.setdefault((int(budget), int(examples)), set()).add(record.method_name)
    costs = [
        f"{', '.join(map(code, sorted(names)))}: {budget} evaluations of {examples} examples"
        for (budget, examples), names in methods.items()
    ]
    found = [f"Weights searched for every task, without training tokens; {'; '.join(sorted(costs))}."] if costs else []
    return found + _choosing(records)


def _choosing(records: Sequence[Record]) -> list[str]:
    """What some methods compute for a prompt before its answer, which no column shows either."""
    found: dict[str, list[str]] = {}
    for name, rows in sorted(by_method(records).items()):
        for key, unit in (("routing_tokens_per_prompt", "token"), ("routing_rows_per_prompt", "row")):
            values = [value for row in rows if (value := row.routing.get(key)) is not None]
            if values:
                mean = sum(values) / len(values)
                found.setdefault(f"{mean:.0f} {unit}{'' if mean == 1 else 's'}", []).append(code(name))
    costs = "; ".join(f"{', '.join(names)} {cost}" for cost, names in found.items())
    return [f"Computed for every prompt to choose its adapters: {costs}."] if costs else []


def _made(records: Sequence[Record]) -> list[str]:
    """What some records were made from, and what their errors are over."""
    over = " and seeds" if len({record.seed for record in records}) > 1 else ""
    commits = sorted({(record.provenance.get("git", {}).get("commit") or "unknown")[:7] for record in records})
    hardware = [record.provenance.get("hardware", {}) for record in records]
    machines = sorted({str(one.get("gpu") or one.get("cpu")) for one in hardware})
    mixed = mixed_in(records)
    return [
        *([f"**{mixed}**"] if mixed else []),
        f"Suite `{records[0].suite}`, protocol `{records[0].protocol_name}`: {len(records[0].suite_tasks)} tasks × "
        f"{questions_a_task(records)} questions, {_seeds(records)}; code {', '.join(commits)}; {', '.join(machines)}.",
        f"Values are means over tasks{over} ± one standard error over questions{over}.",
    ]


def caption(records: Sequence[Record], latency: LatencyColumns | None = None, scores: Scores | None = None) -> str:
    """What the table was made from and how it is read.

    Args:
        records: Those of the table.
        latency: Source of the latency columns.
        scores: Outcomes; with them the caption names the test of the marks.
    """
    if not records:
        return ""
    parts = [
        *_made(records),
        "The primary metric is the mean score: accuracy or exact match, mean over all tasks. The other columns are not tested.",
        "Bold: best of the column.",
    ]
    if scores is not None and len(scores.methods) > 1:
        parts.append(
            f"{TIE}: mean score not significantly below the best (5 %, after Holm's correction; the family is the "
            f"{len(scores.methods) - 1} other methods)."
        )
    parts += [
        "Experts kept: mean over prompts; for static merges, the number of experts merged.",
        "Router accuracy: share of prompts whose largest routing weight belongs to the expert of the prompt's task; "
        f"{GATED} weights of gates, averaged over tokens and layers.",
        "Trained parameters and training tokens: what a method trains by gradient beyond the experts; classifiers and prototypes that are "
        "fitted to training prompts while they load count as none.",
        "Data it saw: of the tasks, beyond the experts; inputs are training prompts, each with its task, labels their answers as well. "
        "Trials: settings tried on the validation split; empty: none.",
        *_searches(records),
        "Prefill and decode: not measured." if latency is None else latency.source,
        "Generated from `results/runs` by `dlplora report build`.",
    ]
    return " ".join(parts)


def readme_block(one: Group | None) -> str:
    """The text between the README's markers: the reference rows of a group in a few columns, and where the rest is."""
    if one is None:
        return f"{BEGIN}\n{main_table(())}\n{END}"
    present = {record.method_name for record in one.records}
    names = {name if name in present else preset_of(name) for name in README_ROWS}
    shown = [record for record in one.records if record.method_name in names]
    if not shown:
        return f"{BEGIN}\n{main_table(())}\n{END}"
    timed = one.latency is not None
    columns = [column for column in README_COLUMNS if timed or column.key != DECODE]
    text = (
        f"{len(shown[0].suite_tasks)} tasks × {questions_a_task(shown)} questions, {_seeds(shown)}; ± one standard "
        f"error over questions{' and seeds' if len({record.seed for record in shown}) > 1 else ''}. Bold: best of these rows. "
    )
    if timed:
        text += "Decode: time per token divided by that of PEFT with one LoRA, methods interleaved in one process. "
    mixed = mixed_in(shown)
    text = f"**{mixed}** {text}" if mixed else text
    others = len(present - names)
    rest = f"Tests, all columns{f' and {others} more methods' if others else ''}"
    text += f"{rest}: [results/tables/{one.suite}.md](results/tables/{one.suite}.md)."
    return f"{BEGIN}\n{main_table(shown, None, one.latency, columns)}\n\n{text}\n{END}"


def task_table(records: Sequence[Record]) -> str:
    """One row per task, one column per method: accuracy for multiple choice, exact match for generation, in percent."""
    groups = by_method(sorted(records, key=row_order))
    if not groups:
        return ""
    means = task_means(records)
    kinds = {task: row.kind for record in records for task, row in record.tasks.items()}
    rows = [
        [plain(task), kinds.get(task, ""), *(f"{100 * means[name][task]:.1f}" if task in means[name] else "" for name in groups)]
        for task in next(iter(groups.values()))[0].suite_tasks
    ]
    return table(["task", "kind", *map(code, groups)], rows, left=2)


def page(groups: Sequence[Group], suite: str) -> str:
    """The content of ``results/tables/<suite>.md``; each protocol and base model has a section where there are several."""
    parts = [f"# Results on {code(suite)}", NOTES.get(suite, "")]
    if not groups:
        parts.append(main_table(()))
    for one in groups:
        several = len(groups) > 1
        parts += [f"## {one.title[0].upper()}{one.title[1:]}" if several else "", *_sections(one, "###" if several else "##")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sections(one: Group, depth: str) -> list[str]:
    pairs = pair_table(one.scores)
    first, *others = by_seeds(one.records)
    return [
        main_table(first, one.scores, one.latency, trials=one.trials),
        caption(first, one.latency, one.scores),
        *(part for rows in others for part in _fewer_seeds(one, rows, depth)),
        f"{depth} Settings chosen on the validation split" if one.trials else "",
        f"{chosen_table(one.trials)}\n\n{questions_note(one.trials)}" if one.trials else "",
        f"{depth} In pairs with `{REFERENCE_METHOD}`" if pairs else "",
        pairs,
        *((f"{depth} Where {code(one.doubt.method)} keeps several adapters", doubt_table(one.doubt)) if one.doubt else ()),
        f"{depth} By task (accuracy or exact match, %, mean over a method's seeds)",
        task_table(one.records),
    ]


def _fewer_seeds(one: Group, records: Sequence[Record], depth: str) -> list[str]:
    """The table of methods that lack some seeds, with the reference rows on the same seeds."""
    seeds = named_seeds(sorted({record.seed for record in records}))
    text = " ".join(
        [
            "Methods that were not run with the other seeds, and the reference rows on the same experts; columns as above.",
            *_made(records),
            *_searches(records),
        ]
    )
    return [f"{depth} {seeds.capitalize()} only", main_table(records, one.scores, one.latency, trials=one.trials), text]


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
        readme: File with a block for the suite's first group, or None.
        check: Only say what is stale.
        groups: The suite's records with their outcomes, if they were read already.

    Returns:
        The files that changed, or would change.

    Raises:
        RecordError: If a record's outcomes are damaged, or the README has no markers.
    """
    if groups is None:
        groups = group([record for record in records if record.suite == suite], OutcomeReader(root))
    tables = root / "tables"
    wanted = {tables / f"{suite}.md": page(groups, suite), tables / "reported.md": reported_page()}
    speed = speed_page(root / "bench") if suite == "nano" else None
    if speed is not None:
        wanted[tables / "speed.md"] = speed
    if groups:
        latex = [
            f"% {one.title}, {_seeds(rows)}\n" + latex_table(rows, one.scores, one.latency, one.trials)
            for one in groups
            for rows in by_seeds(one.records)
        ]
        wanted[tables / f"{suite}.csv"] = csv_table(groups)
        wanted[tables / f"{suite}.tex"] = "\n".join(latex)
        wanted[tables / f"{suite}_pairs.csv"] = pairs_csv(groups)
    if readme is not None:
        wanted[readme] = with_block(read_text(readme, error=RecordError), readme_block(groups[0] if groups else None), str(readme))
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_bytes() != text.encode()]
    if not check:
        for path in stale:
            write_atomically(path, wanted[path])
    return stale
