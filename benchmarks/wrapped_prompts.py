"""Effect of system texts and instruction formats on routing: ``python -m benchmarks.wrapped_prompts run``, then ``report``.

Nano, or another protocol: ``--protocol real26 --pool POOL --router ROUTER --data-root ROWS``.

The multiple-choice questions of the suite are scored without and with wrappers, by ``oracle`` (told the task), by ``dlp``, and by
``dlp`` with a router that reads the whole prompt. Every prompt is one string, without messages or documents, so the wrapper must be
recognised in the text. ``oracle`` shows the effect of a wrapper on the experts, which were not trained with wrappers. The second part, for
nano only, generates from ``table_to_text`` prompts with a blank line before ``Answer:``; re-routes once read only
the cue there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

from benchmarks.docs_table import command
from dlplora.adapters.pool import load_pool
from dlplora.evaluation.protocol import load_protocol
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.kv_policy import KV_POLICIES
from dlplora.inference.loading import nano_asset
from dlplora.lm_eval.model import DLPLoRALM
from dlplora.provenance import provenance
from dlplora.reporting import markdown
from dlplora.tasks.registry import get_suite
from dlplora.tasks.types import Suite
from dlplora.types import PromptBatch

PER_TASK = 20
NUM_BLANK = 40

SHORT = "You are a helpful assistant."
LONG = (
    "You are a helpful and precise assistant. Answer the user's question as well as you can. "
    "Be polite, and give short answers in English. Do not explain."
)
VERY_LONG = (
    "You are the assistant of a company that sells garden furniture and kitchen tools. Customers write to you about orders, returns and "
    "repairs. Read each message with care before you answer. If a customer asks about an order, look at the number first and name the day "
    "on which it will arrive. If something is broken, say that you are sorry and offer a new one or the money back. Never promise a price "
    "that is not on the list. Do not talk about other companies, about politics or about the weather. Write in plain English, in short "
    "sentences, and without jokes. Do not repeat the question. When you do not know the answer, say so and give the phone number of the "
    "shop, which is open from Monday to Friday. Prices are in dollars and include the tax. Orders above fifty dollars are sent without "
    "cost. A customer may change the color of a chair within two days, and its size never. Keep names, numbers and colors as the customer "
    "wrote them. Always stay calm and friendly, and close the talk with a wish for a good day when the customer says that all is well."
)
GERMAN = (
    "Du bist ein hilfreicher und genauer Assistent. Beantworte die Frage so gut du kannst. Sei höflich und antworte kurz, ohne deine "
    "Antwort zu erklären. Wenn du etwas nicht weißt, dann sage es."
)
TOOLS = (
    "You can call these tools:\n"
    '[{"type": "function", "function": {"name": "get_weather", "description": "Weather of a city", "parameters": {"type": "object", '
    '"properties": {"city": {"type": "string"}, "day": {"type": "string"}}, "required": ["city"]}}}, {"type": "function", "function": '
    '{"name": "find_order", "description": "Find an order", "parameters": {"type": "object", "properties": {"id": {"type": "integer"}}}}}]'
    '\nAnswer with {"name": NAME, "arguments": {...}} when you call one.'
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

SETTINGS: dict[str, Callable[[str], str]] = {
    "none": lambda question: question,
    "system text, 5 words": lambda question: f"{SHORT}\n\n{question}",
    "system text, 27 words": lambda question: f"{LONG}\n\n{question}",
    "system text, 200 words": lambda question: f"{VERY_LONG}\n\n{question}",
    "system text in German": lambda question: f"{GERMAN}\n\n{question}",
    "tool schema": lambda question: f"{TOOLS}\n\n{question}",
    "Alpaca": lambda question: f"{ALPACA}\n\n### Instruction:\n{question}\n\n### Response:\n",
    "ChatML": lambda question: (
        f"<|im_start|>system\n{LONG}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
    "Llama 2": lambda question: f"[INST] <<SYS>>\n{LONG}\n<</SYS>>\n\n{question} [/INST]",
    "Gemma": lambda question: f"<start_of_turn>user\n{LONG}\n\n{question}<end_of_turn>\n<start_of_turn>model\n",
}


class _ReadsEverything:
    """In place of ``RoutedTexts``: the whole context is routed, wrapper and all."""

    @staticmethod
    def of(request: Instance) -> str:
        return str(request.args[0])


def scores(
    fused: FusedCausalLM, suite: Suite, wrap: Callable[[str], str], per_task: int, *, read_everything: bool = False
) -> dict[str, float | None]:
    """Mean accuracy over the multiple-choice tasks, and the share of prompts with the largest weight on the task's own expert."""
    model = DLPLoRALM(fused=fused, batch_size=32)
    if read_everything:
        assert hasattr(model, "_routed_texts")
        model._routed_texts = _ReadsEverything()  # type: ignore[assignment]
    right = []
    for task in suite.tasks:
        if task.kind != "mcq":
            continue
        items = task.items("test", per_task)
        requests = [
            Instance("loglikelihood", {}, (wrap(item.prompt), f" {choice}"), number, metadata=(suite.lm_eval_prefix + task.name, number, 1))
            for number, item in enumerate(items)
            for choice in item.choices or ()
        ]
        values = iter(model.loglikelihood(requests, disable_tqdm=True))
        found = [[next(values)[0] for _ in item.choices or ()] for item in items]
        right.append(
            sum(max(range(len(row)), key=row.__getitem__) == item.gold for row, item in zip(found, items, strict=True)) / len(items)
        )
    return {"acc": sum(right) / len(right), "router_accuracy": model.routing_statistics()["router_accuracy"]}


