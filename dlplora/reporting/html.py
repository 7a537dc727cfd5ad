"""One self-contained page of results: filters, a sortable table, the figures, and every question with its answers and routing.

Nothing is fetched: style, script, numbers and pictures are in the file. Questions are packed per task (gzip) and unpacked by the browser
when they are viewed, so the page opens quickly however many there are.

Text from files (names, prompts, answers, figures) is data and never markup. It is stored as JSON without any ``<``, the script puts it into
text nodes, figures are images, and the Content-Security-Policy of the page allows its own scripts only, by their checksums.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from dlplora.reporting.columns import ACCURACY, COLUMNS, GATED, PREFILL, row_order, rows_of
from dlplora.reporting.comparison import MAIN_METRIC, Loader, task_means
from dlplora.reporting.drawing import close_figures
from dlplora.reporting.figures import figures
from dlplora.reporting.groups import Group
from dlplora.reporting.methods import OTHER, group_of, method_facts
from dlplora.reporting.reported import HEADING, NOTE, reported
from dlplora.reporting.samples import TaskOutcomes
from dlplora.reporting.schema import Record
from dlplora.reporting.sweeps import SweepFile
from dlplora.reporting.tables import README_SUITE, TIE, caption

MOST_PACKED = 1_700_000
"""Bytes of packed questions of one page; above this every task loses the second half of its questions."""
QUESTIONS = 100
HIDDEN_AT_FIRST = ("gen_bleu", "gen_rouge1", PREFILL)
"""Columns that the reader must choose to see."""
CAPTIONS = {
    "radar": "Every task, in percent right",
    "quality_against_latency": "Mean score against decoding time, and the Pareto front",
    "routing_confusion": "The expert with the largest weight under dlp, by task",
    "experts_kept": "Experts that answer a sentence",
    "quality_against_p": "Quality against the bound of the selection",
    "quality_against_router_errors": "Quality when the router errs",
    "weighting": "Ways to weight the kept experts",
    "quality_against_experts": "Quality against the number of experts",
    "tpot_experts": "Time per token against the number of experts",
    "tpot_batch": "Time per token against the batch size",
    "step": "Parts of a decoding step",
    "composite_n": "Several questions in one prompt",
}
Questions = Callable[[str, str], Sequence[Any]]
"""Suite and task -> the task's test items (``prompt``, ``answer``, ``choices``), or nothing if they cannot be made here."""


def page(
    groups: Sequence[Group],
    load: Loader,
    questions: Questions,
    sweeps: Mapping[str, Sequence[SweepFile]] | None = None,
    others: Mapping[str, str] | None = None,
) -> str:
    """The page as text.

    Args:
        groups: What is shown; those of the README's suite first.
        load: Outcomes of a record.
        questions: What was asked.
        sweeps: Sweep files by suite; they belong to its first group.
        others: File name without suffix -> SVG of figures that other commands drew, of latency for instance; they follow those of nano, or
            of the first group where nano is not shown.
    """
    groups = sorted(groups, key=lambda one: one.suite != README_SUITE)
    first = {one.suite: one for one in reversed(groups)}
    shown = [_group(one, load, (sweeps or {}).get(one.suite, ()) if first[one.suite] is one else ()) for one in groups]
    if shown:
        home = next((one for one in shown if one["suite"] == "nano"), shown[0])
        home["figures"] |= {caption_of(name): _trimmed(svg) for name, svg in (others or {}).items()}
    most = QUESTIONS
    packed = [_questions(one, load, questions, most) for one in groups]
    while most > 1 and sum(len(text) for part in packed for text in part.values()) > MOST_PACKED:
        most //= 2
        packed = [_questions(one, load, questions, most) for one in groups]
    data = {
        "columns": [
            {
                "key": one.key,
                "title": one.title,
                "scale": one.scale,
                "digits": one.digits,
                "better": bool(one.larger_is_better),
                "hidden": one.key in HIDDEN_AT_FIRST,
            }
            for one in COLUMNS
        ],
        "kinds": [[one.key, one.title] for one in (*method_facts().groups, OTHER)],
        "groups": [{**one, "questions": part} for one, part in zip(shown, packed, strict=True)],
        "reported": [[one.method, one.setting, one.metric, one.text, one.evidence, one.source, one.url] for one in reported()],
        "reportedTitle": HEADING,
        "reportedNote": NOTE.replace("*", ""),
    }
    return _filled(json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False))


def _filled(data: str) -> str:
    """The template with its parts. A ``<`` in the data is written as an escape, so that nothing there can end or open an element."""
    folder = resources.files("dlplora.reporting") / "page"
    names = {"CSS": "page.css", "JS": "page.js", "TABLE": "vendor/dataTables.min.js", "LICENCE": "vendor/dataTables.LICENSE.txt"}
    parts = {key: folder.joinpath(*name.split("/")).read_text("utf-8") for key, name in names.items()}
    scripts = " ".join(_checksum(parts[key]) for key in ("TABLE", "JS"))
    policy = f"default-src 'none'; script-src {scripts}; style-src {_checksum(parts['CSS'])}; img-src data:"
    policy += "; base-uri 'none'; form-action 'none'"
    parts |= {"DATA": data.replace("<", "\\u003c"), "POLICY": policy}
    template = (folder / "page.html").read_text("utf-8")
    return re.sub(r"/\*(CSS|JS|TABLE|LICENCE|DATA|POLICY)\*/", lambda match: parts[match[1]], template)


