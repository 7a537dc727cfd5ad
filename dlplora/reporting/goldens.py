"""Golden files: results of the guarded runs when they were last accepted, and the comparison of a new run with them. No deep-learning
package.

A golden file holds, for each guarded method: logits of a few prompts read in one batch, the experts kept for every question, and whether
every question was answered correctly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlplora.atomic import write_atomically
from dlplora.documents import read_json
from dlplora.errors import RecordError
from dlplora.reporting.statistics import ALPHA, exact_mcnemar
from dlplora.reporting.store import RESULTS

FORMAT = 1
LOGIT_TOLERANCE = 1e-3
"""Largest difference of a logit, absolute; float32 on another CPU differs by about 1e-5."""
WEIGHT_TOLERANCE = 1e-3
"""Largest difference of a routing weight."""
CHANGELOG_HEADING = "### Results"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One difference to the golden file."""

    method: str
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.method}: {self.what}: {self.text}"


def golden_path(name: str, root: Path = RESULTS) -> Path:
    """Where the golden file of a suite is, or that of the ``counters``."""
    return root / "golden" / f"{name}.json"


def read_accepted(path: Path, part: str, command: str) -> dict[str, Any]:
    """A golden file of this format, whole.

    Args:
        path: Where it is.
        part: The mapping that it must hold.
        command: What writes it, for the error.

    Raises:
        RecordError: If the file is missing, damaged or of another format.
    """
    if not path.is_file():
        raise RecordError(f"{path}: cannot be read: no such file. `{command}` writes it.")
    content = read_json(path, error=RecordError)
    if content.get("format") != FORMAT or not isinstance(content.get(part), dict):
        raise RecordError(f"{path}: not a golden file of format {FORMAT} with '{part}'. `{command}` writes it.")
    return content


def read_golden(path: Path) -> dict[str, Any]:
    """The accepted observations by method; raises what ``read_accepted`` raises."""
    return dict(read_accepted(path, "methods", "dlplora report accept --reason TEXT")["methods"])


def write_golden(path: Path, methods: Mapping[str, Any]) -> None:
    """Replace the golden file."""
    write_atomically(path, json.dumps({"format": FORMAT, "methods": dict(methods)}, indent=1, ensure_ascii=False) + "\n")


def compare(golden: Mapping[str, Any], now: Mapping[str, Any]) -> list[Finding]:
    """Differences of the observed methods to the accepted ones; empty if nothing moved."""
    findings: list[Finding] = []
    for name, seen in now.items():
        known = golden.get(name)
        if known is None:
            findings.append(Finding(method=name, what="golden file", text="this method is not in it"))
            continue
        for check in (_logits, _routing, _answers):
            findings += [Finding(method=name, what=what, text=text) for what, text in check(known, seen)]
    return findings


def _logits(known: Mapping[str, Any], seen: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    worst, where = 0.0, ""
    for prompt, wanted in known["logits"].items():
        got = seen["logits"].get(prompt)
        if got is None or len(got) != len(wanted):
            yield "logits", f"prompt '{prompt}' was not read"
            return
        for token, (a, b) in enumerate(zip(wanted, got, strict=True)):
            if abs(a - b) > worst:
                worst, where = abs(a - b), f"prompt '{prompt}', probe {token}: {a:.5f} became {b:.5f}"
    if worst > LOGIT_TOLERANCE:
        yield "logits", f"differ by up to {worst:.2g} (allowed {LOGIT_TOLERANCE:g}); {where}"


def _routing(known: Mapping[str, Any], seen: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    changed = []
    for question, wanted in known["routing"].items():
        got = seen["routing"].get(question)
        if not _same_route(wanted, got):
            changed.append(f"{question}: {_shown(wanted)} became {_shown(got)}")
    if changed:
        yield "routing", f"{len(changed)} of {len(known['routing'])} questions are routed differently; {changed[0]}"


def _same_route(wanted: Any, got: Any) -> bool:
    if wanted is None or got is None or len(wanted) != len(got):
        return wanted is None and got is None
    for (at, weights), (now_at, now) in zip(wanted, got, strict=True):
        if at != now_at or set(weights) != set(now) or any(abs(weights[name] - now[name]) > WEIGHT_TOLERANCE for name in weights):
            return False
    return True


def _shown(route: Any) -> str:
    if not route:
        return "nothing"
    return " → ".join("+".join(f"{name} {weight:.2f}" for name, weight in weights.items()) for _, weights in route)


def _answers(known: Mapping[str, Any], seen: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    before: list[float] = []
    after: list[float] = []
    for task, wanted in known["right"].items():
        got = seen["right"].get(task, "")
        if len(got) != len(wanted):
            yield "answers", f"task '{task}' has {len(got)} questions instead of {len(wanted)}"
            return
        before += map(float, wanted)
        after += map(float, got)
    p = exact_mcnemar(after, before)
    if p < ALPHA:
        yield "accuracy", f"{_percent(before)} became {_percent(after)} on the same {len(before)} questions (McNemar p = {p:.2g})"


def _percent(values: Sequence[float]) -> str:
    return f"{100 * sum(values) / len(values):.1f} %"


def note_in_changelog(text: str, reason: str, findings: Sequence[Finding]) -> str:
    """The changelog with one more entry under the first ``### Results``.

    Raises:
        RecordError: If the heading is missing.
    """
    start = text.find(CHANGELOG_HEADING)
    if start < 0:
        raise RecordError(f"CHANGELOG.md has no heading '{CHANGELOG_HEADING}'; add one below the newest version.")
    end = start + len(CHANGELOG_HEADING)
    moved = "; ".join(dict.fromkeys(f"{finding.method} ({finding.what})" for finding in findings)) or "no number"
    return f"{text[:end]}\n\n* {' '.join(reason.split())} Moved: {moved}.{text[end:]}"
