"""One more expert: ``python -m benchmarks.added_task run --suite nano`` then ``report --suite nano``.

A pool of all tasks but one gets the last expert. For each method the record holds the score of the old tasks before and after, the score of
the new one after, and what the addition costs: seconds of training the router again on all tasks, and of building the method.
``run`` writes its record after every task and continues after an interruption; ``report`` writes the table into ``docs/unseen_task.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.unseen_task import subject, suite_command
from dlplora.atomic import write_atomically
from dlplora.evaluation.cache import EvalCache, eval_cache
from dlplora.evaluation.protocol import Protocol
from dlplora.evaluation.runner import Artifacts, measure, prepare
from dlplora.methods.registry import build_method
from dlplora.provenance import provenance
from dlplora.reporting import markdown
from dlplora.reproduce.artifacts import RECIPE
from dlplora.reproduce.recipe import Setting
from dlplora.reproduce.training import train
from dlplora.reproduce.unseen import pool_without, setting_without

METHODS = ("dlp", "tfidf_linear", "logreg", "knn_minilm", "lorauter", "retriever_mixture")
NEW_TASKS = 4
"""Tasks that are added, one at a time, unless some are named: evenly spread over the suite."""


class Addition:
    """A task that is added to a pool of all others.

    Args:
        task: Its name.
        protocol: Of the suite.
        setting: What routers are trained over.
        pool: With all experts.
        router: Trained on all tasks.
        folder: For the router without the task and the smaller pool.
    """

    def __init__(self, task: str, protocol: Protocol, setting: Setting, pool: Path, router: Path, folder: Path) -> None:
        self.task, self.protocol, self.setting, self.folder = task, protocol, setting, folder
        self.pool, self.router = pool, router
        self.old = [name for name in setting.chosen().names if name != task]

    def costs(self, methods: Sequence[str], cache: EvalCache) -> dict[str, dict[str, Any]]:
        """Method -> scores before and after, and the seconds that building it took after."""
        smaller = pool_without(self.pool, [self.task], self.folder)
        try:
            return {method: self._cost(method, smaller, cache) for method in methods}
        finally:
            shutil.rmtree(smaller)

    def _cost(self, method: str, smaller: Path, cache: EvalCache) -> dict[str, Any]:
        routed = "router" in build_method(method).artifact_roles
        without = self.folder / "router" if routed else None
        if without is not None and not (without / RECIPE).is_file():
            train("router", self.folder, setting=setting_without(self.setting, [self.task]))
        before, _ = self._scores(method, smaller, without, self.old, cache)
        after, build_s = self._scores(method, self.pool, self.router if routed else None, [*self.old, self.task], cache)
        new = after.pop(self.task)
        means = {name: sum(scores.values()) / len(scores) for name, scores in (("old_before", before), ("old_after", after))}
        return {**means, "new_after": new, "build_s": build_s, "trained": routed}

    def _scores(self, method: str, pool: Path, router: Path | None, tasks: list[str], cache: EvalCache) -> tuple[dict[str, float], float]:
        """Score of each task, and seconds of building the method."""
        protocol = dataclasses.replace(self.protocol, tasks=tasks)
        record, _ = measure(prepare(protocol, "added_task", method, 0, artifacts=Artifacts(pool=pool, router=router)), cache)
        scores = {name: row.metrics["acc" if row.kind == "mcq" else "exact_match"] for name, row in record.tasks.items()}
        return scores, record.timings_s["load"]


def run(arguments: argparse.Namespace) -> None:
    """Measure what the record lacks."""
    protocol, setting, pool = subject(arguments.suite, arguments.data_root, arguments.pool)
    path: Path = arguments.record
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"suite": arguments.suite, "costs": {}}
    folder = arguments.runs / arguments.suite
    if "train_s" not in record or not (folder / "router" / RECIPE).is_file():
        start = time.perf_counter()
        train("router", folder, setting=setting)
        record["train_s"] = time.perf_counter() - start
    names = list(setting.chosen().names)
    chosen = arguments.tasks.split(",") if arguments.tasks else [names[i * len(names) // NEW_TASKS] for i in range(NEW_TASKS)]
    for task in chosen:
        done = record["costs"].setdefault(task, {})
        missing = [method for method in arguments.methods.split(",") if method not in done]
        if missing:
            # A separate cache: what one task has encoded or loaded must not make the next one faster.
            with eval_cache() as cache:
                done |= Addition(task, protocol, setting, pool, folder / "router", folder / task).costs(missing, cache)
            record["provenance"] = provenance()
            write_atomically(path, json.dumps(record, indent=1, sort_keys=True) + "\n")
            print(task, done, file=sys.stderr, flush=True)


def table(record: dict[str, Any]) -> str:
    """Mean scores over the added tasks in percent, and the median of the seconds, which other work on the machine moves less."""
    costs = list(record["costs"].values())
    rows = []
    for method in METHODS:
        found = [row[method] for row in costs if method in row]
        if len(found) != len(costs):
            continue

        def percent(key: str, found: list[dict[str, Any]] = found) -> str:
            return f"{100 * fmean(row[key] for row in found):.1f}"

        built = f"{median(row['build_s'] for row in found):.1f}"
        trained = f"{record['train_s']:.1f}" if found[0]["trained"] else ""
        rows.append([markdown.code(method), percent("old_before"), percent("old_after"), percent("new_after"), trained, built])
    head = ["method", "old tasks before", "old tasks after", "new task", "training again (s)", "building (s)"]
    return markdown.table(head, rows, left=1)


if __name__ == "__main__":
    suite_command(
        __doc__, run, table, "added_task", METHODS, f"added one at a time, separated by commas; default: {NEW_TASKS} of the suite"
    )
