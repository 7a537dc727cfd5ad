"""Trials of ``dlplora tune`` on the validation split, one JSON record each, and the choice among them.

``results/tuning/<protocol>/<method>/<cell>-s<seed>.json``. Trials never appear in a results table. Reading one needs no deep-learning
package.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dlplora.atomic import write_atomically
from dlplora.config import build
from dlplora.documents import read_json
from dlplora.errors import RecordError
from dlplora.reporting.markdown import code, plain, table
from dlplora.reporting.schema import Record
from dlplora.reporting.store import RESULTS

FORMAT = 1
ROOM = "tuning"
TUNED = "_tuned"
"""Ending of the name of a row with tuned settings."""
MAX_TRIALS = 8
"""Number of settings that a method may try; the same for every method, so that none is tuned more than another."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One choice of settings, scored on the validation split."""

    method: str
    """Preset."""
    settings: dict[str, Any]
    """Every setting of the grid with its value in this trial."""
    default: bool
    """Whether they are the preset's own."""
    seed: int
    suite: str
    protocol: str
    """Name of the protocol."""
    backbone: str
    """Name of the base model."""
    pool_hash: str
    """Checksum of the pool, empty without one."""
    limit: int | None
    """Questions per task; null is all of the split."""
    status: Literal["ok", "diverged", "failed"]
    reason: str | None = None
    """Why a trial has no score."""
    score: float | None = None
    """Mean over tasks of accuracy or exact match, 0 to 1."""
    scores: dict[str, float] = field(default_factory=dict)
    """Task -> accuracy or exact match."""
    tokens_seen: int | None = None
    """Tokens that training of the method saw in this trial or, where the trial trains nothing, before it; null if unknown."""
    trained_here: bool = False
    """Whether the trial trained the method."""
    seconds: float
    cell: str
    """Hash of everything the score depends on."""
    created: str
    provenance: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def usable(self) -> bool:
        """Whether it may be chosen."""
        return self.status == "ok" and self.score is not None


def protocol_folder(protocol: str, own_backbone: bool, backbone: str) -> str:
    """Name of the folder of a protocol's trials; another base model than the protocol's has a folder of its own."""
    return (protocol if own_backbone else f"{protocol}-{backbone}").replace("/", "-")


def trial_path(folder: str, trial: Trial, root: Path = RESULTS) -> Path:
    """Where a trial is written."""
    return root / ROOM / folder / trial.method / f"{trial.cell}-s{trial.seed}.json"


