"""A client of the engine, without HTTP."""

from __future__ import annotations

import queue
from typing import Any

from dlplora.serve.engine import Engine
from dlplora.serve.jobs import Failed, Finished, Job, Piece, Target
from dlplora.serve.sampling import SamplingOptions
from tests.equivalence.test_kv_policy import STEPS

GREEDY = SamplingOptions(temperature=0.0)


class Client:
    """Submits jobs and collects their events."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: dict[Any, list[Any]] = {}
        self._queue: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def job(self, key: Any, text: str, target: Target | None = None, **options: Any) -> Job:
        tokenizer = self.engine.fused.tokenizer
        self.events[key] = []
        settings: dict[str, Any] = {"sampling": GREEDY, "max_tokens": STEPS, "ignore_eos": True, **options}
        return Job(
            prompt_ids=tuple(tokenizer(text)["input_ids"]), routed_text=text, target=target or Target(),
            report=lambda event: self._queue.put((key, event)), **settings,
        )  # fmt: skip

    def wait(self, num: int) -> None:
        """Until so many jobs have ended."""
        while num:
            key, event = self._queue.get(timeout=120)
            self.events[key].append(event)
            num -= isinstance(event, (Finished, Failed))

    def tokens(self, key: Any) -> list[int]:
        return [chosen.token for event in self.events[key] if isinstance(event, Piece) for chosen in event.tokens]

    def text(self, key: Any) -> str:
        return "".join(event.text for event in self.events[key] if isinstance(event, Piece))
