"""Many concurrent requests, clients that disconnect and truncated bodies: ``python -m benchmarks.serve_load --soak 2000``.

Every answer is compared with the server's answer to the same request when nothing else ran. The record holds wrong answers, slots that are
still occupied at the end, and the memory of the server's process after each quarter of the requests.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

KINDS = ("whole", "stream", "vanishes", "cut off", "broken")
SHARES = (50, 30, 10, 5, 5)
"""Per cent of the requests of each kind."""
NEW_TOKENS = (1, 8, 20, 40)


@dataclass(frozen=True)
class Question:
    """One request: model and prompt, greedy."""

    model: str
    prompt: str
    new_tokens: int

    def body(self, stream: bool) -> dict[str, Any]:
        """The body of ``POST /v1/completions``."""
        return {
            "model": self.model, "prompt": self.prompt, "max_tokens": self.new_tokens, "temperature": 0, "ignore_eos": True,
            "stream": stream,
        }  # fmt: skip


async def _whole(client: httpx.AsyncClient, question: Question) -> str:
    response = await client.post("/v1/completions", json=question.body(False))
    response.raise_for_status()
    return str(response.json()["choices"][0]["text"])


async def _streamed(client: httpx.AsyncClient, question: Question, vanish: bool = False) -> str:
    text = ""
    async with client.stream("POST", "/v1/completions", json=question.body(True)) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                if vanish:
                    break
    return text


async def _cut_off(address: str, question: Question, after: float) -> None:
    """Send a part of a body and close the connection."""
    place = urlsplit(address)
    _, writer = await asyncio.open_connection(place.hostname, place.port)
    body = json.dumps(question.body(True)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body[: int(after * len(body))])
    await writer.drain()
    writer.close()


async def _broken(client: httpx.AsyncClient, question: Question, dice: random.Random) -> str | None:
    """A request that must be refused; returns what is wrong with the refusal."""
    changes: tuple[dict[str, Any], ...] = ({"model": "nobody"}, {"max_tokens": 10**6}, {"n": 99}, {"prompt": []}, {"temperature": -1})
    change = dice.choice(changes)
    response = await client.post("/v1/completions", json={**question.body(False), **change})
    return None if response.status_code in {400, 404} else f"{change}: status {response.status_code}"


class Soak:
    """The requests of one run and their outcomes.

    Args:
        address: Of the server.
        prompts: Sent in turn.
        pid: Process with the observed memory.
    """

    def __init__(self, address: str, prompts: Sequence[str], pid: int) -> None:
        self.address, self.prompts, self.pid = address, prompts, pid
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory: list[int] = []

    async def run(self, requests: int, clients: int, seed: int = 0) -> dict[str, Any]:
        """Ask everything alone, then send the requests; returns the record."""
        dice = random.Random(seed)
        async with httpx.AsyncClient(base_url=self.address, timeout=600, limits=httpx.Limits(max_connections=clients)) as client:
            cards = (await client.get("/v1/models")).json()["data"]
            models = [card["id"] for card in cards]
            questions = [
                Question(model, prompt, dice.choice(NEW_TOKENS))
                for prompt in self.prompts
                for model in ("auto", "base", dice.choice(models[1:-1]))
            ]
            alone = {question: await _whole(client, question) for question in dict.fromkeys(questions)}
            waiting = iter([(dice.choice(questions), dice.choices(KINDS, SHARES)[0]) for _ in range(requests)])
            marks = {round(requests * part / 4): part for part in (1, 2, 3, 4)}
            self.memory.append(self._resident())

            async def work() -> None:
                for question, kind in waiting:
                    await self._one(client, question, kind, alone[question], dice)
                    if sum(self.counts.values()) in marks:
                        self.memory.append(self._resident())

            await asyncio.gather(*(work() for _ in range(clients)))
            left = await self._left(client)
        return {
            "requests": requests, "clients": clients, "kinds": dict(self.counts), "distinct": len(alone), "wrong": len(self.wrong),
            "examples": self.wrong[:5], "left_running": left, "resident_bytes": self.memory,
        }  # fmt: skip

    async def _one(self, client: httpx.AsyncClient, question: Question, kind: str, expected: str, dice: random.Random) -> None:
        try:
            if kind == "whole":
                self._compare(question, await _whole(client, question), expected)
            elif kind == "stream":
                self._compare(question, await _streamed(client, question), expected)
            elif kind == "vanishes":
                await _streamed(client, question, vanish=True)
            elif kind == "cut off":
                await _cut_off(self.address, question, dice.random())
            else:
                problem = await _broken(client, question, dice)
                self.wrong += [problem] if problem else []
        except httpx.HTTPError as error:
            self.wrong.append(f"{kind}: {type(error).__name__}: {error}")
        self.counts[kind] += 1

    def _compare(self, question: Question, found: str, expected: str) -> None:
        if found != expected:
            self.wrong.append(f"{question.model}: {found!r}, alone {expected!r}")

    async def _left(self, client: httpx.AsyncClient) -> int:
        """Requests in a slot or in the queue after the last answer; slots of disconnected clients get a moment to be freed."""
        left = 0
        for _ in range(100):
            ready = (await client.get("/ready")).json()
            left = ready["running"] + ready["waiting"]
            if not left:
                break
            await asyncio.sleep(0.1)
        return int(left)

    def _resident(self) -> int:
        with open(f"/proc/{self.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
