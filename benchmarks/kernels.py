"""Measure the backends and fit the cost model of ``backend=auto``: ``python -m benchmarks.kernels --device cpu --write``.

At every point of a grid of sizes, all backends are timed interleaved in one process: one forward pass of one layer's delta, and writing its
buffers (``plan`` in the file). Eight layers are used in turn, so that factors do not stay in the innermost caches. Three constants per
backend (seconds per launch, per byte, per floating point operation) are fitted to the medians by non-negative least squares of the relative
errors. On a CPU one thread is used, and times are processor times of the process, which other processes hardly change. Without ``--write``
nothing is changed; the output says how well the model predicts and what its choices cost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from dlplora.atomic import write_atomically
from dlplora.kernels import cost_model, dense
from dlplora.kernels.backends import AUTOMATIC, triton_obstacle
from dlplora.kernels.cost_model import LayerShape, Terms
from dlplora.kernels.folded import FoldedBuffers, kept_first
from dlplora.kernels.merged import MergedBuffers
from dlplora.provenance import provenance

LAYERS = 8
RANK = 8
SIZES = ((128, 128), (896, 128), (1536, 1536))
ROWS, TOKENS, EXPERTS, KEPT = (1, 8, 32), (1, 16, 128), (2, 26, 200), (1, 2, 5)


def points() -> list[dict[str, int]]:
    """The grid; what no model would run (too many positions, more kept than there are) is left out."""
    grid = itertools.product(SIZES, ROWS, TOKENS, EXPERTS, KEPT)
    keys = ("d_in", "d_out", "rows", "tokens", "experts", "width")
    found = [dict(zip(keys, (*size, *rest), strict=True)) for size, *rest in grid]
    return [point for point in found if point["width"] <= point["experts"] and point["rows"] * point["tokens"] <= 1024]


def _calls(point: dict[str, int], dtype: torch.dtype, device: str) -> dict[tuple[str, str], Callable[[int], Any]]:
    """(backend, "step" or "plan") -> a call on the i-th layer."""
    b, e, k = point["rows"], point["experts"], point["width"]
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    x = torch.randn(b, point["tokens"], point["d_in"], **options)
    lora_a = [torch.randn(e, RANK, point["d_in"], **options) for _ in range(LAYERS)]
    lora_b = [torch.randn(e, RANK, point["d_out"], **options).mT for _ in range(LAYERS)]
    weights = torch.zeros(b, e, device=device).scatter_(1, torch.rand(b, e, device=device).topk(k).indices, 1.0 / k)
    scaling = torch.ones(e, device=device)
    folded = [FoldedBuffers(b, k, *factors) for factors in zip(lora_a, lora_b, strict=True)]
    bases = [torch.nn.Linear(point["d_in"], point["d_out"], bias=False, **options) for _ in range(LAYERS)]
    merged = [MergedBuffers(base, k) for base in bases]
    calls: dict[tuple[str, str], Callable[[int], Any]] = {
        ("dense", "step"): lambda i: dense.fused_delta(x, lora_a[i], lora_b[i], weights * scaling),
        ("folded", "step"): lambda i: folded[i].delta(x),
        ("folded", "plan"): lambda i: folded[i].write(lora_a[i], lora_b[i], weights),
        ("merged", "plan"): lambda i: merged[i].write(lora_a[i], lora_b[i], kept_first(weights, k)),
    }
    if triton_obstacle(device) is None and device == "cuda":
        from dlplora.kernels.grouped import GroupedBuffers

        grouped = [GroupedBuffers(b, k, one) for one in lora_a]
        calls["triton", "plan"] = lambda i: grouped[i].write(kept_first(weights, k))
        calls["triton", "step"] = lambda i: grouped[i].delta(x, lora_a[i], lora_b[i])
        for buffers in grouped:
            buffers.write(kept_first(weights, k))
    return calls


@torch.no_grad()
def measure(point: dict[str, int], dtype: torch.dtype, device: str, repeats: int) -> list[dict[str, Any]]:
    """Median seconds a layer of every call; the calls take turns."""
    calls = _calls(point, dtype, device)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    clock = time.perf_counter if device == "cuda" else time.process_time
    for turn in range(repeats + 1):
        for key, call in calls.items():
            synchronize()
            start = clock()
            for layer in range(LAYERS):
                call(layer)
            synchronize()
            if turn:  # the first turn warms up
                seconds[key].append((clock() - start) / LAYERS)
    return [
        {**point, "backend": backend, "what": what, "seconds": round(statistics.median(times), 9)}
        for (backend, what), times in seconds.items()
    ]


def _terms(sample: dict[str, Any], itemsize: int) -> Terms:
    layer = LayerShape(sample["d_in"], sample["d_out"], sample["experts"], RANK)
    if sample["what"] == "plan":
        return cost_model.write_terms(sample["backend"], layer, sample["rows"], sample["width"], itemsize)
    return cost_model.step_terms(sample["backend"], layer, sample["rows"], sample["rows"], sample["tokens"], sample["width"], itemsize)


def fit(samples: list[dict[str, Any]], itemsize: int) -> dict[str, dict[str, float]]:
    """Constants a backend, by least squares of relative errors under the bound zero."""
    found = {}
    for backend in sorted({sample["backend"] for sample in samples}):
        mine = [sample for sample in samples if sample["backend"] == backend]
        amounts = np.array([[t.launches, t.nbytes, t.flops] for t in (_terms(sample, itemsize) for sample in mine)])
        scale = amounts.max(axis=0) + 1e-30
        times = np.array([sample["seconds"] for sample in mine])
        solution, _ = nnls(amounts / scale / times[:, None], np.ones(len(times)))
        found[backend] = dict(zip(("launch_s", "byte_s", "flop_s"), (float(f"{value:.4g}") for value in solution / scale), strict=True))
    return found


def quality(samples: list[dict[str, Any]], constants: dict[str, dict[str, float]], itemsize: int) -> dict[str, float]:
    """How well the constants predict, and what choosing a step's backend by them costs against always choosing right."""
    errors: list[float] = []
    cases: dict[tuple[int, ...], dict[str, tuple[float, float]]] = {}
    for sample in samples:
        known, t = constants[sample["backend"]], _terms(sample, itemsize)
        predicted = known["launch_s"] * t.launches + known["byte_s"] * t.nbytes + known["flop_s"] * t.flops
        errors.append(abs(predicted / sample["seconds"] - 1))
        if sample["what"] == "step" and sample["backend"] in AUTOMATIC:
            key = tuple(sample[name] for name in ("d_in", "d_out", "rows", "tokens", "experts", "width"))
            cases.setdefault(key, {})[sample["backend"]] = (predicted, sample["seconds"])
    ratios: dict[str, list[float]] = {name: [] for name in ("choices", *AUTOMATIC)}
    for options in cases.values():
        fastest = min(seconds for _, seconds in options.values())
        ratios["choices"].append(min(options.values())[1] / fastest)
        for name in AUTOMATIC:
            ratios[name].append(options[name][1] / fastest)
    return {
        "median_relative_error": round(statistics.median(errors), 3),
        "right_choices": round(sum(ratio == 1.0 for ratio in ratios["choices"]) / len(cases), 3),
        **{f"mean_time_over_best_{name}": round(statistics.mean(values), 3) for name, values in ratios.items()},
    }


