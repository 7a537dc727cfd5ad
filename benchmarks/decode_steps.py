"""One decode step on every backend, as a ratio to the base model: ``python -m benchmarks.decode_steps --write``.

The sizes of the nano model with random weights, 26 experts of rank 8 on the query and value projections. All systems are interleaved in one
process over the same base weights, in alternating order, so that other load affects all of them. Reported is the median over rounds of the
ratios, with quartiles. One thread; times are processor times of the process, which other processes hardly change.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dlplora.atomic import write_atomically
from dlplora.bench.model_shapes import share_weights
from dlplora.bench.op_cases import find_case, fused_stand_in
from dlplora.modules.routing_state import RoutingState
from dlplora.provenance import provenance
from dlplora.reporting.store import RESULTS
from dlplora.training.adapter_export import save_adapter
from dlplora.types import PromptBatch

PROMPT_TOKENS = 64
BACKENDS_TIMED = ("reference", "dense", "folded", "merged")


def _peft(fused: Any) -> Any:
    """PEFT with the first expert alone, unmerged, in the same dtype."""
    from peft import LoraConfig, PeftModel

    fused = share_weights(fused)  # with weights of its own it would always find them cold
    bank = fused.bank
    fused.close()
    tensors, rank = {}, bank.rank
    for path, entry in bank.modules.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = entry.lora_a[0]
        tensors[f"base_model.model.{path}.lora_B.weight"] = entry.lora_b[0]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder) / "one", config, tensors)
        return PeftModel.from_pretrained(fused.model, str(Path(folder) / "one"), autocast_adapter_dtype=False).eval()


def _step(model: Any, rows: int, bind: Callable[[], Any] | None = None) -> Callable[[], float]:
    """A call that times one decode step after a cache of 64 tokens, s."""
    ids = torch.arange(3, 3 + PROMPT_TOKENS).expand(rows, -1)
    state = bind() if bind is not None else None
    holder: dict[str, Any] = {}

    def call() -> float:
        if "cache" not in holder:
            holder["cache"] = model(input_ids=ids, use_cache=True).past_key_values
        start = time.process_time()
        model(input_ids=ids[:, -1:], past_key_values=holder["cache"], use_cache=True)
        seconds = time.process_time() - start
        holder["cache"].crop(-1)
        return seconds

    def bound() -> float:
        if state is None:
            return call()
        with model.routing(state):
            return call()

    return bound


@torch.no_grad()
def measure(rows: int, alike: bool, turns: int) -> dict[str, dict[str, float]]:
    """System -> median ratio to the bare base model with quartiles, ``rows`` prompts routed alike or each to its own expert."""
    calls: dict[str, Callable[[], float]] = {}
    with fused_stand_in("oracle", find_case("nano")) as fused:
        names = [fused.bank.names[0 if alike else row % fused.bank.num_experts] for row in range(rows)]
        prompts = PromptBatch.from_ids([[5, 6, 7]] * rows, fused.tokenizer, task_names=names)
        zeros = torch.zeros(fused.bank.num_experts)
        calls["base"] = _step(fused, rows, lambda: fused.request_router.state(zeros))
        for backend in BACKENDS_TIMED:
            if backend != "merged" or alike or rows == 1:
                fused.backend = backend
                calls[backend] = _step(fused, rows, lambda: fused.route(prompts))
        weights = fused.request_router.route(prompts)
        assert weights is not None
        # What is not the default: room for the five experts that dlp may keep, and B stored by output, which dense then copies.
        calls["folded, room for 5"] = _step(fused, rows, lambda: RoutingState(weights, "folded", width=5))
        copying = share_weights(fused)
        for layer in copying.patched.layers.values():
            layer.lora_b = layer.lora_b.contiguous()
        calls["dense, B copied"] = _step(copying, rows, lambda: RoutingState(weights, "dense"))
        if alike:
            calls["peft"] = _step(_peft(fused), rows)
        ratios: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(turns + 3):
            order = list(calls)[:: -1 if turn % 2 else 1]
            seconds = {name: calls[name]() for name in order}
            if turn >= 3:
                for name, value in seconds.items():
                    ratios[name].append(value / seconds["base"])
    found = {}
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] = {"ratio": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}
    return found


def main() -> None:
    """Measure, print, and write ``results/kernels/decode_steps.json`` if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = [
        {"rows": rows, "alike": alike, "ratios": measure(rows, alike, arguments.turns)}
        for rows, alike in ((1, True), (8, True), (8, False), (32, False))
    ]
    for cell in cells:
        print(json.dumps(cell))
    if arguments.write:
        path = RESULTS / "kernels" / "decode_steps.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "turns": arguments.turns,
            "prompt_tokens": PROMPT_TOKENS,
            "clock": "processor time, one thread",
            "cells": cells,
            "provenance": provenance(),
        }
        write_atomically(path, json.dumps(facts, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