def _checksum(text: str) -> str:
    """Source expression of a Content-Security-Policy for an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def caption_of(name: str) -> str:
    """What is written under a figure that another command drew, from the name of its file: ``latency_nano_cpu_step``."""
    found = re.fullmatch(r"latency_(.+)_([a-z]+)_(tpot_experts|tpot_batch|step)", name)
    if found:
        return f"{CAPTIONS[found[3]]}: {found[1]}, {found[2]}"
    return CAPTIONS.get(name, name.replace("_", " "))


def _group(one: Group, load: Loader, sweeps: Sequence[SweepFile]) -> dict[str, Any]:
    records = one.records
    table, means = rows_of(records, one.scores, one.latency, one.trials), task_means(records)
    kinds = {record.method_name: group_of(record).key for record in records}
    rows = []
    for method, summary in table.summaries.items():
        cells: dict[str, list[Any]] = {}
        for key, (mean, error) in summary.items():
            if mean is None:
                continue
            best = table.best[key]
            mark = "best" if best is not None and math.isclose(mean, best) else TIE if method in table.ties.get(key, ()) else ""
            cells[key] = [mean, error, GATED if key == ACCURACY and method in table.gated else mark]
        rows.append({"method": method, "kind": kinds[method], "cells": cells, "tasks": means[method]})
    drawn = {CAPTIONS.get(key, key): _svg(figure) for key, figure in figures(records, load, sweeps, one.latency).items()}
    close_figures()
    return {
        "suite": one.suite,
        "protocol": one.setting,
        "backbone": one.backbone,
        "caption": caption(records, one.latency, one.scores).replace("`", ""),
        "tasks": list(records[0].suite_tasks),
        "rows": rows,
        "figures": drawn,
    }


def _svg(figure: Any) -> str:
    """A figure as the text of an SVG file."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return _trimmed(buffer.getvalue())


def _trimmed(text: str) -> str:
    """An SVG file without prologue and metadata; the page shows it as an image."""
    return re.sub(r"<metadata>.*?</metadata>", "", text[max(text.find("<svg"), 0) :], flags=re.DOTALL)


def _questions(one: Group, load: Loader, questions: Questions, most: int) -> dict[str, str]:
    """Task -> its questions with every method's answers (of the method's first seed), packed."""
    first: dict[str, Record] = {}
    for record in sorted(one.records, key=lambda row: (row_order(row), row.seed)):
        first.setdefault(record.method_name, record)
    known = {name: outcomes for name, record in first.items() if (outcomes := load(record)) is not None}
    kinds = {task: row.kind for record in first.values() for task, row in record.tasks.items()}
    found = {}
    for task in one.records[0].suite_tasks:
        runs = {name: outcomes[task] for name, outcomes in known.items() if task in outcomes and len(outcomes[task].questions)}
        if runs:
            seeds = {name: first[name].seed for name in runs}
            text = json.dumps(
                _packed(runs, seeds, questions(one.suite, task), kinds[task], most), ensure_ascii=False, separators=(",", ":")
            )
            found[task] = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    return found


def _packed(runs: Mapping[str, TaskOutcomes], seeds: Mapping[str, int], items: Sequence[Any], kind: str, most: int) -> dict[str, Any]:
    """One task: questions, and for each method its answers and routing, as indices into lists of distinct values.

    Returns:
        ``items`` ([prompt, options, answer], or null where the suite cannot be made), ``said`` and ``routes`` (what occurs), and
        ``methods``: [name, seed, per question [right, index into said, index into routes] or null].
    """
    said: dict[Any, int] = {}
    routes: dict[str | None, int] = {}
    traces: list[list[Any] | None] = []
    total = 1 + max(int(rows.questions[-1]) for rows in runs.values())
    num = min(most, total)
    methods = []
    for name, rows in runs.items():
        place = {int(question): row for row, question in enumerate(rows.questions)}
        cells: list[list[int] | None] = []
        for number in range(num):
            row = place.get(number)
            if row is None:
                cells.append(None)
                continue
            answer = rows.choice[row] if rows.choice[row] is not None else rows.answer[row]
            right = int(rows.metrics[MAIN_METRIC[kind]][row] > 0.5)
            text = rows.routing[row] or None
            if text not in routes:
                routes[text] = len(routes)
                traces.append(None if text is None else _strongest(rows.parsed_routing(text)))
            cells.append([right, said.setdefault(answer, len(said)), routes[text]])
        methods.append([name, seeds[name], cells])
    asked = [[item.prompt, list(item.choices) if item.choices else None, item.answer] for item in items[:num]]
    return {
        "total": total,
        "num": num,
        "items": asked + [None] * (num - len(asked)),
        "said": list(said),
        "routes": traces,
        "methods": methods,
    }


def _strongest(route: Sequence[tuple[int, dict[str, float]]], most: int = 5) -> list[Any]:
    """A trace with the strongest experts of each step: an average over all of them needs no list of all of them."""
    return [[at, dict(sorted(weights.items(), key=lambda pair: -abs(pair[1]))[:most]), len(weights)] for at, weights in route]
