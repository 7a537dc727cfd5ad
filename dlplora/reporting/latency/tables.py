"""Latency records as Markdown, and the ratios that the quality table borrows from them. No deep-learning package is imported."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlplora.reporting.latency import training as training_bench
from dlplora.reporting.latency.records import (
    BASE,
    SINGLE,
    LatencyRecord,
    Measurement,
    Ratio,
    iqr,
    latency_records,
    newest,
    ratio_to,
    reroute_cost,
)
from dlplora.reporting.latency.training import newest_training
from dlplora.reporting.schema import Record

TITLES = (
    "contender", "experts", "kept", "TTFT ms (IQR)", "TPOT ms (IQR)", "TTFT ÷ one LoRA", "TPOT ÷ one LoRA [95 %]", "TPOT ÷ base",
    "router ms", "re-route ÷ step", "TPOT ÷ floor", "memory MB", "+ transient MB",
)  # fmt: skip


def _milliseconds(samples: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(samples):.2f} ({1e3 * iqr(samples):.2f})" if samples else ""


def _ratio(ratio: Ratio | None, *, interval: bool = False) -> str:
    if ratio is None:
        return ""
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if interval else f"{ratio.median:.2f}"


def name_of(one: Measurement) -> str:
    """How a row is called: the contender with what sets it apart from others of its name."""
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
        f"`{name_of(one)}`",
        str(one.experts) if one.experts else "",
        _kept(one),
        _milliseconds(one.ttft_s),
        _milliseconds(one.tpot_s),
        _ratio(ratio_to(record, one, SINGLE, "ttft_s")),
        _ratio(ratio_to(record, one, SINGLE, "tpot_s"), interval=True),
        _ratio(ratio_to(record, one, BASE, "tpot_s")),
        f"{1e3 * statistics.median(one.router_s):.2f}" if one.router_s else "",
        _ratio(reroute_cost(record, one)),
        f"{statistics.median(one.tpot_s) / one.floor_s:.2f}",
        f"{one.resident_bytes / 1e6:.1f}",
        "" if one.transient_bytes is None else f"{one.transient_bytes / 1e6:.1f}",
    ]


def markdown(record: LatencyRecord) -> str:
    """One table a group and workload, under a line that says what was measured, and what was skipped or disturbed."""
    first = (
        f"Shape `{record.shape}` ({record.parameters / 1e6:.1f} M parameters, {record.weights} weights), {record.dtype}, {record.device}; "
        f"copy bandwidth {record.bandwidth_bytes_per_s / 1e9:.1f} GB/s."
    )
    parts = [first, *(f"Warning: {warning}." for warning in record.warnings)]
    workloads = dict.fromkeys((one.group, one.batch_size, one.prompt_tokens) for one in record.measurements)
    for group, batch_size, prompt_tokens in workloads:
        rows = [one for one in record.measurements if (one.group, one.batch_size, one.prompt_tokens) == (group, batch_size, prompt_tokens)]
        parts.append(
            f"{group}: batch {batch_size}, prompt {prompt_tokens}, {rows[0].new_tokens} new tokens, {len(rows[0].tpot_s)} rounds, adapters "
            f"{record.adapters[group]}, floor {1e3 * rows[0].floor_s:.3f} ms a step"
        )
        lines = ["| " + " | ".join(TITLES) + " |", "|---|" + "---:|" * (len(TITLES) - 1)]
        lines += ["| " + " | ".join(_row(record, one)) + " |" for one in rows]
        parts.append("\n".join(lines))
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
    trained = [newest_training(bench, device) for device in ("cpu", "cuda")]
    parts += [f"## Training of a pool\n\n{training_bench.markdown(record)}" for record in trained if record is not None]
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


def interleaved(records: Sequence[Record], root: Path) -> list[Record]:
    """Records whose latency is that of the newest bench record of their backbone, in which all methods took turns in one process.

    Each run times its own method too, but at another hour than the others. Where there is no such bench record the runs' own latencies
    stay; where there is one, a method it does not hold gets none, so that a column never mixes two clocks. Only the backbone of the suite
    ``nano`` is embedded and has records of its own.

    Args:
        records: Of any suites.
        root: Folder of results.

    Raises:
        RecordError: If a bench record is damaged.
    """
    if not any(record.suite == "nano" for record in records):
        return list(records)
    bench = newest(latency_records(root / "bench"), "nano")
    found = {} if bench is None else _ratios_of_methods(bench)
    if not found:
        return list(records)
    return [dataclasses.replace(record, latency=found.get(record.method_name)) if record.suite == "nano" else record for record in records]


def _ratios_of_methods(bench: LatencyRecord) -> dict[str, dict[str, Any]]:
    """Contender -> the latency of a record: ratios at batch 1 with the embedded pool, nothing forced, and their source in words."""
    found: dict[str, dict[str, Any]] = {}
    commit = (bench.provenance.get("git", {}).get("commit") or "unknown")[:7]
    for one in bench.measurements:
        forced = one.reroute_every is not None or one.kept is not None or one.compiled or one.backend_asked not in {"", "auto"}
        if forced or one.batch_size != 1 or one.contender in found or not bench.adapters[one.group].startswith("shipped"):
            continue
        first, later = ratio_to(bench, one, SINGLE, "ttft_s"), ratio_to(bench, one, SINGLE, "tpot_s")
        if first is None or later is None:
            continue
        source = (
            f"Prefill and decode: batch 1, {one.prompt_tokens} prompt and {one.new_tokens} new tokens, all methods by turns in one run, "
            f"median of {len(one.tpot_s)} paired ratios to PEFT with one unmerged adapter (`results/bench`, code {commit})."
        )
        found[one.contender] = {"ttft_ratio": first.median, "tpot_ratio": later.median, "source": source}
    return found


def latency_source(records: Sequence[Record]) -> str:
    """What a caption says about the latency columns."""
    known = (record.latency.get("source") for record in records if record.latency)
    own = "Prefill and decode: medians over interleaved runs in one process, against PEFT with one unmerged adapter."
    return next((source for source in known if source), own)
