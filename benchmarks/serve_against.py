"""Compare ``dlplora serve`` with another OpenAI-compatible server: one base model, same machine and requests, alternating runs.

    transformers serve FOLDER --device cpu --dtype float32 --port 8001
    python -m benchmarks.serve_against --against http://127.0.0.1:8001 --model FOLDER --pid PID \
        --pretrained smollm2-135m --pool POOL --method base

Requests are greedy and end where the model ends; answers are compared, and counted with the tokenizer of FOLDER. The record is
``results/bench/against-*.json``. Options that this command does not know go to ``dlplora serve``.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx
import torch
from transformers import AutoTokenizer

from benchmarks.serve_load import cpu_seconds, server, write_record
from dlplora.bench.hardware import ContentionMonitor
from dlplora.tasks.registry import get_suite

NEW_TOKENS = 32


async def _ask(address: str, model: str, prompts: Sequence[str], clients: int) -> tuple[float, list[str]]:
    """Seconds for all prompts, and the answers."""
    answers = [""] * len(prompts)
    waiting = iter(enumerate(prompts))

    async def work(client: httpx.AsyncClient) -> None:
        for place, prompt in waiting:
            body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
            response = await client.post("/v1/completions", json=body)
            response.raise_for_status()
            answers[place] = response.json()["choices"][0]["text"]

    started = time.perf_counter()
    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        await asyncio.gather(*(work(client) for _ in range(clients)))
    return time.perf_counter() - started, answers


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="URL")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the base model's name on the other server")
    parser.add_argument("--pid", type=int, required=True, help="process of the other server, whose processor time is read")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", default="results/bench", metavar="DIR")
    arguments, rest = parser.parse_known_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tasks = get_suite("nano", None).tasks
    prompts = [item.prompt for items in zip(*(task.items("test", 4) for task in tasks), strict=False) for item in items][
        : arguments.requests
    ]
    monitor = ContentionMonitor(torch.device("cpu"))
    rates: dict[tuple[str, int], list[float]] = {}
    cpu_rates: dict[tuple[str, int], list[float]] = {}
    same: list[bool] = []
    with server(rest) as (own, pid):
        places = {"dlplora": (own, "base"), "other": (arguments.against, arguments.model)}
        pids = {"dlplora": pid, "other": arguments.pid}
        for address, model in places.values():
            asyncio.run(_ask(address, model, prompts[:2], 1))  # warm-up
        for turn in range(arguments.rounds):
            for clients in (arguments.clients, 1):
                asked = prompts if clients > 1 else prompts[: max(4, len(prompts) // 8)]
                found: dict[str, list[str]] = {}
                for name in list(places)[:: 1 if turn % 2 == 0 else -1]:
                    before = cpu_seconds(pids[name]) or 0.0
                    seconds, found[name] = asyncio.run(_ask(*places[name], asked, clients))
                    tokens = sum(len(ids) for ids in tokenizer(found[name])["input_ids"])
                    rates.setdefault((name, clients), []).append(tokens / seconds)
                    spent = (cpu_seconds(pids[name]) or 0.0) - before
                    cpu_rates.setdefault((name, clients), []).append(tokens / spent if spent else 0.0)
                same += [one == other for one, other in zip(found["dlplora"], found["other"], strict=True)]
    medians = {key: statistics.median(values) for key, values in rates.items()}
    summary: dict[str, Any] = {
        "throughput_over_other": medians["dlplora", arguments.clients] / medians["other", arguments.clients],
        "alone_over_other": medians["dlplora", 1] / medians["other", 1],
        "tokens_per_s": {f"{name}, {clients} clients": rate for (name, clients), rate in medians.items()},
        "tokens_per_cpu_s": {f"{name}, {clients} clients": statistics.median(found) for (name, clients), found in cpu_rates.items()},
        "equal_answers": sum(same) / len(same),
    }
    return write_record(arguments.out, "against", {"summary": summary, "rounds": arguments.rounds}, rest, "nano", monitor)


if __name__ == "__main__":
    sys.exit(main())
