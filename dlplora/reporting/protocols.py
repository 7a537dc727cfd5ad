"""Two protocols side by side: how much of a number is due to the way it was measured.

Records of the released code's evaluation have their own folder (``results/released_code``), so no leaderboard reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dlplora.atomic import write_atomically
from dlplora.reporting.columns import REFERENCE_ROWS, by_method
from dlplora.reporting.groups import latest
from dlplora.reporting.markdown import code, table
from dlplora.reporting.schema import Record, TaskResult
from dlplora.reporting.store import RESULTS, is_publishable, load_all

ROOM = "released_code"
TITLE = "# The same models under two protocols"
EXPLANATION = """**Standard** is how this project measures: options of a multiple-choice question are scored by their log-likelihood,
other answers are generated greedily and compared as a whole (exact match; sacreBLEU over words; ROUGE).

**Released code** is how the public DLP-LoRA repository measures (MeCuping/DLP-LoRA@d68fd38): one pass over prompt *and right answer*.
At each answer position the most likely token is taken, given the right tokens before it, and the strings are compared with BLEU over
*characters*. Nothing is generated, and no option is chosen. The end token is among the compared ones. That repository has no function
for accuracy; "exact" here means that the decoded strings are equal. Its code also repeats the last prompt token, in training and in
evaluation. Adapters trained with the usual shift, as all are here, never predict that token, so the layout as written (last column) costs
them one token per answer.

**AC_F1** is one possible reading of the paper's "accuracy"; it is not confirmed. The repository contains compiled files of a deleted
plotting module that charts a value of this name: the harmonic mean of SelfBleu (share of predicted tokens that are in the answer, each
counted as often as it is there) and SelfRouge (share of predicted tokens that occur anywhere in the answer). It is computed here task by
task from the stored records. It does not need a single right answer: compare it with the column "MCQ exact" beside it.

Compare within a row: same weights, same routing, same questions. The columns of the released code are not leaderboard numbers and say
little about whether a model can answer: they stay high if all answers have the same form, and they reduce the differences between
methods."""


def record_path(record: Record, root: Path = RESULTS) -> Path:
    """``released_code/<suite>/``, or ``scratch/released_code/<suite>/`` for limited, failed and dirty runs."""
    room = Path(ROOM) if is_publishable(record) else Path("scratch") / ROOM
    return root / room / record.suite / f"{record.method_name}-{record.cell}-s{record.seed}.json"


AC_F1 = "ac_f1"
"""Harmonic mean of ``self_bleu`` and ``self_rouge`` of a task; computed here from the records."""


def _metric(task: TaskResult, metric: str) -> float | None:
    if metric != AC_F1:
        return task.metrics.get(metric)
    precision, overlap = task.metrics.get("self_bleu"), task.metrics.get("self_rouge")
    if precision is None or overlap is None:
        return None
    return 2 * precision * overlap / (precision + overlap) if precision + overlap else 0.0


def _mean(record: Record, kind: str, metric: str) -> float | None:
    """Mean over the suite's tasks of a kind; None unless every evaluated task of it has the metric."""
    values = [_metric(task, metric) for task in record.tasks.values() if task.kind == kind]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


COLUMNS = (
    ("standard: MCQ accuracy %", "standard", "mcq", "acc", 100.0),
    ("released: MCQ exact %", "released", "mcq", "exact", 100.0),
    ("released: MCQ char. BLEU", "released", "mcq", "char_bleu", 100.0),
    ("released: MCQ AC_F1 %", "released", "mcq", AC_F1, 100.0),
    ("standard: exact match %", "standard", "gen", "exact_match", 100.0),
    ("released: exact %", "released", "gen", "exact", 100.0),
    ("standard: BLEU", "standard", "gen", "bleu", 1.0),
    ("released: char. BLEU", "released", "gen", "char_bleu", 100.0),
    ("released: AC_F1 %", "released", "gen", AC_F1, 100.0),
    ("standard: ROUGE-L %", "standard", "gen", "rougeL", 100.0),
    ("released: ROUGE-L %", "released", "gen", "rougeL", 100.0),
    ("released, last token repeated: char. BLEU", "released", "gen", "repeated_char_bleu", 100.0),
)


def _seed_mean(records: Sequence[Record], kind: str, metric: str) -> float | None:
    values = [value for record in records if (value := _mean(record, kind, metric)) is not None]
    return sum(values) / len(values) if values and len(values) == len(records) else None


def suite_table(standard: Sequence[Record], released: Sequence[Record]) -> str:
    """One row per method that was measured both ways with the same seeds, pool and artifacts; empty if there is none."""
    ours, theirs = by_method(latest(standard)), by_method(latest(released))
    rows = []
    for name in sorted(theirs, key=lambda name: (REFERENCE_ROWS.index(name) if name in REFERENCE_ROWS else len(REFERENCE_ROWS), name)):
        pairs = _same_models(ours.get(name, []), theirs[name])
        if not pairs:
            continue
        sides: Mapping[str, list[Record]] = {"standard": [pair[0] for pair in pairs], "released": [pair[1] for pair in pairs]}
        values = [(_seed_mean(sides[side], kind, metric), scale) for _, side, kind, metric, scale in COLUMNS]
        rows.append([code(name), *("" if value is None else f"{scale * value:.1f}" for value, scale in values)])
    return table(["method", *(column[0] for column in COLUMNS)], rows) if rows else ""


def _same_models(standard: Sequence[Record], released: Sequence[Record]) -> list[tuple[Record, Record]]:
    def identity(record: Record) -> tuple[object, ...]:
        artifacts = tuple(sorted(record.artifact_hashes.items()))
        return record.seed, record.method_hash, record.pool_hash, artifacts, record.backbone.get("sha256"), frozenset(record.tasks)

    known = {identity(record): record for record in standard}
    return [(known[identity(record)], record) for record in released if identity(record) in known]


def page(root: Path = RESULTS) -> str:
    """The content of ``results/tables/protocols.md``."""
    parts = [TITLE, EXPLANATION]
    suites = sorted(path.name for path in (root / ROOM).glob("*") if path.is_dir())
    for suite in suites:
        released, _ = load_all(root, suite, ROOM)
        rows = suite_table(load_all(root, suite)[0], released)
        if not rows:
            continue
        counts = sorted({task.num for record in released for task in record.tasks.values()})
        num_tasks = max(len(record.tasks) for record in released)
        items = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        parts += [f"## {code(suite)}", rows, f"{num_tasks} tasks × {items} questions; unweighted means over tasks."]
    return "\n\n".join(parts) + "\n"


def build(root: Path = RESULTS, *, check: bool = False) -> list[Path]:
    """Write the table if there are records for it; returns the file if its content changed, or would change with ``check``."""
    target = root / "tables" / "protocols.md"
    if not (root / ROOM).is_dir():
        return []
    text = page(root)
    if target.is_file() and target.read_bytes() == text.encode():
        return []
    if not check:
        write_atomically(target, text)
    return [target]