def main() -> None:
    """Measure, fit, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="make the result the cost model of the device")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the cost model here instead of into the package")
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    samples = [sample for point in points() for sample in measure(point, dtype, arguments.device, arguments.repeats)]
    constants = fit(samples, dtype.itemsize)
    found = quality(samples, constants, dtype.itemsize)
    print(json.dumps({"constants": constants, "fit": found}, indent=1))
    target = arguments.out or (cost_model.CONSTANTS if arguments.write else None)
    if target is None:
        return
    known = json.loads(cost_model.CONSTANTS.read_text(encoding="utf-8"))
    facts = provenance()
    columns = ("backend", "what", "d_in", "d_out", "rows", "tokens", "experts", "width", "seconds")
    known["devices"][arguments.device] = {
        "constants": constants, "fit": found, "dtype": str(dtype).removeprefix("torch."), "rank": RANK, "repeats": arguments.repeats,
        "clock": "processor time, one thread" if arguments.device == "cpu" else "wall, synchronised",
        "git": facts["git"], "versions": facts["versions"], "hardware": facts["hardware"], "columns": columns,
        "samples": [[sample[column] for column in columns] for sample in samples],
    }  # fmt: skip
    text = json.dumps(known, indent=1)
    text = text.replace("[\n     ", "[").replace("\n    ]", "]").replace(",\n     ", ", ")  # a sample a line
    write_atomically(target, text + "\n")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
