"""Figures of results, from records and their outcomes; vector and bitmap, readable on light and dark backgrounds."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlplora.reporting.columns import by_method, value_of
from dlplora.reporting.comparison import PRIMARY, Loader, task_means
from dlplora.reporting.drawing import INK, PALETTE, label_points, pyplot
from dlplora.reporting.latency.join import LatencyColumns
from dlplora.reporting.methods import without_clones
from dlplora.reporting.samples import TaskOutcomes
from dlplora.reporting.schema import Record
from dlplora.reporting.sweep_figures import SWEEP_FIGURES
from dlplora.reporting.sweeps import SweepFile

RADAR_METHODS = ("base", "oracle", "multitask", "dlp", "dlp_code", "meteora_gate", "arrow_out", "lorahub_in_pool")


def radar(records: Sequence[Record]) -> Any:
    """Every task is a spoke, every method a line, as in the paper's Figures 2 and 3; None for fewer than three tasks."""
    scores = task_means([record for record in records if set(record.tasks) == set(record.suite_tasks)])
    shown = [name for name in RADAR_METHODS if name in scores]
    tasks = list(records[0].suite_tasks) if records else []
    if not shown or len(tasks) < 3:
        return None
    plt = pyplot()
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    figure = plt.figure(figsize=(7.5, 6.9))
    axes = figure.add_axes((0.185, 0.15, 0.63, 0.63 * 7.5 / 6.9 * 1.0), projection="polar")
    axes.set_axisbelow(True)
    axes.grid(alpha=0.35, lw=0.6)
    for name, color in zip(shown, PALETTE, strict=False):
        values = [100 * scores[name][task] for task in tasks]
        # curves of equal methods overlap: a broad pale line under a narrow one shows both
        width, style, alpha = {"oracle": (5.0, "-", 0.35), "base": (1.4, ":", 1.0), "dlp_code": (1.4, "--", 1.0)}.get(name, (1.4, "-", 1.0))
        axes.plot([*angles, angles[0]], [*values, values[0]], color=color, lw=width, ls=style, alpha=alpha, label=name)
    axes.set_xticks(angles, [textwrap.fill(task.replace("_", " "), 24) for task in tasks], fontsize=7.5)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        label.set_horizontalalignment("center" if abs(np.cos(angle)) < 0.1 else "left" if np.cos(angle) > 0 else "right")
    axes.tick_params(axis="x", pad=1)
    axes.set_ylim(0, 100)
    axes.set_rlabel_position(90 / len(tasks) * 2)
    axes.set_yticks([25, 50, 75, 100], ["25", "50", "75", "100 %"], fontsize=7)
    axes.spines["polar"].set_color(INK)
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=min(4, len(shown)))
    return figure


def quality_against_latency(records: Sequence[Record], latency: LatencyColumns | None) -> Any:
    """The primary metric against decoding time, with the Pareto front; clones are left out. None without latencies."""
    middle: dict[str, tuple[float, float]] = {}
    groups = by_method(records)
    for name in without_clones(groups):
        rows = groups[name]
        scores = [score for score in (value_of(record, PRIMARY) for record in rows) if score is not None]
        if latency is not None and name in latency.ratios and scores:
            middle[name] = (latency.ratios[name][1], 100 * sum(scores) / len(scores))
    if len(middle) < 2:
        return None
    plt = pyplot()
    ordered = sorted(middle.items(), key=lambda pair: (pair[1][0], -pair[1][1]))
    front: list[tuple[str, tuple[float, float]]] = []
    for name, point in ordered:
        if not front or point[1] > front[-1][1][1]:
            front.append((name, point))
    figure, axes = plt.subplots(figsize=(8, 5.5))
    axes.step([x for _, (x, _) in front], [y for _, (_, y) in front], where="post", color=PALETTE[0], lw=1, alpha=0.6)
    best = {name for name, _ in front}
    for name, (x, y) in middle.items():
        axes.scatter(x, y, s=22, color=PALETTE[0] if name in best else INK, zorder=3)
    axes.set_ylim(min(0, *(y for _, y in middle.values())), 106)
    axes.set_xlabel("time per decoded token ÷ PEFT with one adapter (median)")
    axes.set_ylabel("mean score (accuracy or exact match), %")
    axes.grid(alpha=0.25)
    figure.tight_layout()
    label_points(axes, middle)
    return figure


