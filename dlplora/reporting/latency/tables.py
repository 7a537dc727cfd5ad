"""Latency records as Markdown. No deep-learning package is imported."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from dlplora.reporting.latency import training as training_bench
from dlplora.reporting.latency.records import (
    BASE,
    FIXED_ORDER,
    SINGLE,
    LatencyRecord,
    Measurement,
    Ratio,
    iqr,
    latency_records,
    ratio_to,
    reference_of,
    reroute_cost,
)
from dlplora.reporting.latency.training import newest_trainings
from dlplora.reporting.markdown import code, table

TITLES = (
    "system", "experts", "kept", "TTFT ms (IQR)", "TPOT ms (IQR)", "TTFT ÷ one LoRA", "TPOT ÷ one LoRA [95 %]", "TPOT ÷ base",
    "router ms", "re-route ÷ step", "TPOT ÷ floor", "memory MB", "+ transient MB",
)  # fmt: skip
DEVICE_TITLES = ("kernels ms per token", "kernels ÷ base", "kernels ÷ floor")
"""Of groups timed on a GPU."""


def _milliseconds(samples: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(samples):.2f} ({1e3 * iqr(samples):.2f})" if samples else ""


def _ratio(ratio: Ratio | None, *, interval: bool = False) -> str:
    if ratio is None:
        return ""
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if interval else f"{ratio.median:.2f}"


def name_of(one: Measurement) -> str:
    """Name of a row: the system with the settings that distinguish it from others of its name."""
    parts = [one.contender]
    if one.reroute_every is not None:
        parts.append(f"re-routed every {one.reroute_every}")
    if one.backend_asked not in {"", "auto"}:
        parts.append(one.backend_asked)
    if one.compiled:
        parts.append("compiled")
    return ", ".join(parts)


def _kept(one: Measurement) -> str:
    if one.kept is not None:
        return str(one.kept)
    return "" if one.experts_kept is None else f"{one.experts_kept:.1f}"


def _row(record: LatencyRecord, one: Measurement) -> list[str]:
    return [
        code(name_of(one)),
        str(one.experts) if one.experts else "",
        _kept(one),
        _milliseconds(one.ttft_s),
        _milliseconds(one.tpot_s),
        "" if record.seed is None else _ratio(ratio_to(record, one, SINGLE, "ttft_s")),
        _ratio(ratio_to(record, one, SINGLE, "tpot_s"), interval=True),
        _ratio(ratio_to(record, one, BASE, "tpot_s")),
        f"{1e3 * statistics.median(one.router_s):.2f}" if one.router_s else "",
        _ratio(reroute_cost(record, one)),
        f"{statistics.median(one.tpot_s) / one.floor_s:.2f}",
        f"{one.resident_bytes / 1e6:.1f}",
        "" if one.transient_bytes is None else f"{one.transient_bytes / 1e6:.1f}",
    ]


def _device_cells(record: LatencyRecord, one: Measurement) -> list[str]:
    if one.device_s is None:
        return [""] * len(DEVICE_TITLES)
    base = reference_of(record, one, BASE)
    return [
        f"{1e3 * one.device_s:.3f}",
        "" if base is None or base.device_s is None else f"{one.device_s / base.device_s:.3f}",
        f"{one.device_s / one.floor_s:.2f}",
    ]


def markdown(record: LatencyRecord) -> str:
    """One table per group and workload, under a line that says what was measured, and what was skipped or disturbed."""
    first = (
        f"Shape `{record.shape}` ({record.parameters / 1e6:.1f} M parameters, {record.weights} weights), {record.dtype}, {record.device}; "
        f"copy bandwidth {record.bandwidth_bytes_per_s / 1e9:.1f} GB/s."
    )
    parts = [first, *(f"Warning: {warning}." for warning in record.warnings)]
    if record.seed is None:
        parts.append(f"Warning: {FIXED_ORDER}, so they are left out.")
    workloads = dict.fromkeys((one.group, one.batch_size, one.prompt_tokens) for one in record.measurements)
    for group, batch_size, prompt_tokens in workloads:
        rows = [one for one in record.measurements if (one.group, one.batch_size, one.prompt_tokens) == (group, batch_size, prompt_tokens)]
        parts.append(
            f"{group}: batch {batch_size}, prompt {prompt_tokens}, {rows[0].new_tokens} new tokens, {len(rows[0].tpot_s)} rounds, adapters "
            f"{record.adapters[group]}, floor {1e3 * rows[0].floor_s:.3f} ms per step"
        )
        timed = any(one.device_s is not None for one in rows)
        cells = [[*_row(record, one), *(_device_cells(record, one) if timed else ())] for one in rows]
        parts.append(table((*TITLES, *(DEVICE_TITLES if timed else ())), cells))
    if record.skipped:
        parts.append("Not measured:\n" + "\n".join(f"* {what}: {why}" for what, why in record.skipped.items()))
    return "\n\n".join(parts)


def speed_page(bench: Path) -> str | None:
    """The content of ``results/tables/speed.md``: the newest latency record of every shape and kind of device, and of training.

    Args:
        bench: Folder of the records.

    Returns:
        None without records.

    Raises:
        RecordError: If one is damaged.
    """
    parts = [f"## Latency of `{record.shape}`\n\n{markdown(record)}" for record in newest_of_each(latency_records(bench)).values()]
    trained = sorted(newest_trainings(bench).items())
    parts += [f"## Training of a pool over `{name}`\n\n{training_bench.markdown(record)}" for (_, name, _), record in trained]
    if not parts:
        return None
    how = "Generated from `results/bench` by `dlplora report build`; [docs/performance.md](../../docs/performance.md) says how to read it."
    return "\n\n".join(["# Speed", how, *parts]) + "\n"


def newest_of_each(records: Sequence[LatencyRecord]) -> dict[str, LatencyRecord]:
    """Shape and kind of device -> the newest record."""
    found: dict[str, LatencyRecord] = {}
    for record in sorted(records, key=lambda record: record.created):
        found[f"{record.shape}_{record.device.split(':')[0]}"] = record
    return dict(sorted(found.items()))