def write_trial(path: Path, trial: Trial) -> None:
    """Write one trial.

    Raises:
        RecordError: If a number is not finite.
    """
    try:
        text = json.dumps(dataclasses.asdict(trial), indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise RecordError(f"trial of method '{trial.method}': {error}; NaN and infinities are not results.") from error
    write_atomically(path, text + "\n")


def read_trial(path: Path) -> Trial:
    """Read one trial strictly.

    Raises:
        RecordError: Naming file and field of what is missing, unknown, of another type or out of range.
    """
    trial = build(Trial, read_json(path, error=RecordError), str(path), error=RecordError)
    if trial.format != FORMAT:
        raise RecordError(f"{path}: format {trial.format} is not known; this version reads {FORMAT}.")
    for name, value in {"score": trial.score, **trial.scores}.items():
        if value is not None and not 0.0 <= value <= 1.0:
            raise RecordError(f"{path}: '{name}' must be from 0 to 1, got {value}.")
    if trial.status == "ok" and trial.score is None:
        raise RecordError(f"{path}: 'score' is missing; only trials that diverged or failed have none.")
    return trial


def load_trials(root: Path = RESULTS, suite: str | None = None) -> list[Trial]:
    """Every trial of a suite (None: of all suites), sorted by path.

    Raises:
        RecordError: If one is damaged.
    """
    trials = [read_trial(path) for path in sorted((root / ROOM).glob("*/*/*.json"))]
    return [trial for trial in trials if suite is None or trial.suite == suite]


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """The trial with the highest score; of equal ones the default, then the first. None if none has a score."""
    usable = [trial for trial in trials if trial.usable]
    return max(usable, key=lambda trial: (round(trial.score or 0.0, 12), trial.default), default=None)


def tuned_name(method: str) -> str:
    """What a row of a table is called that has the settings which the trials of a preset choose."""
    return method + TUNED


def preset_of(name: str) -> str:
    """The preset of a row, tuned or not."""
    return name.removesuffix(TUNED)


def validated_settings(
    trials: Iterable[Trial], method: str, suite: str, protocol: str, backbone: str, tasks: Collection[str]
) -> dict[str, Any]:
    """The settings that the newest set of trials of a preset chooses; empty if it chooses the preset's own, or a training.

    They are chosen once, on the pool that the trials had, and hold for every seed. A trial that trains the method has gates of its own
    under ``runs/tuning``, so it is not in here.

    Args:
        trials: Of any method.
        method: Preset.
        suite, protocol, backbone: Of the trials, as records name them.
        tasks: Of the evaluation; trials over others do not count.
    """
    wanted = (method, suite, protocol, backbone)
    own = [one for one in trials if (one.method, one.suite, one.protocol, one.backbone) == wanted and _whole(one, set(tasks))]
    best = best_trial(alike(own))
    return {} if best is None or best.default or best.trained_here else best.settings


def _whole(trial: Trial, tasks: Set[str]) -> bool:
    """Whether a trial ran over these tasks; one without a score is counted with the others."""
    return not trial.scores or set(trial.scores) == tasks


def alike(trials: Iterable[Trial]) -> list[Trial]:
    """Of one method's trials those that are as the newest one: as many questions, the same seed and pool; in the order of their making."""
    ordered = sorted(trials, key=lambda trial: trial.created)
    return [one for one in ordered if (one.limit, one.seed, one.pool_hash) == (ordered[-1].limit, ordered[-1].seed, ordered[-1].pool_hash)]


def of_table(trials: Iterable[Trial], records: Sequence[Record]) -> dict[str, list[Trial]]:
    """Method -> trials that belong to a table, in the order in which they were made.

    They have its suite, protocol and base model, and one of its pools. Trials over some of the tasks do not count; of trials with several
    limits, seeds or pools, only those of the newest one do.

    Args:
        trials: Of any suite.
        records: Those of the table.
    """
    settings = {(record.suite, record.protocol_name, str(record.backbone.get("name")), record.pool_hash) for record in records}
    tasks = set(records[0].suite_tasks) if records else set()
    found: dict[str, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: trial.created):
        if _whole(trial, tasks) and (trial.suite, trial.protocol, trial.backbone, trial.pool_hash) in settings:
            found.setdefault(trial.method, []).append(trial)
    return {method: alike(several) for method, several in found.items()}


def spelled(settings: dict[str, Any]) -> str:
    """Settings as they are given on the command line."""
    return ", ".join(f"{name}={json.dumps(value) if not isinstance(value, str) else value}" for name, value in settings.items())


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def trial_table(trials: Sequence[Trial]) -> str:
    """What one method tried: settings, validation score, tokens, seconds and status; the chosen one is bold."""
    best = best_trial(trials)
    rows = []
    for trial in trials:
        score = _percent(trial.score)
        told = trial.status if trial.reason is None else f"{trial.status}: {trial.reason}"
        own = spelled(trial.settings) + (" (default)" if trial.default else "")
        tokens = "" if trial.tokens_seen is None else f"{trial.tokens_seen / 1e6:.2f}"
        rows.append([plain(own), f"**{score}**" if trial is best else score, tokens, f"{trial.seconds:.0f}", plain(told)])
    return table(["settings", "validation score %", "tokens seen (M)", "seconds", "status"], rows, left=(0, 4))


def chosen_table(found: Mapping[str, Sequence[Trial]]) -> str:
    """One row per method: what was varied, how often, and what the validation split chooses."""
    rows = []
    for method, trials in sorted(found.items()):
        best, default = best_trial(trials), next((trial for trial in trials if trial.default), None)
        lost = sum(not trial.usable for trial in trials)
        rows.append(
            [
                code(method),
                str(len(trials)) + (f" ({lost} without a score)" if lost else ""),
                "" if default is None else plain(spelled(default.settings)),
                _percent(None if default is None else default.score),
                "" if best is None else plain(spelled(best.settings)) if not best.default else "the default",
                _percent(None if best is None else best.score),
            ]
        )
    return table(["method", "trials", "default", "validation score %", "validation chooses", "validation score %"], rows)


def questions_note(found: Mapping[str, Sequence[Trial]]) -> str:
    """What the scores of a table of trials were measured on."""
    trials = [trial for several in found.values() for trial in several]
    limits = sorted({trial.limit for trial in trials}, key=lambda limit: math.inf if limit is None else limit)
    asked = " or ".join("all" if limit is None else str(limit) for limit in limits)
    return (
        f"Validation split, {asked} questions per task; accuracy or exact match, mean over tasks. At most {MAX_TRIALS} trials per method; "
        "ties go to the default. All trials: `results/tuning`, made by `dlplora tune`. "
        f"The rows above have the presets' defaults; rows whose name ends in `{TUNED}` have the settings that validation chooses, for "
        "every seed."
    )
