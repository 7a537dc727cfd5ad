"""Evidence for the real26 suite: every candidate's expert is trained by the project and scored by PEFT and transformers alone.

    python -m tests.tools.real_admission --data-root ROWS [--tasks NAME,NAME]
    python -m tests.tools.real_admission --table          # from the file that is there

Writes ``results/real26_admission.json`` after every task, so that an interrupted run continues, and the table in ``docs/real26_suite.md``.
Options are scored by their summed log-likelihood; answers are greedy lines.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dlplora.atomic import write_atomically
from dlplora.inference.backbones import resolve_backbone
from dlplora.reporting import markdown
from dlplora.reproduce.recipe import Setting
from dlplora.reproduce.training import train
from dlplora.tasks.paper.judging import judged
from dlplora.tasks.real import NUM_TEST, real_suite, source_of
from dlplora.tasks.text_metrics import text_metrics
from dlplora.tasks.types import Item, Task

BACKBONE = "smollm2-135m"
RESULTS = Path("results/real26_admission.json")
PAGE = Path("docs/real26_suite.md")
BEGIN, END = "<!-- dlplora:admission:begin -->", "<!-- dlplora:admission:end -->"
GAIN = {"mcq": 5.0, "gen": 10.0}
"""Points by which an expert must beat the better of base model and majority answer."""
LEVEL = 0.05


@torch.no_grad()
def score_choices(model: Any, tokenizer: Any, items: Sequence[Item]) -> list[float]:
    """1 for each item whose right option has the largest summed log-likelihood, else 0; a prompt is computed once for its options."""
    hits = []
    for item in items:
        prompt = torch.tensor([tokenizer(item.prompt)["input_ids"]])
        options = [tokenizer(" " + choice, add_special_tokens=False)["input_ids"] for choice in item.choices or ()]
        width = max(map(len, options))
        ids = torch.tensor([option + [0] * (width - len(option)) for option in options])
        first = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(options))
        rest = model(input_ids=ids, past_key_values=cache, attention_mask=torch.ones(len(options), prompt.shape[1] + width)).logits
        logits = torch.cat([first.logits.expand(len(options), 1, -1), rest[:, :-1]], dim=1)
        logprobs = F.log_softmax(logits.float(), dim=-1).gather(2, ids[:, :, None])[:, :, 0]
        scores = [float(logprobs[i, : len(option)].sum()) for i, option in enumerate(options)]
        hits.append(float(max(range(len(scores)), key=scores.__getitem__) == item.gold))
    return hits


@torch.no_grad()
def generate(model: Any, tokenizer: Any, items: Sequence[Item], max_new_tokens: int, several_lines: bool, batch: int = 30) -> list[str]:
    """The greedy answer to each item, up to the first newline unless answers have several lines."""
    tokenizer.padding_side = "left"
    texts = []
    for start in range(0, len(items), batch):
        encoded = tokenizer([item.prompt for item in items[start : start + batch]], return_tensors="pt", padding=True)
        stops: dict[str, Any] = {} if several_lines else {"stop_strings": ["\n"], "tokenizer": tokenizer}
        made = model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id, **stops)
        answers = tokenizer.batch_decode(made[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        texts += [answer.strip() if several_lines else answer.split("\n")[0].strip() for answer in answers]
    return texts


def score(model: Any, tokenizer: Any, task: Task, items: Sequence[Item]) -> dict[str, Any]:
    """Right or wrong for every item, and the mean ROUGE-L of generated answers."""
    if task.kind == "mcq":
        return {"hits": score_choices(model, tokenizer, items)}
    source = source_of(task.name)
    judge, length, several = (source.judge, source.max_new_tokens, source.several_lines) if source else ("exact", 32, False)
    texts = generate(model, tokenizer, items, length, several)
    rouge = [text_metrics({"answer": item.answer}, [text])["rougeL"] for item, text in zip(items, texts, strict=True)]
    hits = [float(judged(judge, item.answer, text)) for item, text in zip(items, texts, strict=True)]
    return {"hits": hits, "rougeL": sum(rouge) / len(rouge)}


def facts(task: Task, items: Sequence[Item]) -> dict[str, Any]:
    """What a guess could reach on these items, and what they were drawn from."""
    chance = sum(1 / len(item.choices) for item in items if item.choices) / len(items)
    majority = Counter(item.answer for item in items).most_common(1)[0][1] / len(items)
    return {
        "task": task.name,
        "kind": task.kind,
        "block": "public" if task.facts else "skills",
        "num_test": len(items),
        "num_train": len(task.rows["train"]) if task.facts else None,
        "left_out": dict(task.facts.get("left_out", {})),
        "chance": round(chance, 4),
        "majority": round(majority, 4),
    }


def measure(task: Task, setting: Setting, runs: Path, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Train one expert and score it and the base model on the test items."""
    from peft import PeftModel

    start = time.monotonic()
    pool = train("pool", runs / task.name, setting=setting)
    trained = time.monotonic()
    items = task.items("test", NUM_TEST)
    row = facts(task, items)
    base = score(model, tokenizer, task, items)
    adapted = PeftModel.from_pretrained(model, pool / task.name)
    adapted.eval()
    try:
        expert = score(adapted, tokenizer, task, items)
    finally:
        adapted.unload()
    note = json.loads((pool / "training.json").read_text(encoding="utf-8"))
    return row | {
        "base": base,
        "expert": expert,
        "steps": note["steps"],
        "tokens": note["training_tokens"],
        "train_s": round(trained - start, 1),
        "score_s": round(time.monotonic() - trained, 1),
    }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one row of the table says.

    Attributes:
        gain: Expert minus the better of base model and majority answer, in points; of generated answers the larger gain of exact match and
            ROUGE-L.
        p: Exact one-sided p-value of the expert against whichever of the two is better, over the test items.
        admitted: Gain of at least 5 points (generation: 10) and p below 0.05.
    """

    gain: float
    p: float
    admitted: bool


def verdict(row: Mapping[str, Any]) -> Verdict:
    """Whether a candidate passes: McNemar's exact test against the base model, a binomial test against a constant answer."""
    from scipy.stats import binomtest

    base, expert, num = row["base"]["hits"], row["expert"]["hits"], row["num_test"]
    won = sum(mine > theirs for mine, theirs in zip(expert, base, strict=True))
    lost = sum(mine < theirs for mine, theirs in zip(expert, base, strict=True))
    against_base = binomtest(won, won + lost, alternative="greater").pvalue if won + lost else 1.0
    against_constant = binomtest(round(sum(expert)), num, row["majority"], alternative="greater").pvalue
    gain = 100 * (sum(expert) / num - max(sum(base) / num, row["majority"]))
    bar = GAIN[row["kind"]]
    if row["kind"] == "gen":
        gain = max(gain, 100 * (row["expert"]["rougeL"] - row["base"]["rougeL"]))
    p = float(max(against_base, against_constant))
    return Verdict(gain, p, gain >= bar and p < LEVEL)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The evidence as Markdown: public candidates, then generated ones."""
    scores = ["chance", "majority", "base", "expert", "ROUGE-L base", "ROUGE-L expert"]
    header = ["task", "kind", "test items", "steps", *scores, "gain", "p", "admitted"]

    def cells(row: Mapping[str, Any]) -> list[str]:
        found, num = verdict(row), row["num_test"]
        base, expert = (100 * sum(row[key]["hits"]) / num for key in ("base", "expert"))
        low, high = wilson(sum(row["expert"]["hits"]), num)
        rouge = [f"{100 * row[key]['rougeL']:.1f}" if "rougeL" in row[key] else "" for key in ("base", "expert")]
        guesses = [f"{100 * row['chance']:.0f}", f"{100 * row['majority']:.0f}"]
        scores = [f"{base:.1f}", f"{expert:.1f} ({low:.0f}–{high:.0f})", *rouge]
        verdict_cells = [f"{found.gain:+.1f}", f"{found.p:.1g}", "yes" if found.admitted else "no"]
        return [row["task"], row["kind"], str(num), str(row["steps"]), *guesses, *scores, *verdict_cells]

    parts = []
    for block in ("public", "skills"):
        chosen = [row for row in rows if row["block"] == block]
        passed = sum(verdict(row).admitted for row in chosen)
        title = f"### {block.capitalize()} block: {len(chosen)} tried, {passed} above the bar"
        parts.append(f"{title}\n\n{markdown.table(header, [cells(row) for row in chosen], left=2)}")
    return "\n\n".join(parts)


def wilson(hits: float, num: int) -> tuple[float, float]:
    """95 % interval of a share, in percent."""
    from scipy.stats import binomtest

    interval = binomtest(round(hits), num).proportion_ci(method="wilson")
    return 100 * interval.low, 100 * interval.high


def main() -> int:
    """Measure what is missing, in the order given; then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", default="all", help="names separated by commas; all takes every candidate")
    parser.add_argument("--data-root")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs/real/candidates"))
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.table:
        measure_missing(arguments)
    rows = json.loads(arguments.json.read_text(encoding="utf-8"))["tasks"]
    text = PAGE.read_text(encoding="utf-8")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    write_atomically(PAGE, f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}")
    return 0


