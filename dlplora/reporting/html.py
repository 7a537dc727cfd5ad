"""One self-contained page of results: filters, a sortable table, the figures, and single questions with their routing.

Nothing is fetched: style, script, numbers and pictures stand in the file.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from dlplora.reporting.comparison import MAIN_METRIC, Loader, collect, task_means
from dlplora.reporting.figures import figures
from dlplora.reporting.samples import TaskOutcomes
from dlplora.reporting.schema import Record
from dlplora.reporting.tables import COLUMNS, caption, latest, rows_of

QUESTIONS = 4
"""Questions a task that the page holds; all of them would make it large."""
CAPTIONS = {
    "radar": "Every task, in percent right",
    "quality_against_latency": "Quality against decoding time, and the Pareto front",
    "routing_confusion": "Which expert dlp trusts most, by task",
    "experts_kept": "Experts that answer a sentence",
}
Questions = Callable[[str, str], Sequence[Any]]
"""Suite and task -> the task's test items (``prompt``, ``answer``, ``choices``), or nothing if they cannot be made here."""


def page(records: Sequence[Record], load: Loader, questions: Questions) -> str:
    """The page as text.

    Args:
        records: Any; the newest of each method, protocol and seed are shown.
        load: Outcomes of a record.
        questions: What was asked.
    """
    chosen = latest(records)
    suites = sorted({record.suite for record in chosen})
    data = {
        "columns": [
            {"key": one.key, "title": one.title, "scale": one.scale, "digits": one.digits, "better": bool(one.larger_is_better)}
            for one in COLUMNS
        ],
        "backbones": sorted({str(record.backbone.get("name")) for record in chosen}),
        "suites": [_suite(name, [record for record in chosen if record.suite == name], load, questions) for name in suites],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    folder = resources.files("dlplora.reporting") / "page"
    parts = {"CSS": (folder / "page.css").read_text("utf-8"), "JS": (folder / "page.js").read_text("utf-8"), "DATA": text}
    template = (folder / "page.html").read_text("utf-8")
    return re.sub(r"/\*(CSS|JS|DATA)\*/", lambda match: parts[match[1]], template)


def _suite(name: str, records: Sequence[Record], load: Loader, questions: Questions) -> dict[str, Any]:
    cache: dict[int, Any] = {}

    def remembered(record: Record) -> Any:
        if id(record) not in cache:
            cache[id(record)] = load(record)
        return cache[id(record)]

    rows = []
    for backbone in sorted({str(record.backbone.get("name")) for record in records}):
        own = [record for record in records if str(record.backbone.get("name")) == backbone]
        table, means = rows_of(own, collect(own, remembered)), task_means(own)
        for method, summary in table.summaries.items():
            cells = {key: [mean, error, method in table.ties.get(key, ())] for key, (mean, error) in summary.items() if mean is not None}
            rows.append({"method": method, "backbone": backbone, "cells": cells, "tasks": means[method]})
    return {
        "name": name,
        "caption": caption(records).replace("`", ""),
        "tasks": list(records[0].suite_tasks),
        "rows": rows,
        "figures": {CAPTIONS.get(key, key): _svg(figure) for key, figure in figures(records, remembered).items()},
        "questions": _questions(name, records, remembered, questions),
    }


def _svg(figure: Any) -> str:
    """A figure as an inline SVG element; identifiers are made its own, since several stand in one document."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    mark = f"f{zlib.crc32(text.encode()):08x}-"
    return re.sub(r'(id="|url\(#|xlink:href="#)', lambda match: match[1] + mark, text)


def _questions(suite: str, records: Sequence[Record], load: Loader, questions: Questions) -> dict[str, list[dict[str, Any]]]:
    """Task -> the first questions with every method's answer, of each method's first seed."""
    first: dict[str, Record] = {}
    for record in sorted(records, key=lambda one: one.seed):
        first.setdefault(record.method_name, record)
    outcomes = {name: load(record) for name, record in first.items()}
    known = {name: found for name, found in outcomes.items() if found is not None}
    if not known:
        return {}
    kinds = {task: row.kind for record in first.values() for task, row in record.tasks.items()}
    found = {}
    for task in records[0].suite_tasks:
        items = questions(suite, task)
        found[task] = [_question(number, items, task, kinds[task], known) for number in range(QUESTIONS)]
    return {task: [one for one in rows if one["answers"]] for task, rows in found.items()}


def _question(number: int, items: Sequence[Any], task: str, kind: str, known: Mapping[str, Mapping[str, TaskOutcomes]]) -> dict[str, Any]:
    item = items[number] if number < len(items) else None
    answers = []
    for method, outcomes in known.items():
        rows = outcomes.get(task)
        if rows is None or number >= len(rows.questions) or rows.questions[number] != number:
            continue
        answer = rows.choice[number] if rows.choice[number] is not None else rows.answer[number]
        routing = json.loads(rows.routing[number] or "null")
        answers.append([method, bool(rows.metrics[MAIN_METRIC[kind]][number]), answer, routing and [_strongest(step) for step in routing]])
    return {
        "number": number,
        "prompt": None if item is None else item.prompt,
        "choices": None if item is None or item.choices is None else list(item.choices),
        "gold": None if item is None else item.answer,
        "answers": answers,
    }


def _strongest(step: Sequence[Any], most: int = 5) -> list[Any]:
    """One step of a trace with its strongest experts: an average over all of them needs no list of all of them."""
    at, weights = step
    return [at, dict(sorted(weights.items(), key=lambda pair: -abs(pair[1]))[:most])]
