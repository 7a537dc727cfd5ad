"""Prompts for which a router keeps several adapters: what each method answers there and elsewhere. Only there are adapters fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dlplora.reporting.comparison import MAIN_METRIC, Loader, Scores
from dlplora.reporting.markdown import code, table
from dlplora.reporting.schema import Record

FEWEST = 20
"""Fewest prompts for a comparison."""


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """Where one method keeps several adapters."""

    method: str
    num_prompts: int
    num_several: int
    """Over all seeds of the method."""
    tasks: tuple[str, ...]
    """Tasks with these prompts."""
    right: Mapping[str, tuple[float, float]]
    """Method -> share of right answers where several are kept, and where one is; over the seeds that both methods have."""
    changed: Mapping[str, tuple[int, int]]
    """Method -> prompts with several kept that it has right and ``method`` wrong, and the other way round."""


def find_doubt(records: Sequence[Record], scores: Scores, load: Loader, method: str) -> Doubt | None:
    """Compare all methods on the prompts for which one of them keeps several adapters at first; None if there are hardly any.

    Args:
        records: Of one table.
        scores: Their outcomes.
        load: Gives the outcomes of a record with its routing.
        method: Whose routing counts.

    Raises:
        RecordError: If a column of routing is damaged.
    """
    kept: dict[int, dict[str, NDArray[np.bool_]]] = {}
    for record in records:
        if record.method_name == method and method in scores.methods and record.routing.get("fraction_multi"):
            outcomes = load(record) or {}
            kept[scores.seeds.index(record.seed)] = {
                task: np.array([text is not None and len(one.parsed_routing(text)[0][1]) > 1 for text in one.routing])
                for task, one in outcomes.items()
            }
    several = sum(int(mask.sum()) for masks in kept.values() for mask in masks.values())
    if several < FEWEST:
        return None
    own = scores.methods.index(method)
    right, changed = {}, {}
    for place, name in enumerate(scores.methods):
        parts = [
            (scores.values[task][MAIN_METRIC[kind]][:, [place, own], seed], masks[task])
            for seed, masks in kept.items()
            if scores.ran[place, seed]
            for task, kind in scores.kinds.items()
        ]
        if parts:
            values, mask = np.concatenate([one for one, _ in parts]), np.concatenate([one for _, one in parts])
            here = values[mask]
            right[name] = (float(here[:, 0].mean()), float(values[~mask, 0].mean()))
            changed[name] = (int((here[:, 0] > here[:, 1]).sum()), int((here[:, 0] < here[:, 1]).sum()))
    return Doubt(
        method=method,
        num_prompts=sum(len(mask) for masks in kept.values() for mask in masks.values()),
        num_several=several,
        tasks=tuple(task for task in scores.kinds if any(masks[task].any() for masks in kept.values())),
        right=right,
        changed=changed,
    )


def doubt_table(doubt: Doubt) -> str:
    """A sentence and one row per method, best first."""
    where = ", ".join(map(code, doubt.tasks)) if len(doubt.tasks) < 6 else f"{len(doubt.tasks)} tasks"
    told = (
        f"{code(doubt.method)} keeps several adapters for {doubt.num_several} of {doubt.num_prompts} prompts "
        f"({100 * doubt.num_several / doubt.num_prompts:.1f} %), in {where}. Right answers in percent, all prompts alike; not tested."
    )
    rows = [
        [
            code(name),
            f"{100 * here:.1f}",
            f"{100 * there:.1f}",
            *(f"{count}" if name != doubt.method else "" for count in doubt.changed[name]),
        ]
        for name, (here, there) in sorted(doubt.right.items(), key=lambda pair: -pair[1][0])
    ]
    head = ["method", "several are kept", "one is kept", f"of the several: right, {code(doubt.method)} wrong", "the other way round"]
    return f"{told}\n\n{table(head, rows)}"
