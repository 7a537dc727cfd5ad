"""Evidence for the nano suite: base and expert on train, validation and test items, for several seeds of expert training.

    python -m tests.tools.nano_admission --pools runs/nano/pool runs/nano_seed1/pool runs/nano_seed2/pool

Writes ``results/nano_admission.json`` and the table in ``docs/nano_suite.md``. Scoring is independent of lm-eval: summed
log-likelihood of each option, exact match of a greedy line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dlplora.atomic import write_atomically
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.reporting import markdown
from dlplora.tasks.nano import nano_suite
from dlplora.tasks.types import SPLITS, Item, Task
from dlplora.types import PromptBatch

BEGIN, END = "<!-- dlplora:admission:begin -->", "<!-- dlplora:admission:end -->"


@torch.no_grad()
def score_choices(model: FusedCausalLM, items: Sequence[Item], batch_size: int = 128) -> float:
    """Share of items whose right option has the largest summed log-likelihood."""
    rows, owners = [], []
    for number, item in enumerate(items):
        prompt = model.tokenizer(item.prompt)["input_ids"]
        for choice in item.choices or ():
            rows.append((prompt, model.tokenizer(" " + choice, add_special_tokens=False)["input_ids"]))
            owners.append(number)
    scores: list[list[float]] = [[] for _ in items]
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        width = max(len(prompt) + len(option) for prompt, option in chunk)
        ids = torch.zeros((len(chunk), width), dtype=torch.long)
        for i, (prompt, option) in enumerate(chunk):
            ids[i, : len(prompt) + len(option)] = torch.tensor(prompt + option)
        logprobs = F.log_softmax(model(input_ids=ids).logits.float(), dim=-1)
        for i, (prompt, option) in enumerate(chunk):
            positions = torch.arange(len(prompt) - 1, len(prompt) + len(option) - 1)
            scores[owners[start + i]].append(float(logprobs[i, positions, torch.tensor(option)].sum()))
    return sum(max(range(len(row)), key=row.__getitem__) == item.gold for row, item in zip(scores, items, strict=True)) / len(items)


def score_text(model: FusedCausalLM, items: Sequence[Item]) -> float:
    """Share of items whose greedy first line is the answer."""
    prompts = PromptBatch.from_texts([item.prompt for item in items], model.tokenizer)
    ids = model.generate(prompts=prompts, max_new_tokens=48, do_sample=False)
    width = prompts.input_ids.shape[1]
    texts = model.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    return sum(text.split("\n")[0].strip() == item.answer for text, item in zip(texts, items, strict=True)) / len(items)


def evaluate(model: FusedCausalLM, task: Task, weights: torch.Tensor, num: int) -> dict[str, float]:
    """Score of one task on each split under fixed routing weights (E,)."""
    score = score_choices if task.kind == "mcq" else score_text
    with model.routing(weights):
        return {split: round(score(model, task.items(split, num)), 4) for split in SPLITS}


def measure(pools: Sequence[Path], num: int) -> list[dict[str, Any]]:
    """One row per task: chance, base on test, expert on each split for each pool."""
    suite = nano_suite()
    rows: dict[str, dict[str, Any]] = {}
    for task in suite.tasks:
        choices = task.items("test", 1)[0].choices
        rows[task.name] = {"task": task.name, "kind": task.kind, "chance": round(1 / len(choices), 4) if choices else 0.0, "experts": []}
    for seed, pool in enumerate(pools):
        model = FusedCausalLM.from_pretrained(None, pool=pool, method="base", device="cpu")
        for task in suite.tasks:
            if seed == 0:
                rows[task.name]["base"] = evaluate(model, task, torch.zeros(model.bank.num_experts), num)["test"]
            one_hot = F.one_hot(torch.tensor(model.bank.index(task.name)), model.bank.num_experts).float()
            rows[task.name]["experts"].append(evaluate(model, task, one_hot, num))
            print(
                f"seed {seed} {task.name}: base {rows[task.name]['base']}, expert {rows[task.name]['experts'][-1]}",
                file=sys.stderr,
                flush=True,
            )
        model.close()
    return list(rows.values())


def _spread(values: Sequence[float]) -> str:
    mean = 100 * sum(values) / len(values)
    low, high = 100 * min(values), 100 * max(values)
    return f"{mean:.1f}" if low == high else f"{mean:.1f} ({low:.1f}–{high:.1f})"


def table(rows: Sequence[dict[str, Any]], num: int) -> str:
    """The evidence as Markdown, with the means the suite is held to."""
    header = ["task", "kind", "chance", "base", *(f"expert, {split}" for split in SPLITS)]
    cells = [
        [row["task"], row["kind"], f"{100 * row['chance']:.1f}", f"{100 * row['base']:.1f}"]
        + [_spread([expert[split] for expert in row["experts"]]) for split in SPLITS]
        for row in rows
    ]
    lines = [markdown.table(header, cells, left=2)]
    for kind, label, bar in (("mcq", "multiple choice", 0.85), ("gen", "generation", 0.70)):
        chosen = [row for row in rows if row["kind"] == kind]
        tests = [sum(expert["test"] for expert in row["experts"]) / len(row["experts"]) for row in chosen]
        above = sum(value >= bar for value in tests)
        over = [row["task"] for row in chosen if row["base"] > row["chance"] + 0.10]
        lines.append("")
        lines.append(
            f"{label.capitalize()}: mean over {len(chosen)} tasks {100 * sum(tests) / len(tests):.1f} on test, {above} of {len(chosen)} "
            f"at or above {100 * bar:.0f}; base more than 10 points above chance: {', '.join(over) or 'none'}."
        )
    lines += [
        "",
        f"{num} items a split, {len(rows[0]['experts'])} seeds of expert training; "
        f"standard error of one cell at most {50 / num**0.5:.1f} points.",
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, then write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pools", type=Path, nargs="+", required=True, help="one pool folder per seed of expert training")
    parser.add_argument("--num", type=int, default=200, help="items a split")
    parser.add_argument("--json", type=Path, default=Path("results/nano_admission.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/nano_suite.md"))
    arguments = parser.parse_args()
    rows = measure(arguments.pools, arguments.num)
    write_atomically(arguments.json, json.dumps({"num": arguments.num, "torch": torch.__version__, "rows": rows}, indent=2) + "\n")
    text = arguments.page.read_text(encoding="utf-8")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    write_atomically(arguments.page, f"{head}{BEGIN}\n{table(rows, arguments.num)}\n{END}{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
