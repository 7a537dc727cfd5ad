"""Every task without its expert: ``python -m benchmarks.unseen_task run --suite real26 --pool DIR``, then ``report --suite real26``.

For each task its own adapter is removed from the pool; routers are trained again on the remaining tasks, and encoders read only their rows.
The method then answers the task's test questions. ``run`` writes its record after every task and continues after an interruption;
``report`` writes the table into ``docs/unseen_task.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.docs_table import with_table
from dlplora.atomic import write_atomically
from dlplora.errors import ConfigError
from dlplora.evaluation.cache import EvalCache, eval_cache
from dlplora.evaluation.protocol import Protocol, load_protocol
from dlplora.evaluation.runner import Artifacts, measure, prepare
from dlplora.inference.loading import nano_asset
from dlplora.methods.registry import build_method
from dlplora.provenance import provenance
from dlplora.reporting import markdown
from dlplora.reporting.samples import Outcome
from dlplora.reporting.store import RESULTS
from dlplora.reproduce import paper
from dlplora.reproduce.recipe import NANO, Setting
from dlplora.reproduce.training import assemble_pool, train

METHODS = ("base", "random_route", "avg_delta", "lorauter", "tfidf_linear", "dlp_top1", "dlp")
PAGE = Path("docs/unseen_task.md")


class Fold:
    """One task without its expert.

    Args:
        task: Its name.
        protocol: Of the suite.
        setting: What routers are trained over.
        pool: With all experts.
        folder: For the smaller pool, which is removed again, and the router, which stays.
    """

    def __init__(self, task: str, protocol: Protocol, setting: Setting, pool: Path, folder: Path) -> None:
        self.task, self.pool, self.folder = task, pool, folder
        self.protocol = dataclasses.replace(protocol, tasks=[task])
        self.others = tuple(name for name in setting.chosen().names if name != task)
        told = {"router": [f"--data.init_args.tasks={','.join(self.others)}"]} if setting.shipped else {}
        self.setting = dataclasses.replace(setting, tasks=None if setting.shipped else self.others, options={**setting.options, **told})

    def router(self) -> Path:
        """A router over the tasks that are left; trained once."""
        folder = self.folder / "router"
        return folder if (folder / "recipe.json").is_file() else train("router", self.folder, setting=self.setting)

    def scores(self, methods: Sequence[str], cache: EvalCache) -> dict[str, dict[str, Any]]:
        """Method -> score of the task, the adapter that most prompts prefer, and how many they keep."""
        smaller = self.folder / "pool"
        assemble_pool(dict.fromkeys(self.others, self.pool), smaller, self.others)
        try:
            return {method: self._score(method, smaller, cache) for method in methods}
        finally:
            shutil.rmtree(smaller)

    def _score(self, method: str, pool: Path, cache: EvalCache) -> dict[str, Any]:
        needs = build_method(method).artifact_roles
        artifacts = Artifacts(pool=pool, router=self.router() if "router" in needs else None)
        record, outcomes = measure(prepare(self.protocol, "unseen_task", method, 0, artifacts=artifacts), cache)
        row = record.tasks[self.task]
        metric = "acc" if row.kind == "mcq" else "exact_match"
        return {
            "kind": row.kind,
            "score": row.metrics[metric],
            "rougeL": row.metrics.get("rougeL"),
            "questions": len(outcomes),
            "kept": record.routing.get("mean_experts_kept"),
            "preferred": _preferred(outcomes),
        }


def _preferred(outcomes: Sequence[Outcome]) -> str | None:
    """The adapter with the largest weight for most questions; None where weights are none, equal or made inside the layers."""
    weights = [outcome.routing[0][1] for outcome in outcomes if outcome.routing and outcome.routing[0][1]]
    found = Counter(max(row, key=row.__getitem__) for row in weights if len(set(row.values())) > 1 or len(row) == 1)
    return found.most_common(1)[0][0] if found else None


def subject(suite: str, data_root: str | None, pool: Path | None) -> tuple[Protocol, Setting, Path]:
    """Protocol, setting and pool of ``nano``, or of a profile of ``dlplora reproduce``.

    Raises:
        ConfigError: If a profile's pool is not named.
    """
    if suite == "nano":
        return load_protocol("nano"), NANO, pool or nano_asset("pool")
    job = paper.resolve(suite, {"data_root": data_root} if data_root else {}, None, None, None)
    if pool is None:
        raise ConfigError("--pool is missing: the folder with the experts of all tasks.")
    return *job.over(*paper.backbone_folder(job)), pool


def run(arguments: argparse.Namespace) -> None:
    """Measure what the record lacks."""
    protocol, setting, pool = subject(arguments.suite, arguments.data_root, arguments.pool)
    path: Path = arguments.record
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"suite": arguments.suite, "scores": {}}
    methods = arguments.methods.split(",")
    with eval_cache() as cache:
        for task in arguments.tasks.split(",") if arguments.tasks else setting.chosen().names:
            done = record["scores"].setdefault(task, {})
            missing = [method for method in methods if method not in done]
            if missing:
                done |= Fold(task, protocol, setting, pool, arguments.runs / arguments.suite / task).scores(missing, cache)
                record["provenance"] = provenance()
                write_atomically(path, json.dumps(record, indent=1, sort_keys=True) + "\n")
                print(task, {name: round(100 * row["score"], 1) for name, row in done.items()}, file=sys.stderr, flush=True)


def table(record: dict[str, Any]) -> str:
    """Percent: means over tasks, then every task."""
    scores = record["scores"]
    methods = [name for name in METHODS if all(name in row for row in scores.values())]
    kinds = {task: next(iter(row.values()))["kind"] for task, row in scores.items()}

    def mean(name: str, kind: str | None) -> str:
        chosen = [row[name]["score"] for task, row in scores.items() if kind in (None, kinds[task])]
        return f"{100 * sum(chosen) / len(chosen):.1f}" if chosen else ""

    head = [["mean of all tasks", "", *(mean(name, None) for name in methods)]]
    for kind, title in (("mcq", "mean, multiple choice"), ("gen", "mean, generated")):
        head.append([title, kind, *(mean(name, kind) for name in methods)])
    rows = [[task, kinds[task], *(f"{100 * row[name]['score']:.1f}" for name in methods)] for task, row in scores.items()]
    return markdown.table(["task", "kind", *map(markdown.code, methods)], head + rows, left=2)


def suite_command(
    about: str | None,
    run: Callable[[argparse.Namespace], None],
    table: Callable[[dict[str, Any]], str],
    name: str,
    methods: Sequence[str],
    tasks: str,
) -> None:
    """Read the command line of a benchmark over a suite's pool; measure, or write the table into the page.

    Args:
        about: Help text.
        run: Fills the record at ``arguments.record``.
        table: Record -> Markdown.
        name: Of the record, ``results/bench/NAME-SUITE.json``, and of the default folder ``runs/NAME``.
        methods: Unless others are named.
        tasks: Help text of ``--tasks``.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("--suite", default="nano", help="nano, or a profile such as real26")
    parser.add_argument("--pool", type=Path, help="default for nano: the embedded one")
    parser.add_argument("--data-root")
    parser.add_argument("--tasks", help=tasks)
    parser.add_argument("--methods", default=",".join(methods))
    parser.add_argument("--runs", type=Path, default=Path("runs") / name)
    parser.add_argument("--out", default=str(RESULTS), metavar="DIR")
    arguments = parser.parse_args()
    arguments.record = Path(arguments.out) / "bench" / f"{name}-{arguments.suite}.json"
    if arguments.action == "run":
        run(arguments)
        return
    text, record = PAGE.read_text(encoding="utf-8"), json.loads(arguments.record.read_text(encoding="utf-8"))
    write_atomically(PAGE, with_table(text, f"{name}-{arguments.suite}", table(record)))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    suite_command(__doc__, run, table, "unseen_task", METHODS, "some tasks, separated by commas; the record keeps those it has")
