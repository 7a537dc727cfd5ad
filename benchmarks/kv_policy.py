"""Effect of ``kv_policy`` on nano, in logits, score and time: ``python -m benchmarks.kv_policy run``, then ``report``.

``single``: the eight generation tasks, one question per prompt, method ``dlp`` (view ``tail``). ``concat_3``: composites, view ``segment``.
Logits are compared at the first token after a row's first re-route that changed its weights, where all policies have seen the same tokens.
Times are of the same prompts with a fixed number of new tokens, the policies interleaved in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dlplora.adapters.pool import load_pool
from dlplora.atomic import write_atomically
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.kv_policy import KV_POLICIES
from dlplora.lm_eval.answer_form import AnswerForm
from dlplora.provenance import provenance
from dlplora.reporting.store import RESULTS
from dlplora.tasks.composite import composite_row, composites
from dlplora.tasks.composite_metrics import composite_metrics
from dlplora.tasks.registry import get_suite

VIEWS = {"single": "tail", "concat_3": "segment"}
NEW_TOKENS = {"single": 24, "concat_3": 54}
PER_TASK, NUM_COMPOSITES, BATCH = 25, 100, 50


def documents(setting: str) -> list[dict[str, Any]]:
    """Prompts, forms and answers of one setting."""
    suite = get_suite("nano")
    if setting == "single":
        tasks = [task for task in suite.tasks if task.kind == "gen"]
        return [{"question": item.prompt, "answer": item.answer} for task in tasks for item in task.items("test", PER_TASK)]
    return [composite_row(one) for one in composites(suite, "concat", int(setting.removeprefix("concat_")), NUM_COMPOSITES)]


def score(doc: dict[str, Any], text: str) -> float:
    """Exact match of one document."""
    if "parts" in doc:
        return float(composite_metrics(doc, [text])["exact_match"])
    return float(text.split("\n")[0].strip() == doc["answer"])


def generate(fused: FusedCausalLM, docs: Sequence[dict[str, Any]], new_tokens: int, *, fixed: bool, trace: list[Any] | None) -> Any:
    """One batch, greedily; ``fixed`` generates exactly ``new_tokens``."""
    texts = [doc["question"] for doc in docs]
    width = max(len(fused.tokenizer(text)["input_ids"]) for text in texts)
    forms = [tuple(doc["answer_form"]) if doc.get("answer_form") else None for doc in docs]
    options: dict[str, Any] = {"logits_processor": [AnswerForm(forms, fused.tokenizer, width)]} if any(forms) else {}
    if fixed:
        options |= {"eos_token_id": None}
    return fused.generate(
        texts, max_new_tokens=new_tokens, do_sample=False, trace=trace, output_logits=True, return_dict_in_generate=True, **options
    )


def first_changes(fused: FusedCausalLM, trace: Sequence[dict[str, Any]], new: torch.Tensor) -> dict[int, int]:
    """Row -> tokens generated when its weights first changed."""
    weights_of: dict[int, dict[str, float]] = {}
    found: dict[int, int] = {}
    for entry in trace:
        row = entry["row"]
        if row not in found and row in weights_of and weights_of[row] != entry["weights"]:
            ids = new[row].tolist()
            ends = (len(fused.tokenizer.decode(ids[:k], skip_special_tokens=True)) for k in range(len(ids) + 1))
            found[row] = next(k for k, end in enumerate(ends) if end >= entry["at"])
        weights_of[row] = entry["weights"]
    return found


def measure(setting: str, repeats: int) -> dict[str, Any]:
    """All policies in one setting."""
    view, new_tokens = VIEWS[setting], NEW_TOKENS[setting]
    docs = documents(setting)
    models = {
        policy: FusedCausalLM.from_pretrained(method="dlp", method_params={"view": view, "kv_policy": policy}, device="cpu")
        for policy in KV_POLICIES
    }
    batches = [docs[i : i + BATCH] for i in range(0, len(docs), BATCH)]
    scores: dict[str, list[float]] = {policy: [] for policy in KV_POLICIES}
    differences: dict[str, list[tuple[float, float, bool]]] = {policy: [] for policy in KV_POLICIES}
    num_reroutes = 0
    for batch in batches:
        at: dict[int, int] = {}
        logits: dict[str, dict[int, torch.Tensor]] = {}
        for policy, fused in models.items():
            trace: list[dict[str, Any]] = []
            out = generate(fused, batch, new_tokens, fixed=False, trace=trace)
            new = out.sequences[:, -len(out.logits) :]
            if policy == "stale":
                at = {row: k for row, k in first_changes(fused, trace, new).items() if k < len(out.logits)}
                num_reroutes += sum(entry["sentence_idx"] > 0 for entry in trace)
            logits[policy] = {row: out.logits[k][row] for row, k in at.items()}
            said = [fused.tokenizer.decode(row, skip_special_tokens=True) for row in new.tolist()]
            scores[policy] += [score(doc, text) for doc, text in zip(batch, said, strict=True)]
        for policy in KV_POLICIES:
            for row in at:
                gap = (logits[policy][row] - logits["stale"][row]).abs()
                same = bool(logits[policy][row].argmax() == logits["stale"][row].argmax())
                differences[policy].append((float(gap.max()), float(gap.mean()), same))
    times = timings(models, batches[0], new_tokens, repeats)
    return {
        "view": view,
        "num_prompts": len(docs),
        "num_reroutes_stale": num_reroutes,
        "num_compared": len(differences["stale"]),
        "new_tokens_timed": new_tokens,
        "policies": {policy: _summary(scores[policy], differences[policy], times, policy) for policy in KV_POLICIES},
    }


def timings(models: dict[str, FusedCausalLM], batch: Sequence[dict[str, Any]], new_tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of one batch of a fixed number of tokens, the policies interleaved, the first round thrown away."""
    seconds: dict[str, list[float]] = {policy: [] for policy in models}
    for turn in range(repeats + 1):
        for policy, fused in models.items():
            start = time.perf_counter()
            generate(fused, batch, new_tokens, fixed=True, trace=None)
            if turn:
                seconds[policy].append(time.perf_counter() - start)
    return seconds


