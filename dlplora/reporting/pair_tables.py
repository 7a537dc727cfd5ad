"""Every method compared with one of them, as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from dlplora.reporting.columns import COLUMNS, named_seeds
from dlplora.reporting.comparison import (
    COMPARED,
    PRIMARY,
    REFERENCE_METHOD,
    Scores,
    Verdict,
    against,
    by_task,
    ranking,
    shared_seeds,
    task_wins,
)
from dlplora.reporting.groups import Group
from dlplora.reporting.markdown import code, table
from dlplora.reporting.methods import without_clones


def pair_table(scores: Scores, reference: str = REFERENCE_METHOD) -> str:
    """Differences with intervals, tasks won and lost, ranks; the methods are ordered by the primary metric. Empty without outcomes."""
    if reference not in scores.methods or len(scores.methods) < 2:
        return ""
    by_key = {key: against(scores, key, reference) for key in COMPARED}
    ranks, wins, shared = ranking(scores).ranks, task_wins(scores, reference), shared_seeds(scores, reference)
    shown = {column.key: column for column in COLUMNS if by_key.get(column.key)}
    header = [
        "method",
        *(f"Δ {column.title}" for column in shown.values()),
        "shared seeds",
        "tasks won–tied–lost",
        "of these significant",
        "mean rank",
    ]
    primary = by_key[PRIMARY]
    rows = []
    for name in sorted(scores.methods, key=lambda name: -primary[name].difference if name in primary else 0.0):
        verdicts = {key: by_key[key].get(name) for key in shown}
        cells = ["" if verdict is None else _difference(verdict, shown[key].scale) for key, verdict in verdicts.items()]
        if name in primary and primary[name].significant:
            cells[0] += " *"
        record = wins.get(name)
        cells.append(str(shared[name]) if name != reference else "")
        cells += ["", ""] if record is None else ["–".join(map(str, record[:3])), f"{record[3]}–{record[4]}"]
        rows.append([code(name), *cells, f"{ranks[name]:.1f}" if name in ranks else ""])
    return table(header, rows) + "\n\n" + _note(scores, reference)


def _note(scores: Scores, reference: str) -> str:
    """What the pair table shows, and the families of its corrections."""
    others, seeds = len(scores.methods) - 1, len(scores.seeds)
    source = "questions and the seeds that both methods have" if seeds > 1 else "questions"
    alone = " With one shared seed they say nothing about other trainings."
    parts = [
        f"Differences to `{reference}` in points, with 95 % intervals over {source}.{alone} * significant at 5 % after Holm's correction; "
        f"the family is the {others} other methods. Only the primary metric is tested. The other columns are descriptive; their intervals "
        "are not corrected.",
        "Tasks won and lost: mean over seeds of right answers; significant after Holm's correction, the family is the "
        f"{len(scores.kinds)} tasks of one method.",
    ]
    ranked = ranking(scores)
    clones = [name for name in scores.methods if name not in without_clones(scores.methods)]
    if ranked.critical is not None:
        text = (
            f"Mean rank over {len(scores.kinds)} tasks among {len(ranked.ranks)} methods, {named_seeds(ranked.seeds)}; ranks that differ "
            f"by less than {ranked.critical:.1f} cannot be told apart (Nemenyi, 5 %)"
        )
        parts.append(text + ("." if ranked.friedman is None else f"; Friedman p = {ranked.friedman:.1g}."))
        if clones:
            parts.append(
                f"Variants that hardly differ from another row, and defaults of tuned rows, are not ranked: {', '.join(map(code, clones))}."
            )
    return " ".join(parts)


def _difference(verdict: Verdict, scale: float) -> str:
    return f"{verdict.difference * scale:+z.1f} [{verdict.low * scale:+z.1f}, {verdict.high * scale:+z.1f}]"


def pairs_csv(groups: Sequence[Group], reference: str = REFERENCE_METHOD) -> str:
    """Every method against one of them on every task and metric, as CSV in the records' units."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["protocol", "backbone", "task", "metric", "method", "reference", "difference", "low", "high", "p", "p_holm"])
    for one in groups:
        for (task, metric), verdicts in by_task(one.scores, reference).items():
            for name, verdict in verdicts.items():
                numbers = (verdict.difference, verdict.low, verdict.high, verdict.p, verdict.p_holm)
                writer.writerow([one.setting, one.backbone, task, metric, name, reference, *(f"{number:.4g}" for number in numbers)])
    return buffer.getvalue()
