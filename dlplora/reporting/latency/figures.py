"""Figures of latency records: time per token against pool size and batch size, and the parts of a step."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dlplora.reporting.drawing import INK, PALETTE, pyplot, write_figures
from dlplora.reporting.latency.records import BASE, SINGLE, LatencyRecord, Measurement, latency_records, plain_of, ratio_to, reference_of
from dlplora.reporting.latency.tables import name_of, newest_of_each

Axis = Literal["experts", "batch_size"]
LONGEST = 10
"""Bars longer than this multiple of the base model's are left out: they would compress all others."""
TITLES: dict[Axis, str] = {"experts": "experts in the pool", "batch_size": "rows of the batch, all different"}


def _lines(record: LatencyRecord, axis: Axis) -> dict[str, list[Measurement]]:
    """Name -> measurements that differ along the axis, of the first group where most systems have several."""
    fixed = "batch_size" if axis == "experts" else "experts"
    best: dict[str, list[Measurement]] = {}
    for group in dict.fromkeys(one.group for one in record.measurements):
        found: dict[str, dict[int, Measurement]] = {}
        members = [one for one in record.measurements if one.group == group and one.reroute_every is None and one.kept is None]
        first = {name_of(one): (getattr(one, fixed), one.prompt_tokens) for one in reversed(members)}
        for one in members:
            if (getattr(one, fixed), one.prompt_tokens) == first[name_of(one)]:
                found.setdefault(name_of(one), {}).setdefault(getattr(one, axis), one)
        lines = {name: [points[x] for x in sorted(points)] for name, points in found.items() if len(points) > 1}
        if len(lines) > len(best):
            best = lines
    return best


def along(record: LatencyRecord, axis: Axis) -> Any:
    """TPOT over one LoRA against the pool's or the batch's size, with 95 % intervals; None where nothing was swept."""
    lines = {name: points for name, points in _lines(record, axis).items() if points[0].contender != SINGLE}
    if not lines:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 3.8))
    for (name, points), color in zip(lines.items(), PALETTE * 2, strict=False):
        ratios = [ratio_to(record, one, SINGLE, "tpot_s") for one in points]
        known = [(getattr(one, axis), ratio) for one, ratio in zip(points, ratios, strict=True) if ratio is not None]
        if not known:
            continue
        xs, middle = [x for x, _ in known], np.array([ratio.median for _, ratio in known])
        below = middle - np.array([ratio.low for _, ratio in known])
        above = np.array([ratio.high for _, ratio in known]) - middle
        style = ":" if name == BASE else "-"
        axes.errorbar(
            xs, middle, yerr=np.maximum(0, [below, above]), color=color, ls=style, marker="o", ms=3.5, lw=1.5, capsize=2, label=name
        )
    axes.axhline(1.0, color=INK, lw=1, ls="--", label="PEFT, one LoRA")
    axes.set_xscale("log")
    ticks = sorted({getattr(one, axis) for points in lines.values() for one in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    top = axes.get_ylim()[1]
    if top > 8:
        axes.set_yscale("log")
        marks = [mark for mark in (0.5, 1, 2, 5, 10, 20, 50, 100) if mark <= top]
        axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
        axes.minorticks_off()
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(TITLES[axis])
    axes.set_ylabel("time per decoded token ÷ one LoRA")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure


def step(record: LatencyRecord) -> Any:
    """Parts of a decode step's time at batch 1: base model, fusion (gates included), re-routing; None without forced re-routing."""
    forced = [one for one in record.measurements if one.reroute_every is not None and one.batch_size == 1 and one.kept is None]
    if not forced:
        return None
    group = [one for one in record.measurements if one.workload == forced[0].workload and one.kept is None]
    base = reference_of(record, forced[0], BASE)
    if base is None:
        return None
    ground = 1e3 * statistics.median(base.tpot_s)
    rows = [one for one in group if 1e3 * statistics.median(one.tpot_s) < LONGEST * ground]
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 0.36 * len(rows) + 1.3))
    for index, one in enumerate(rows):
        plain = plain_of(record, one) if one.reroute_every is not None else one
        whole = 1e3 * statistics.median(one.tpot_s)
        still = whole if plain is None else min(whole, 1e3 * statistics.median(plain.tpot_s))
        parts = (min(ground, whole), max(0.0, still - ground), max(0.0, whole - still))
        left = 0.0
        for width, color in zip(parts, (INK, PALETTE[0], PALETTE[1]), strict=True):
            axes.barh(index, width, left=left, color=color, height=0.7)
            left += width
        axes.annotate(f"{whole:.2f}", (left, index), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [name_of(one) for one in rows], fontsize=8)
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time per decoded token, ms (median)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (INK, PALETTE[0], PALETTE[1])]
    figure.legend(handles, ["base model", "fusion and gates", "re-routing"], loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.9 / (0.36 * len(rows) + 1.3) * 0.28, 1, 1))
    return figure


FIGURES: dict[str, Callable[[LatencyRecord], Any]] = {
    "tpot_experts": lambda record: along(record, "experts"),
    "tpot_batch": lambda record: along(record, "batch_size"),
    "step": step,
}
"""Name -> drawing function; one that has nothing to show returns None."""


def draw_latency(bench: Path, folder: Path) -> list[Path]:
    """Write what the newest record of every shape and kind of device has to show.

    Args:
        bench: Folder of the records; it need not exist.
        folder: Where the figures go.

    Raises:
        RecordError: If a record is damaged.
    """
    written = []
    for name, record in newest_of_each(latency_records(bench)).items():
        drawn = {key: function(record) for key, function in FIGURES.items()}
        written += write_figures({key: figure for key, figure in drawn.items() if figure is not None}, folder, f"latency_{name}")
    return written
