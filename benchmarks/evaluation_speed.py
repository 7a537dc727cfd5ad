"""Questions per second compared with stock lm-eval and PEFT: ``python -m benchmarks.evaluation_speed``.

Stock: ``lm_eval --model hf --model_args pretrained=...,peft=...`` for each task with its own adapter, as PEFT users do. It runs in this
process with only our 26 tasks indexed, so that start-up, imports and the index of thousands of other tasks are not counted. lm-eval ends
every run with a list of the machine's packages, which takes longer than a small task; ``stock, no report`` leaves it out. Ours: one
evaluation of all 26 tasks per method, in one process, loading included. All without bootstrap, at the same batch size. ``plain`` is ours
with every option read separately and nothing shared. Times depend on the machine; no test asserts them.

Nano, or another protocol: ``--protocol real26 --pool POOL --router ROUTER --data-root ROWS --methods oracle,dlp``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dlplora.cli.terminal import quiet_loading, split_names
from dlplora.evaluation.cache import EvalCache, eval_cache
from dlplora.evaluation.protocol import Protocol, load_protocol
from dlplora.evaluation.runner import Artifacts, Run, evaluate_run, open_model, prepare
from dlplora.inference.backbones import resolve_backbone
from dlplora.inference.loading import nano_asset
from dlplora.lm_eval.evaluate import HarnessResult, clean_results, fast_task_manager, without_environment_report
from dlplora.methods.registry import available_presets, build_method, load_method_spec
from dlplora.provenance import provenance
from dlplora.reporting.markdown import table

METHODS = ("oracle", "dlp", "arrow_out", "meteora_gate", "mole", "xlora")
TARGET = 0.5
TARGET_ALL_S = 480


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What ``work`` returns, and the seconds it took on the wall and on the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"wall_s": round(time.perf_counter() - wall, 3), "cpu_s": round(time.process_time() - cpu, 3)}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated: a protocol and its experts."""

    protocol: Protocol
    name: str
    pool: Path
    router: Path | None
    limit: int | None

    def run_of(self, method: str) -> Run:
        """A run with the embedded artifacts of a preset, or those that were named."""
        roles = build_method(load_method_spec(method)).artifact_roles
        if self.protocol.backbone is None:
            artifacts = Artifacts(others={role: nano_asset(f"trained/{method}" if role == "trained" else role) for role in roles})
        else:
            artifacts = Artifacts(pool=self.pool, router=self.router if "router" in roles else None)
        return prepare(self.protocol, self.name, method, 0, artifacts=artifacts, limit=self.limit)


def stock(subject: Subject, limit: int | None) -> dict[str, HarnessResult]:
    """Every task through lm-eval's own Hugging Face model with the task's adapter."""
    from lm_eval.evaluator import simple_evaluate

    protocol, run = subject.protocol, subject.run_of("oracle")
    manager = fast_task_manager(metadata={"data_root": protocol.data_root} if protocol.data_root else None)
    base = resolve_backbone(protocol.backbone)
    found = {}
    for task in run.task_names:
        arguments = f"pretrained={base},peft={subject.pool / task},dtype={run.protocol.dtype}"
        with redirect_stdout(sys.stderr):
            raw = simple_evaluate(
                model="hf", model_args=arguments, tasks=[run.prefix + task], num_fewshot=0, batch_size=protocol.batch_size, device="cpu",
                limit=limit, bootstrap_iters=0, task_manager=manager,
            )  # fmt: skip
        assert raw is not None
        found[run.prefix + task] = clean_results(dict(raw))
    return found


def ours(run: Run, cache: EvalCache | None, *, share: bool = True) -> HarnessResult:
    """One evaluation of all tasks, loading included."""
    with open_model(run, cache) as lm:
        lm._shares_prefix = lm._shares_prefix and share
        return evaluate_run(run, lm, cache)


def disagreements(one: HarnessResult, other: dict[str, HarnessResult]) -> list[str]:
    """Tasks in which a metric differs from stock by more than rounding."""
    return [
        name
        for name, result in other.items()
        if any(abs(value - one.results[name][metric]) > 1e-9 for metric, value in result.results[name].items())
    ]