def _summary(
    scores: Sequence[float], gaps: Sequence[tuple[float, float, bool]], times: dict[str, list[float]], policy: str
) -> dict[str, Any]:
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "exact_match": sum(scores) / len(scores),
        "max_abs_logit_change": max((gap for gap, _, _ in gaps), default=None),
        "mean_max_abs_logit_change": statistics.mean(gap for gap, _, _ in gaps) if gaps else None,
        "mean_abs_logit_change": statistics.mean(gap for _, gap, _ in gaps) if gaps else None,
        "same_next_token": statistics.mean(same for _, _, same in gaps) if gaps else None,
        "seconds": [round(value, 4) for value in times[policy]],
        "time_ratio": middle[policy] / middle["stale"],
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default=str(RESULTS), metavar="DIR")
    arguments = parser.parse_args()
    root = Path(arguments.out)
    record = root / "bench" / "kv_policy.json"
    if arguments.action == "run":
        from dlplora.inference.loading import nano_asset

        result: dict[str, Any] = {"backbone": "nano", "pool": load_pool(nano_asset("pool")).checksum(), "batch": BATCH, "settings": {}}
        for setting in VIEWS:
            print(f"{setting} …", file=sys.stderr, flush=True)
            result["settings"][setting] = measure(setting, arguments.repeats)
        result |= {"threads": torch.get_num_threads(), "provenance": provenance()}
        write_atomically(record, json.dumps(result, indent=2) + "\n")
        print(record)
    else:
        from dlplora.reporting.composite_tables import write_kv_policy

        print(f"wrote {write_kv_policy(record, root / 'tables' / 'kv_policy.md')}")


if __name__ == "__main__":
    main()
