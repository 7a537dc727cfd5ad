"""Latency records as Markdown, and the ratios that the quality table borrows from them. No deep-learning package is imported."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from dlplora.reporting.bench import (
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
        f"Shape `{record.shape}` ({record.parameters / 1e6:.1f} M parameters, weights {record.weights}), {record.dtype} on {record.device}, "
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


class InterleavedRatios:
    """Latency ratios of all methods from one process, for tables of quality.

    Args:
        record: The record, or None if there is none.
    """

    def __init__(self, record: LatencyRecord | None) -> None:
        self.record = record
        self._rows: dict[str, Measurement] = {}
        for one in record.measurements if record else ():
            plain = one.batch_size == 1 and one.reroute_every is None and one.kept is None and not one.compiled
            if plain and one.backend_asked in {"", "auto"} and record and record.adapters[one.group].startswith("shipped"):
                self._rows.setdefault(one.contender, one)

    def value(self, method: str, key: str) -> float | None:
        """``latency.ttft_ratio`` or ``latency.tpot_ratio`` of a method; None if it was not timed."""
        one = self._rows.get(method)
        if one is None or self.record is None:
            return None
        ratio = ratio_to(self.record, one, SINGLE, "ttft_s" if key.endswith("ttft_ratio") else "tpot_s")
        return None if ratio is None else ratio.median

    @property
    def sentence(self) -> str:
        """Where the numbers come from, for a caption."""
        if self.record is None or not self._rows:
            return "Prefill and decode: medians over interleaved runs in one process, against PEFT with one unmerged adapter."
        one = next(iter(self._rows.values()))
        commit = (self.record.provenance.get("git", {}).get("commit") or "unknown")[:7]
        return (
            f"Prefill and decode: batch 1, {one.prompt_tokens} prompt and {one.new_tokens} new tokens, all methods by turns in one process, "
            f"median of {len(one.tpot_s)} paired ratios to PEFT with one unmerged adapter (`results/bench`, code {commit})."
        )


def interleaved_ratios(suite: str, root: Path) -> InterleavedRatios:
    """The newest record in ``root/bench`` of the backbone that a suite runs on; only nano has one of its own."""
    return InterleavedRatios(newest(latency_records(root / "bench"), suite) if suite == "nano" else None)
