"""The project's speed targets, read from the newest record of each shape. Without a record there is no number.

Nothing is measured here: ``benchmarks.latency_ratios``, ``benchmarks.training_speed`` and ``benchmarks.evaluation_speed`` write the
records.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dlplora.documents import read_json
from dlplora.reporting.latency.records import (
    BASE,
    SINGLE,
    LatencyRecord,
    Measurement,
    Quantity,
    Ratio,
    latency_records,
    newest,
    paired_ratio,
    ratio_to,
    reroute_cost,
)
from dlplora.reporting.latency.training import newest_trainings
from dlplora.reporting.markdown import table

CPU_SHAPES = ("nano", "qwen2-0.5b")
GPU_SHAPES = ("qwen2-1.5b", "llama3-8b")
TOKEN_LEVEL = ("meteora_gate", "mole", "xlora")
Row = tuple[str, str, str]


def find(record: LatencyRecord | None, contender: str, batch: int, prompt: int | None = None, **wanted: object) -> Measurement | None:
    """The measurement of a contender with the most rounds, of the first group; plain unless ``wanted`` says otherwise."""
    settings: dict[str, object] = {"reroute_every": None, "kept": None, "compiled": False, **wanted}
    found = []
    for one in record.measurements if record else ():
        fits = one.contender == contender and one.batch_size == batch and (prompt is None or one.prompt_tokens == prompt)
        if fits and all(getattr(one, key) == value for key, value in settings.items()) and one.backend_asked in {"", "auto"}:
            found.append(one)
    return max(found, key=lambda one: len(one.tpot_s), default=None)


def _text(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _over_single(record: LatencyRecord | None, one: Measurement | None, quantity: Quantity = "tpot_s") -> Ratio | None:
    return None if record is None or one is None else ratio_to(record, one, SINGLE, quantity)


def decode_one(record: LatencyRecord | None) -> str:
    """Decode at 26 experts, batch 1."""
    return _text(_over_single(record, find(record, "dlp", 1, experts=26)))


def decode_many(record: LatencyRecord | None) -> str:
    """Decode with 32 rows."""
    return _text(_over_single(record, find(record, "dlp", 32, experts=26)))


def prefill(record: LatencyRecord | None) -> str:
    """Prefill of 1024 tokens, routing included."""
    return _text(_over_single(record, find(record, "dlp", 1, 1024), "ttft_s"))


def pool_size(record: LatencyRecord | None) -> str:
    """Decode at 1000 experts over decode at 2, in the same rounds."""
    large = find(record, "dlp", 1, experts=1000)
    small = None if large is None else find(record, "dlp", 1, experts=2, workload=large.workload)
    return "" if large is None or small is None else _text(paired_ratio(large.tpot_s, small.tpot_s))


def reroute(record: LatencyRecord | None) -> str:
    """One re-route of the only row."""
    for one in record.measurements if record else ():
        if one.contender == "dlp" and one.batch_size == 1 and one.reroute_every is not None and not one.compiled:
            return _text(reroute_cost(record, one))  # type: ignore[arg-type]
    return ""


def token_level(record: LatencyRecord | None) -> str:
    """Token-level methods against ``dlp`` in the same rounds."""
    shown = []
    for name in TOKEN_LEVEL:
        one = find(record, name, 1)
        ours = None if one is None else find(record, "dlp", 1, workload=one.workload)
        if one is not None and ours is not None:
            shown.append(f"{name} {paired_ratio(one.tpot_s, ours.tpot_s).median:.2f}")
    return ", ".join(shown)


CPU_TARGETS: tuple[tuple[str, Callable[[LatencyRecord | None], str], str], ...] = (
    ("decode, dlp, 26 experts, batch 1 ÷ one LoRA", decode_one, "<= 1.00"),
    ("decode, dlp, batch 32, rows routed apart ÷ one LoRA", decode_many, "<= 1.10"),
    ("prefill, dlp, 1024 tokens ÷ one LoRA", prefill, "<= 1.05"),
    ("decode, dlp, 1000 experts ÷ 2 experts", pool_size, "<= 1.05"),
    ("one re-route, router included, in decode steps", reroute, "<= 1.0"),
    ("token-level methods ÷ dlp, decode", token_level, "shown; >= 1.3 expected"),
)
"""What, how it is read from a record, and what is wanted."""


def over_floor(record: LatencyRecord | None) -> str:
    """Compiled decode of ``dlp`` at batch 1 over the floor."""
    one = find(record, "dlp", 1, compiled=True)
    return "" if one is None else f"{statistics.median(one.tpot_s) / one.floor_s:.2f}"


def compiled_over_base(record: LatencyRecord | None) -> str:
    """Compiled decode of ``dlp`` with 32 rows over the base model's."""
    one = find(record, "dlp", 32, compiled=True)
    return "" if record is None or one is None else _text(ratio_to(record, one, BASE, "tpot_s"))


def evaluation_speed(folder: Path) -> str:
    """Whole evaluations over stock lm-eval, smallest to largest over methods, with and without the report that stock prints."""
    path = folder / "evaluation_speed.json"
    record = read_json(path) if path.is_file() else {}
    if not record or record.get("limit") is not None:
        return ""
    shown = []
    for key in ("to_stock", "to_stock_without_report"):
        values = [row[key] for row in record["methods"].values()]
        shown.append(f"{min(values):.2f}–{max(values):.2f}")
    return f"{shown[0]} over {len(record['methods'])} methods; {shown[1]} against stock without its report"


def _speedups(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.2f}" for name in ("sequential", "joint") if name in values)


def rows(folder: Path) -> Iterator[Row]:
    """``(target, measured, wanted)``; what no record answers is an empty cell.

    Args:
        folder: Of the records.
    """
    records = latency_records(folder)
    for shape in CPU_SHAPES:
        record = newest(records, shape, "cpu")
        for what, read, wanted in CPU_TARGETS:
            yield f"{what} ({shape}, CPU)", read(record), wanted
    for shape in GPU_SHAPES:
        yield f"decode, dlp, batch 1, compiled ÷ bandwidth floor ({shape}, GPU)", over_floor(newest(records, shape, "cuda")), "<= 1.4"
        yield f"decode, dlp, batch 32, compiled ÷ base ({shape}, GPU)", compiled_over_base(newest(records, shape, "cuda")), "<= 1.15"
    yield "evaluation of the 26 nano tasks ÷ stock lm_eval with PEFT, a method", evaluation_speed(folder), "<= 0.5"
    for device in ("cpu", "cuda"):
        training = newest_trainings(folder).get((device, "nano", "float32"))
        measured = "" if training is None else _speedups(training.speedups())
        yield f"training a pool: speed ÷ PEFT one by one ({device})", measured, "> 1 for the default mode"


def print_table(listed: list[Row]) -> None:
    """Print targets as Markdown."""
    print(table(["target", "measured", "wanted"], listed))