def measure(methods: Sequence[str], subject: Subject) -> dict[str, Any]:
    """All systems in one process."""
    stock(subject, 1)
    ours(dataclasses.replace(subject, limit=1).run_of("oracle"), None)
    expected, whole = timed(lambda: stock(subject, subject.limit))
    rows: dict[str, Any] = {}
    scored: HarnessResult | None = None
    with eval_cache() as cache:
        for method in methods:
            result, rows[method] = timed(partial(ours, subject.run_of(method), cache))
            scored = result if method == "oracle" else scored
            num = sum(result.num_samples.values())
            rows[method]["questions_per_s"] = round(num / rows[method]["wall_s"], 1)
    run = subject.run_of(methods[0])
    _, plain = timed(lambda: ours(run, None, share=False))
    with without_environment_report():
        _, bare = timed(lambda: stock(subject, subject.limit))
    for row in (*rows.values(), plain):
        row["to_stock"] = round(row["wall_s"] / whole["wall_s"], 3)
        row["to_stock_without_report"] = round(row["wall_s"] / bare["wall_s"], 3)
        row["cpu_to_stock_without_report"] = round(row["cpu_s"] / bare["cpu_s"], 3)
    questions = sum(result.num_samples[name] for result in expected.values() for name in result.num_samples)
    return {
        "questions": questions,
        "stock": {**whole, "questions_per_s": round(questions / whole["wall_s"], 1)},
        "stock_without_report": {**bare, "questions_per_s": round(questions / bare["wall_s"], 1)},
        "plain": {"method": methods[0], **plain, "questions_per_s": round(questions / plain["wall_s"], 1)},
        "methods": rows,
        "all_methods_s": round(sum(row["wall_s"] for row in rows.values()), 1),
        "oracle_differs_from_stock_in": None if scored is None else disagreements(scored, expected),
    }


def main() -> None:
    """Measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated presets, or 'all'")
    parser.add_argument("--limit", type=int, help="questions per task (default: all 100)")
    parser.add_argument("--protocol", default="nano", metavar="NAME", help="of configs/protocol (default: nano)")
    parser.add_argument("--pool", type=Path, metavar="FOLDER", help="of another protocol than nano: one adapter per task")
    parser.add_argument("--router", type=Path, metavar="FOLDER", help="of another protocol than nano")
    parser.add_argument("--data-root", metavar="FOLDER")
    parser.add_argument(
        "--out", type=Path, help="default: results/bench/evaluation_speed.json, with the protocol's name in it if not nano's"
    )
    arguments = parser.parse_args()
    protocol = load_protocol(arguments.protocol, {"data_root": arguments.data_root} if arguments.data_root else {})
    nano = protocol.backbone is None
    if not nano and arguments.pool is None:
        parser.error("--pool is missing: the folder with one adapter for every task.")
    pool = nano_asset("pool") if nano else arguments.pool
    subject = Subject(protocol=protocol, name=arguments.protocol, pool=pool, router=arguments.router, limit=arguments.limit)
    out = arguments.out or Path(f"results/bench/evaluation_speed{'' if nano else f'-{arguments.protocol}'}.json")
    quiet_loading(None)
    methods = list(available_presets()) if arguments.methods == "all" else split_names(arguments.methods)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    result = {
        "benchmark": "evaluation_speed",
        "limit": arguments.limit,
        "threads": torch.get_num_threads(),
        "cores": cores,
        "load_before": round(load, 2),
        "busy": f"load {load:.1f} on {cores} cores before the start: times are not to be trusted" if load > 0.5 * cores else None,
        "protocol": arguments.protocol,
        **measure(methods, subject),
        "provenance": provenance(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    rows = {
        "stock lm_eval with PEFT, task by task": result["stock"],
        "the same without its report": result["stock_without_report"],
        **result["methods"],
        f"{methods[0]}, nothing shared": result["plain"],
    }
    header = ["system", "seconds", "questions / s", f"to stock (target {TARGET})", "to stock without report", "the same in CPU time"]
    keys = ("wall_s", "questions_per_s", "to_stock", "to_stock_without_report", "cpu_to_stock_without_report")
    print(table(header, [[name, *(str(row.get(key, "")) for key in keys)] for name, row in rows.items()]))
    print(f"\n{len(methods)} methods together: {result['all_methods_s']} s (all 35: target {TARGET_ALL_S} s). {result['busy'] or ''}")


if __name__ == "__main__":
    main()