def _routes(outcomes: Mapping[str, TaskOutcomes]) -> dict[str, list[list[tuple[int, dict[str, float]]]]]:
    """Task -> routing of each question that was routed."""
    return {task: [rows.parsed_routing(text) for text in rows.routing if text] for task, rows in outcomes.items()}


def _one_run(records: Sequence[Record], load: Loader, method: str) -> Mapping[str, TaskOutcomes] | None:
    runs = sorted((record for record in records if record.method_name == method), key=lambda record: record.seed)
    return load(runs[0]) if runs else None


def routing_confusion(records: Sequence[Record], load: Loader) -> Any:
    """For each task, the share of prompts that each expert is strongest for, under ``dlp``; None if it was not run."""
    outcomes = _one_run(records, load, "dlp")
    routed = {task: routes for task, routes in _routes(outcomes or {}).items() if routes}
    if not routed:
        return None
    tasks = [task for task in records[0].suite_tasks if task in routed]
    first = {task: Counter(_strongest(route[0][1]) for route in routes) for task, routes in routed.items()}
    seen = {name for counts in first.values() for name in counts if name is not None}
    # Composites are answered by the experts of other tasks.
    experts = tasks if seen <= set(tasks) else sorted(seen)
    matrix = np.array([[first[task][name] / first[task].total() for name in experts] for task in tasks])
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 2.34 + 0.16 * len(tasks)))
    image = axes.imshow(100 * matrix, cmap="cividis", vmin=0, vmax=100)
    axes.set_xticks(range(len(experts)), [name.replace("_", " ") for name in experts], rotation=90, fontsize=7)
    axes.set_yticks(range(len(tasks)), [task.replace("_", " ") for task in tasks], fontsize=7)
    axes.set_xlabel("strongest expert")
    axes.set_ylabel("task of the prompt")
    figure.colorbar(image, ax=axes, label="prompts, %", shrink=0.8, fraction=0.046 * len(tasks) / len(experts))
    figure.tight_layout()
    return figure


def _strongest(weights: Mapping[str, float]) -> str | None:
    return max(weights, key=lambda name: weights[name]) if weights else None


def sentence_experts(records: Sequence[Record], load: Loader) -> Any:
    """How many experts a sentence is answered by, for the variants of DLP-LoRA; None if none was run."""
    names = [name for name in dict.fromkeys(record.method_name for record in records) if name.startswith("dlp")]
    counts: dict[str, Counter[int]] = {}
    for name in names:
        outcomes = _one_run(records, load, name)
        if outcomes is not None:
            counts[name] = Counter(len(weights) for routes in _routes(outcomes).values() for route in routes for _, weights in route)
    counts = {name: counter for name, counter in counts.items() if counter}
    if not counts:
        return None
    plt = pyplot()
    most = max(max(counter) for counter in counts.values())
    figure, axes = plt.subplots(figsize=(6, 3))
    width = 0.8 / len(counts)
    for index, (name, counter) in enumerate(counts.items()):
        total = sum(counter.values())
        heights = [100 * counter[number] / total for number in range(1, most + 1)]
        axes.bar(np.arange(1, most + 1) + (index - (len(counts) - 1) / 2) * width, heights, width, color=PALETTE[index], label=name)
    axes.set_xticks(range(1, most + 1))
    axes.set_xlabel("experts kept")
    axes.set_ylabel("sentences, %")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # next to the bars, which may fill the axes
    figure.tight_layout()
    return figure


def figures(
    records: Sequence[Record], load: Loader, sweeps: Sequence[SweepFile] = (), latency: LatencyColumns | None = None
) -> dict[str, Any]:
    """Figures that the records and sweeps have the numbers for, by name.

    Args:
        records: Newest of each method and seed, of one protocol and base model.
        load: Outcomes of a record.
        sweeps: Of the same suite and base model.
        latency: Ratios of the suite's bench record.
    """
    drawn: dict[str, Any] = {}
    if records:
        drawn["radar"] = radar(records)
        drawn["quality_against_latency"] = quality_against_latency(records, latency)
        drawn["routing_confusion"] = routing_confusion(records, load)
        drawn["experts_kept"] = sentence_experts(records, load)
    drawn |= {name: curves(sweeps) for name, curves in SWEEP_FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}