def blank_lines(policy: str) -> dict[str, float]:
    """Exact match of ``table_to_text`` unchanged, and with one more blank line before the cue."""
    fused = FusedCausalLM.from_pretrained(method="dlp", method_params={"kv_policy": policy})
    items = get_suite("nano").task("table_to_text").items("test", NUM_BLANK)
    found = {}
    for name, cue in (("plain", "\nAnswer:"), ("blank_line", "\n\nAnswer:")):
        prompts = PromptBatch.from_texts([item.prompt.replace("\nAnswer:", cue) for item in items], fused.tokenizer)
        ids = fused.generate(prompts=prompts, max_new_tokens=40, do_sample=False)
        texts = fused.tokenizer.batch_decode(ids[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
        found[name] = sum(text.split("\n")[0].strip() == item.answer for text, item in zip(texts, items, strict=True)) / len(items)
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole record."""
    protocol = load_protocol(arguments.protocol, {"data_root": arguments.data_root} if arguments.data_root else {})
    suite, nano = get_suite(protocol.suite, protocol.data_root), protocol.backbone is None
    pool = nano_asset("pool") if nano else arguments.pool
    given: dict[str, Any] = {} if nano else {"pool": pool, "dtype": protocol.dtype}
    routers: dict[str, dict[str, Any]] = {"oracle": {}, "dlp": {} if nano else {"router": arguments.router}}
    models = {method: FusedCausalLM.from_pretrained(protocol.backbone, method=method, **given, **own) for method, own in routers.items()}
    columns = {"oracle": ("oracle", False), "dlp": ("dlp", False), "dlp_reads_everything": ("dlp", True)}
    settings: dict[str, Any] = {}
    for name, wrap in SETTINGS.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        settings[name] = {
            column: scores(models[method], suite, wrap, arguments.size, read_everything=everything)
            for column, (method, everything) in columns.items()
        }
    blank = {"blank_line": {policy: blank_lines(policy) for policy in KV_POLICIES}, "num_blank_line": NUM_BLANK} if nano else {}
    return {
        "backbone": protocol.backbone or "nano",
        "suite": protocol.suite,
        "pool": load_pool(pool).checksum(),
        "per_task": arguments.size,
        "settings": settings,
        **blank,
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown; percent."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    header = ["prompt", "`oracle`", "`dlp`", "`dlp`, router reads all", "router accuracy", "router accuracy, reads all"]
    rows = []
    for name, row in record["settings"].items():
        own, everything = row["dlp"], row["dlp_reads_everything"]
        cells = [row["oracle"]["acc"], own["acc"], everything["acc"], own["router_accuracy"], everything["router_accuracy"]]
        rows.append([name, *map(percent, cells)])
    scored = markdown.table(header, rows)
    if "blank_line" not in record:
        return scored
    blank = [[f"`{policy}`", percent(row["plain"]), percent(row["blank_line"])] for policy, row in record["blank_line"].items()]
    second = markdown.table(["`table_to_text`, exact match", "`\\nAnswer:`", "`\\n\\nAnswer:`"], blank)
    return f"{scored}\n\n{second}"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--protocol", default="nano", metavar="NAME", help="of configs/protocol (default: nano)")
    parser.add_argument("--pool", type=Path, metavar="FOLDER", help="of another protocol than nano")
    parser.add_argument("--router", type=Path, metavar="FOLDER", help="of another protocol than nano")
    parser.add_argument("--data-root", metavar="FOLDER")


def _name(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """Name of the record; leaves with a line if a folder is missing."""
    if arguments.protocol == "nano":
        return "wrapped_prompts"
    if arguments.action == "run" and None in {arguments.pool, arguments.router}:
        parser.error("another protocol than nano needs --pool and --router.")
    return f"wrapped_prompts-{arguments.protocol}"


def main() -> None:
    """Read the command line; measure, or write the table into the page."""
    command(__doc__, measure, table, name="wrapped_prompts", size="--per-task", default=PER_TASK, add_options=_options, name_of=_name)


if __name__ == "__main__":
    main()
