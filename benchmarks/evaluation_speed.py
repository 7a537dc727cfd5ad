"""Questions per second compared with stock lm-eval and PEFT: ``python -m benchmarks.evaluation_speed``.

Stock: ``lm_eval --model hf --model_args pretrained=...,peft=...`` for each task with its own adapter, as PEFT users do. It runs in this
process with only our 26 tasks indexed, so that start-up, imports and the index of thousands of other tasks are not counted. lm-eval ends
every run with a list of the machine's packages, which takes longer than a small task; ``stock, no report`` leaves it out. Ours: one
evaluation of all 26 tasks per method, in one process, loading included. All without bootstrap, at the same batch size. ``plain`` is ours
with every option read separately and nothing shared. Times depend on the machine; no test asserts them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dlplora.cli.terminal import quiet_loading, split_names
from dlplora.evaluation.cache import EvalCache, eval_cache
from dlplora.evaluation.protocol import load_protocol
from dlplora.evaluation.runner import Artifacts, Run, evaluate_run, open_model, prepare
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


def stock(limit: int | None) -> dict[str, HarnessResult]:
    """Every task through lm-eval's own Hugging Face model with the task's adapter."""
    from lm_eval.evaluator import simple_evaluate

    manager = fast_task_manager()
    found = {}
    protocol = load_protocol("nano")
    for task in prepare(protocol, "nano", "base", 0).task_names:
        arguments = f"pretrained={nano_asset('backbone')},peft={nano_asset('pool') / task},dtype=float32"
        name = f"dlplora_nano_{task}"
        with redirect_stdout(sys.stderr):
            raw = simple_evaluate(
                model="hf", model_args=arguments, tasks=[name], num_fewshot=0, batch_size=protocol.batch_size, device="cpu",
                limit=limit, bootstrap_iters=0, task_manager=manager,
            )  # fmt: skip
        assert raw is not None
        found[task] = clean_results(dict(raw))
    return found


def run_of(method: str, limit: int | None) -> Run:
    """A run of the nano suite with the embedded artifacts of a preset."""
    roles = build_method(load_method_spec(method)).artifact_roles
    own = {role: nano_asset(f"trained/{method}" if role == "trained" else role) for role in roles}
    return prepare(load_protocol("nano"), "nano", method, 0, artifacts=Artifacts(others=own), limit=limit)


def ours(run: Run, cache: EvalCache | None, *, share: bool = True) -> HarnessResult:
    """One evaluation of all tasks, loading included."""
    with open_model(run, cache) as lm:
        lm._shares_prefix = lm._shares_prefix and share
        return evaluate_run(run, lm, cache)


def disagreements(one: HarnessResult, other: dict[str, HarnessResult]) -> list[str]:
    """Tasks in which a metric differs from stock by more than rounding."""
    found = []
    for task, result in other.items():
        name = f"dlplora_nano_{task}"
        if any(abs(value - one.results[name][metric]) > 1e-9 for metric, value in result.results[name].items()):
            found.append(task)
    return found


def measure(methods: Sequence[str], limit: int | None) -> dict[str, Any]:
    """All systems in one process."""
    warm_up = run_of("oracle", 1)
    stock(1)
    ours(warm_up, None)
    expected, whole = timed(lambda: stock(limit))
    rows: dict[str, Any] = {}
    scored: HarnessResult | None = None
    with eval_cache() as cache:
        for method in methods:
            run = run_of(method, limit)
            result, rows[method] = timed(partial(ours, run, cache))
            scored = result if method == "oracle" else scored
            num = sum(result.num_samples.values())
            rows[method]["questions_per_s"] = round(num / rows[method]["wall_s"], 1)
    run = run_of(methods[0], limit)
    _, plain = timed(lambda: ours(run, None, share=False))
    with without_environment_report():
        _, bare = timed(lambda: stock(limit))
    for row in (*rows.values(), plain):
        row["to_stock"] = round(row["wall_s"] / whole["wall_s"], 3)
        row["to_stock_without_report"] = round(row["wall_s"] / bare["wall_s"], 3)
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
    parser.add_argument("--limit", type=int, help="questions a task (default: all 100)")
    parser.add_argument("--out", type=Path, default=Path("results/bench/evaluation_speed.json"))
    arguments = parser.parse_args()
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
        **measure(methods, arguments.limit),
        "provenance": provenance(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    rows = {
        "stock lm_eval with PEFT, task by task": result["stock"],
        "the same without its report": result["stock_without_report"],
        **result["methods"],
        f"{methods[0]}, nothing shared": result["plain"],
    }
    header = ["system", "seconds", "questions / s", f"to stock (target {TARGET})", "to stock without report"]
    keys = ("wall_s", "questions_per_s", "to_stock", "to_stock_without_report")
    print(table(header, [[name, *(str(row.get(key, "")) for key in keys)] for name, row in rows.items()]))
    print(f"\n{len(methods)} methods together: {result['all_methods_s']} s (all 35: target {TARGET_ALL_S} s). {result['busy'] or ''}")


if __name__ == "__main__":
    main()
