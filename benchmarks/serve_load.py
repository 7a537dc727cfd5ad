"""Load test of a server from a second process: throughput, time to first token, fairness, and leaked slots.

``python -m benchmarks.serve_load --clients 16 --requests 64`` starts ``dlplora serve`` on a free loopback port. Figures are ratios of runs
that were interleaved against one server: routed requests, each to another adapter, against the base model; many clients against one. The
record is ``results/bench/serve-*.json``. Options that this command does not know go to ``dlplora serve``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.serve_soak import Soak
from dlplora.atomic import write_json
from dlplora.bench.hardware import ContentionMonitor
from dlplora.provenance import provenance
from dlplora.tasks.registry import get_suite

NEW_TOKENS = (16, 24, 32, 40, 48)
"""Tokens of the answers, in turn: answers of one length would let the clients send their requests at the same moments forever."""


@dataclass(frozen=True)
class Load:
    """One run of requests."""

    model: str
    clients: int
    requests: int
    seconds: float
    completion_tokens: int
    first_token_s: tuple[float, ...]
    errors: int
    routing_share: float | None = None
    """Routing (question, router, buffers) in the time to the first token, sums over all requests, measured by the server."""
    server_cpu_s: float | None = None
    """Processor time of the server, over all threads; hardly depends on what else the machine does."""

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second over all clients."""
        return self.completion_tokens / self.seconds


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[tuple[str, int]]:
    """A server process; yields its address and process id."""
    command = [sys.executable, "-m", "dlplora.cli.main", "serve", "--port", "0", "--max-queue", "512", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"http://\S+", line):
                yield found[0], process.pid
                return
        raise SystemExit("the server did not start.")
    finally:
        process.terminate()
        process.wait()


