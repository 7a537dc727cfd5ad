"""Records of training speed: several ways to train the same pool on the same rows. No deep-learning package is imported."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlplora.config import build
from dlplora.documents import read_json
from dlplora.errors import RecordError
from dlplora.reporting.latency.records import BENCH_VERSION, iqr, paired_ratio
from dlplora.reporting.markdown import code, table

ONE_BY_ONE = "peft_one_by_one"
"""The reference: PEFT and a plain loop, one adapter after another."""
TITLES = (
    "mode", "training s (IQR)", "tokens/s", "times faster than PEFT one by one", "peak memory MB", "padding %", "validation loss",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingMode:
    """One way to train the pool; samples in the order of the rounds."""

    train_s: list[float]
    """Wall time of all training steps, s; loading the base model and making the data not counted."""
    peak_memory_bytes: list[int]
    """On a GPU what torch's allocator counted, on a CPU the peak resident set of the process, libraries included."""
    validation_loss: float
    """Mean over tasks of the cross-entropy of held-out answers under the exported adapters, all modes by one evaluation."""
    padding: float
    """Share of the tokens computed on that were padding."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """All ways in turns on one machine."""

    backbone: str
    tasks: list[str]
    settings: dict[str, Any]
    """Steps of every expert, rows per batch, rank and the like."""
    tokens: int
    """Real tokens of all training batches, the same in every mode."""
    device: str
    default_mode: str
    """What ``mode: auto`` takes on this device."""
    modes: dict[str, TrainingMode]
    warnings: list[str]
    provenance: dict[str, Any]
    created: str
    kind: str = "training"
    schema_version: int = BENCH_VERSION

    def speedups(self) -> dict[str, float]:
        """Mode -> times faster than one by one, median over rounds."""
        reference = self.modes.get(ONE_BY_ONE)
        if reference is None:
            return {}
        others = {name: mode for name, mode in self.modes.items() if name != ONE_BY_ONE}
        return {name: paired_ratio(reference.train_s, mode.train_s).median for name, mode in others.items()}


def read_training(path: Path) -> TrainingRecord:
    """Read one training record strictly.

    Raises:
        RecordError: Naming the file and the field that does not fit.
    """
    raw = read_json(path, error=RecordError)
    if (raw.get("kind"), raw.get("schema_version")) != ("training", BENCH_VERSION):
        raise RecordError(f"{path}: expected kind 'training' in version {BENCH_VERSION}, got {raw.get('kind')!r}.")
    return build(TrainingRecord, raw, str(path), error=RecordError)


def newest_trainings(folder: Path) -> dict[tuple[str, str, str], TrainingRecord]:
    """(Kind of device, base model, dtype) -> the newest training record of a folder.

    Raises:
        RecordError: If a record is damaged.
    """
    records = sorted((read_training(path) for path in folder.glob("training-*.json")), key=lambda record: record.created)
    return {(record.device.split(":")[0], record.backbone, record.settings.get("dtype", "float32")): record for record in records}


def markdown(record: TrainingRecord) -> str:
    """One row per mode."""
    speedups = record.speedups()
    lines = [
        f"{len(record.tasks)} experts of `{record.backbone}` on {record.device}, {record.settings.get('dtype', 'float32')}, "
        f"{record.tokens} tokens, `auto` is {record.default_mode}.",
        *(f"Warning: {warning}." for warning in record.warnings),
        "",
    ]
    rows = []
    for name, mode in record.modes.items():
        median = statistics.median(mode.train_s)
        speedup = f"{speedups[name]:.2f}" if name in speedups else ""
        cells = [code(name), f"{median:.2f} ({iqr(mode.train_s):.2f})", f"{record.tokens / median:.0f}", speedup]
        cells += [f"{statistics.median(mode.peak_memory_bytes) / 1e6:.0f}", f"{100 * mode.padding:.1f}", f"{mode.validation_loss:.4f}"]
        rows.append(cells)
    return "\n".join([*lines, table(TITLES, rows)])
