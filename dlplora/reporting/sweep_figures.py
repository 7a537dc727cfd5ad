"""Curves from sweep files: quality against the selection bound, a router's error rate, and the number of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dlplora.reporting.drawing import INK, MARKERS, PALETTE, pyplot
from dlplora.reporting.sweeps import Point, SweepFile, points_of

BROAD = ((5.0, 8.0, 0.45), (2.6, 5.5, 0.8))
"""Line width, marker size and opacity of the first curves."""
RIGHT = "right"
"""Metric of the curves: share of all questions answered right (multiple choice) or exactly (generation)."""


def _average(points: Sequence[Point], metric: str) -> list[tuple[float, float, float]]:
    """(x, mean, error) by x. One run: its own standard error; several (orders of a pool): the spread of their mean."""
    found: dict[float, list[Point]] = {}
    for point in points:
        if point.metrics.get(metric) is not None:
            found.setdefault(point.x, []).append(point)
    rows = []
    for x, same in sorted(found.items()):
        values = [float(point.metrics[metric] or 0.0) for point in same]
        own = same[0].metrics.get(f"{metric}_stderr") or 0.0
        error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else own
        rows.append((x, float(np.mean(values)), error))
    return rows


def _curves(axes: Any, series: Mapping[str, Sequence[Point]], metric: str = RIGHT, scale: float = 100.0) -> None:
    for index, (name, points) in enumerate(series.items()):
        rows = _average(points, metric)
        if rows:
            x, y, error = (np.array(column) for column in zip(*rows, strict=True))
            # equal curves overlap: the first ones are broad and pale, so that all of them are visible
            width, size, alpha = BROAD[index] if index < len(BROAD) else (1.2, 4.0, 1.0)
            style = {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)], "ms": size, "lw": width}
            axes.errorbar(x, scale * y, scale * error, label=name, capsize=2, elinewidth=0.8, alpha=alpha, **style)
    axes.grid(alpha=0.25)


def _pair(files: Sequence[SweepFile], sweeps: Sequence[tuple[str, str]], xlabel: str) -> Any:
    """Two panels with one y axis; None if neither sweep was run."""
    shown = [(points_of(files, sweep), title) for sweep, title in sweeps]
    shown = [(series, title) for series, title in shown if series]
    if not shown:
        return None
    figure, panels = pyplot().subplots(1, len(shown), figsize=(4.1 * len(shown), 3.6), sharey=True, squeeze=False)
    for axes, (series, title) in zip(panels[0], shown, strict=True):
        _curves(axes, series)
        axes.set_title(title, fontsize=9, color=INK)
        axes.set_xlabel(xlabel)
    panels[0][0].set_ylabel("questions right, %")
    panels[0][0].set_ylim(0, 103)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8)
    return figure


def quality_against_p(files: Sequence[SweepFile]) -> Any:
    """Nucleus over ``top_p`` and threshold over ``threshold``, with the trained router and with one that doubts."""
    sweeps = (("p", "trained router"), ("p_unsure", "router that doubts, and errs, on 30 %"))
    return _pair(files, sweeps, "top_p (nucleus) or threshold")


def quality_against_router_errors(files: Sequence[SweepFile]) -> Any:
    """Routing that goes wrong for a growing share of prompts."""
    sweeps = (("flips", "errs with conviction"), ("flips_unsure", "errs at 0.55 against 0.45"))
    return _pair(files, sweeps, "share of prompts sent to a wrong expert")


def weighting(files: Sequence[SweepFile]) -> Any:
    """How the weights of kept experts are made from probabilities, at the smallest and the largest error rate measured."""
    series = points_of(files, "weighting")
    if not series:
        return None
    figure, axes = pyplot().subplots(figsize=(5.5, 3))
    rates = sorted({point.x for points in series.values() for point in points})
    for index, rate in enumerate(rates):
        rows = [next((point for point in points if point.x == rate), None) for points in series.values()]
        heights = [100 * float(row.metrics[RIGHT] or 0) if row else 0.0 for row in rows]
        errors = [100 * float(row.metrics.get(f"{RIGHT}_stderr") or 0) if row else 0.0 for row in rows]
        places = np.arange(len(rows)) + (index - (len(rates) - 1) / 2) * 0.4
        axes.bar(
            places, heights, 0.38, yerr=errors, color=PALETTE[index], ecolor=INK, capsize=2, label=f"{100 * rate:g} % of prompts in doubt"
        )
    axes.set_xticks(range(len(series)), list(series))
    axes.set_ylabel("questions right, %")
    axes.set_ylim(0, 100)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.legend(loc="lower center", ncols=2, fontsize=8)
    return figure


def quality_against_experts(files: Sequence[SweepFile]) -> Any:
    """Pools of growing size, asked the tasks of their own experts."""
    series = points_of(files, "experts")
    if not series:
        return None
    figure, axes = pyplot().subplots(figsize=(5.5, 3.6))
    _curves(axes, series)
    axes.set_xscale("log", base=2)
    ticks = sorted({point.x for points in series.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("experts in the pool, asked their own tasks")
    axes.set_ylabel("questions right, %")
    axes.set_ylim(0, 103)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8)
    return figure


SWEEP_FIGURES: dict[str, Callable[[Sequence[SweepFile]], Any]] = {
    "quality_against_p": quality_against_p,
    "quality_against_router_errors": quality_against_router_errors,
    "weighting": weighting,
    "quality_against_experts": quality_against_experts,
}
"""Name -> drawing function; one that has nothing to show returns None."""