async def _one(client: httpx.AsyncClient, model: str, prompt: str, new_tokens: int) -> tuple[float, int]:
    """Time to the first token and number of tokens of one streamed request."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    started, first, tokens = time.perf_counter(), None, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if first is None and any(choice["text"] for choice in chunk["choices"]):
                first = time.perf_counter() - started
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    return first or 0.0, tokens


def _first_token_sums(address: str) -> tuple[float, float] | None:
    """Seconds of routing and seconds to the first token of all requests so far; None if the server does not report them."""
    text = httpx.get(f"{address}/metrics").text
    found = [re.search(rf"^dlplora_{name}_seconds_sum (\S+)", text, re.MULTILINE) for name in ("first_token_routing", "first_token")]
    return None if found[0] is None or found[1] is None else (float(found[0][1]), float(found[1][1]))


def cpu_seconds(pid: int) -> float | None:
    """Processor time of a process so far, s; None where the system does not tell."""
    path = Path(f"/proc/{pid}/stat")
    if not path.is_file():
        return None
    user, system = path.read_text(encoding="ascii").rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def _run(place: tuple[str, int], model: str, prompts: Sequence[str], clients: int, requests: int) -> Load:
    address, pid = place
    waiting = iter([(prompts[i % len(prompts)], NEW_TOKENS[i % len(NEW_TOKENS)]) for i in range(requests)])
    first: list[float] = []
    counts = [0, 0]

    async def work(client: httpx.AsyncClient) -> None:
        for prompt, new_tokens in waiting:
            try:
                seconds, tokens = await _one(client, model, prompt, new_tokens)
            except httpx.HTTPError:
                counts[1] += 1
                continue
            first.append(seconds)
            counts[0] += tokens

    before, spent = _first_token_sums(address), cpu_seconds(pid)
    started = time.perf_counter()
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=httpx.Limits(max_connections=clients)) as client:
        await asyncio.gather(*(work(client) for _ in range(clients)))
    seconds, after, now = time.perf_counter() - started, _first_token_sums(address), cpu_seconds(pid)
    cpu = None if spent is None or now is None else now - spent
    share = None
    if before is not None and after is not None and after[1] > before[1]:
        share = (after[0] - before[0]) / (after[1] - before[1])
    return Load(model, clients, requests, seconds, counts[0], tuple(first), counts[1], share, cpu)


def measure(place: tuple[str, int], prompts: Sequence[str], clients: int, requests: int, rounds: int) -> list[Load]:
    """Rounds of three loads: routed and base with many clients, routed with one; every other round in reverse order."""
    loads = [("auto", clients, requests), ("base", clients, requests), ("auto", 1, max(4, requests // 8))]
    asyncio.run(_run(place, "auto", prompts, clients, clients))  # warm-up
    found = []
    for turn in range(rounds):
        for model, count, num in loads if turn % 2 == 0 else loads[::-1]:
            found.append(asyncio.run(_run(place, model, prompts, count, num)))
    return found


def summary(loads: Sequence[Load], clients: int) -> dict[str, Any]:
    """Ratios of medians over rounds."""

    def rate(model: str, count: int) -> float:
        return statistics.median(load.tokens_per_s for load in loads if (load.model, load.clients) == (model, count))

    def cpu(model: str, count: int) -> float | None:
        chosen = [load for load in loads if (load.model, load.clients) == (model, count)]
        spent = [load.server_cpu_s for load in chosen if load.server_cpu_s is not None]
        return sum(load.completion_tokens for load in chosen) / sum(spent) if spent else None

    def first(count: int, quantile: float) -> float:
        values = sorted(value for load in loads if (load.model, load.clients) == ("auto", count) for value in load.first_token_s)
        return values[min(len(values) - 1, int(quantile * len(values)))]

    def share(count: int) -> float | None:
        values = [load.routing_share for load in loads if (load.model, load.clients) == ("auto", count)]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    return {
        "routed_over_base": rate("auto", clients) / rate("base", clients),
        "clients_over_one": rate("auto", clients) / rate("auto", 1),
        "first_token_p95_over_alone": first(clients, 0.95) / first(1, 0.5),
        "first_token_median_over_alone": first(clients, 0.5) / first(1, 0.5),
        "first_token_alone_s": first(1, 0.5),
        "routing_share_alone": share(1),
        "routing_share": share(clients),
        "first_token_max_s": first(clients, 1.0),
        "tokens_per_s": rate("auto", clients),
        "tokens_per_cpu_s": {"routed": cpu("auto", clients), "base": cpu("base", clients), "one client": cpu("auto", 1)},
        "errors": sum(load.errors for load in loads),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64, help="requests of one run")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--suite", default="nano", help="suite whose test prompts are sent, a task after the other")
    parser.add_argument("--data-root")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="instead: N requests, some of which vanish")
    parser.add_argument("--out", default="results/bench", metavar="DIR")
    arguments, rest = parser.parse_known_args(argv)
    tasks = get_suite(arguments.suite, arguments.data_root).tasks
    prompts = [item.prompt for items in zip(*(task.items("test", 4) for task in tasks), strict=False) for item in items]
    monitor = ContentionMonitor(torch.device("cpu"))
    if arguments.soak:
        with server(rest) as (address, pid):
            found = asyncio.run(Soak(address, prompts, pid).run(arguments.soak, arguments.clients))
        return write_record(arguments.out, "soak", {"summary": found}, rest, arguments.suite, monitor)
    with server(rest) as (address, pid):
        loads = measure((address, pid), prompts, arguments.clients, arguments.requests, arguments.rounds)
        ready = httpx.get(f"{address}/ready").json()
    found = {**summary(loads, arguments.clients), "left_running": ready["running"] + ready["waiting"]}
    measured = {"summary": found, "loads": [asdict(load) for load in loads]}
    return write_record(arguments.out, "serve", measured, rest, arguments.suite, monitor)


def write_record(folder: str, kind: str, measured: dict[str, Any], options: Sequence[str], suite: str, monitor: ContentionMonitor) -> int:
    """Write a record and print its summary; records name no place of a machine."""
    shown = [Path(word).name if Path(word).exists() else word for word in options]
    path = Path(folder) / f"{kind}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = {"warnings": list(monitor.warnings()), "provenance": provenance()}
    write_json(path, {"server": shown, "suite": suite, **measured, **notes})
    print(json.dumps({**measured["summary"], "record": str(path)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
