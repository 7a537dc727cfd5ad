"""The latency columns of quality tables: ratios from a bench record, joined to methods by preset name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dlplora.reporting.latency.records import SINGLE, latency_records, newest, ratio_to


@dataclass(frozen=True, kw_only=True)
class LatencyColumns:
    """Ratios for a table, and what its caption says about them."""

    ratios: Mapping[str, tuple[float, float]]
    """Preset -> time to the first token and time of a later token, each divided by that of PEFT with one unmerged adapter. A method that
    the bench record lacks has an empty cell: a column never mixes two clocks."""
    source: str
    """Where the numbers are from, in words."""


def latency_columns(bench: Path, suite: str) -> LatencyColumns | None:
    """The ratios for a suite's tables, from the newest bench record with a shape named like the suite; None without one.

    Only the suite ``nano`` has a base model and a pool of its own, so only its tables have these columns. Forced measurements (re-routing,
    number of experts, compilation, backend) do not count.

    Args:
        bench: Folder of bench records; it need not exist.
        suite: Name of the suite.

    Raises:
        RecordError: If a bench record is damaged.
    """
    record = newest(latency_records(bench), suite)
    if record is None:
        return None
    found: dict[str, tuple[float, float]] = {}
    first = None
    for one in record.measurements:
        forced = one.reroute_every is not None or one.kept is not None or one.compiled or one.backend_asked not in {"", "auto"}
        if forced or one.batch_size != 1 or one.contender in found or not record.adapters[one.group].startswith("shipped"):
            continue
        prefill, decode = ratio_to(record, one, SINGLE, "ttft_s"), ratio_to(record, one, SINGLE, "tpot_s")
        if prefill is not None and decode is not None:
            found[one.contender] = (prefill.median, decode.median)
            first = first or one
    if first is None:
        return None
    commit = (record.provenance.get("git", {}).get("commit") or "unknown")[:7]
    source = (
        f"Prefill and decode: time divided by that of PEFT with one unmerged adapter; batch 1, {first.prompt_tokens} prompt tokens, "
        f"{first.new_tokens} new tokens, methods interleaved in one process, median of {len(first.tpot_s)} paired ratios. They are joined "
        f"by method name from the newest record of shape `{record.shape}` in `results/bench` (code {commit})."
    )
    return LatencyColumns(ratios=found, source=source)