def measure_missing(arguments: argparse.Namespace) -> None:
    """Every candidate that has no row yet; the file is written after each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    suite = real_suite("real_candidates", arguments.data_root)
    names = suite.names if arguments.tasks == "all" else arguments.tasks.split(",")
    rows = json.loads(arguments.json.read_text(encoding="utf-8"))["tasks"] if arguments.json.is_file() else []
    folder = resolve_backbone(BACKBONE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in names:
        if any(row["task"] == name for row in rows):
            continue
        setting = Setting(
            backbone=str(folder),
            base_model_name="HuggingFaceTB/SmolLM2-135M-Instruct",
            suite="real_candidates",
            data_root=str(Path(arguments.data_root).resolve()),
            tasks=(name,),
            configs={"pool": "real_experts"},
            processes=1,
        )
        row = measure(suite.task(name), setting, arguments.runs, model, tokenizer)
        rows.append(row)
        write_atomically(arguments.json, json.dumps({"num_test": NUM_TEST, "tasks": rows}, indent=None, sort_keys=True) + "\n")
        accuracies = {key: round(100 * sum(row[key]["hits"]) / row["num_test"], 1) for key in ("base", "expert")}
        print(name, row["kind"], accuracies, f"{row['train_s']} + {row['score_s']} s", flush=True, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
