"""The latency columns of quality tables: ratios from a bench record, joined to methods by preset name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dlplora.reporting.latency.records import FIXED_ORDER, SINGLE, latency_records, newest, ratio_to
from dlplora.reporting.methods import MERGE, method_facts

SHAPES = {"nano": "nano", "real26": "smollm2-135m"}
"""Suite -> shape of its base model, for suites with a base model and a pool of their own."""
MERGED = "merged"
"""The backend that folds one set of weights into those of the base model."""
TRAINED = ("shipped", "trained")
"""How a record describes pools that were trained."""


@dataclass(frozen=True, kw_only=True)
class LatencyColumns:
    """Ratios for a table, and what its caption says about them."""

    ratios: Mapping[str, tuple[float | None, float]]
    """Preset -> time to the first token and time of a later token, each divided by that of PEFT with one unmerged adapter. A method that
    the bench record lacks has an empty cell: a column never mixes two clocks. The first is None throughout for a record without a seed."""
    source: str
    """Where the numbers are from, in words."""


def latency_columns(bench: Path, suite: str) -> LatencyColumns | None:
    """The ratios for a suite's tables, from the newest bench record of its base model with its trained pool; None without one.

    Forced measurements (re-routing, number of experts, compilation, backend) do not count; static merges are taken folded into the weights,
    as they would be served, where the record has that.

    Args:
        bench: Folder of bench records; it need not exist.
        suite: Name of the suite.

    Raises:
        RecordError: If a bench record is damaged.
    """
    shape = SHAPES.get(suite)
    trained = [one for one in latency_records(bench) if any(text.startswith(TRAINED) for text in one.adapters.values())]
    record = None if shape is None else newest(trained, shape)
    if record is None:
        return None
    found: dict[str, tuple[float | None, float]] = {}
    first = None
    static = {name for group in method_facts().groups if group.key == MERGE for name in group.classes}
    merged = static & {one.contender for one in record.measurements if one.backend_asked == MERGED}
    for one in record.measurements:
        backends = {MERGED} if one.contender in merged else {"", "auto"}
        forced = one.reroute_every is not None or one.kept is not None or one.compiled or one.backend_asked not in backends
        if forced or one.batch_size != 1 or one.contender in found or not record.adapters[one.group].startswith(TRAINED):
            continue
        prefill, decode = ratio_to(record, one, SINGLE, "ttft_s"), ratio_to(record, one, SINGLE, "tpot_s")
        if prefill is not None and decode is not None:
            found[one.contender] = (None if record.seed is None else prefill.median, decode.median)
            first = first or one
    if first is None:
        return None
    order = "" if record.seed is not None else f" Prefill is left out: {FIXED_ORDER}."
    folded = " Static merges are folded into the base model's weights." if merged & set(found) else ""
    commit = (record.provenance.get("git", {}).get("commit") or "unknown")[:7]
    source = (
        f"Prefill and decode: time divided by that of PEFT with one unmerged adapter; batch 1, {first.prompt_tokens} prompt tokens, "
        f"{first.new_tokens} new tokens, {record.dtype}, methods interleaved in one process, median of {len(first.tpot_s)} paired "
        f"ratios.{folded}{order} They are joined by method name from the newest record of shape `{record.shape}` in `results/bench` "
        f"(code {commit})."
    )
    return LatencyColumns(ratios=found, source=source)
