"""Requests of one model that take turns: the methods that are tried, and ways to interleave."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from dlplora.baselines.lora_flow import LoRAFlow
from dlplora.baselines.meteora import MeteoRA
from dlplora.baselines.mole import MoLE
from dlplora.baselines.xlora import XLoRA
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import FusionMethod, Metadata
from dlplora.methods.references import AvgDelta
from tests.equivalence.by_length import ByLength

BATCHES = (
    ("the cat sees",),
    ("Mia likes the plum. Who likes it? Answer:",),
    ("a", "Tom and Ann and Leo in the tree . two three"),
    ("who sees the red box", "no"),
)


class Recomputed(ByLength):
    policy, pieces = "recompute", "sentence"


class Once(ByLength):
    metadata = Metadata(title="Once", granularity="prompt")


METHODS: dict[str, tuple[Callable[[], FusionMethod], str]] = {
    "sentence": (ByLength, "folded"),
    "sentence_dense": (ByLength, "dense"),
    "sentence_recompute": (Recomputed, "auto"),
    "prompt": (Once, "folded"),
    "static": (AvgDelta, "auto"),
    "static_merged": (AvgDelta, "merged"),
    "meteora": (MeteoRA, "auto"),
    "xlora": (XLoRA, "auto"),
    "lora_flow": (LoRAFlow, "auto"),
    "mole": (MoLE, "auto"),
}


def by_name(fuse: Callable[..., FusedCausalLM], name: str) -> FusedCausalLM:
    """A model of one of ``METHODS``, made by the fixture ``fuse``."""
    build, backend = METHODS[name]
    method = build()
    fused = fuse(method, backend)
    generator = torch.Generator().manual_seed(5)
    for parameter in method.parameters():  # untrained gates weigh all experts alike, whatever they read
        parameter.data.normal_(0, 0.7, generator=generator)
    return fused


def ask(fused: FusedCausalLM, texts: Sequence[str], steps: int = 9, **options: Any) -> tuple[list[list[int]], Tensor]:
    """Tokens and logits of one request."""
    found: Any = fused.generate(
        list(texts), max_new_tokens=steps, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True, **options
    )
    return found.sequences.tolist(), torch.stack(found.logits)


def same(one: tuple[list[list[int]], Tensor], other: tuple[list[list[int]], Tensor]) -> bool:
    return one[0] == other[0] and torch.equal(one[1], other[1])


class Baton(StoppingCriteria):
    """Stops a request after every token until it is its turn again."""

    def __init__(self, number: int) -> None:
        self.go, self.paused, self.number = threading.Semaphore(0), threading.Semaphore(0), number
        self.answer: Any = None
        self.ended = False
        self.fail_at: int | None = None
        self._steps = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.paused.release()
        self.go.acquire()
        self._steps += 1
        if self._steps == self.fail_at:
            raise KeyError("a caller's own error")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def run(self, fused: FusedCausalLM, texts: Sequence[str]) -> None:
        self.go.acquire()
        try:
            self.answer = ask(fused, texts, stopping_criteria=[self])
        except KeyError as error:
            self.answer = error
        self.ended = True
        self.paused.release()


def take_turns(fused: FusedCausalLM, batches: Sequence[Sequence[str]], dice: random.Random, failing: int | None = None) -> list[Any]:
    """Run requests token by token, the next one drawn by lot; their answers."""
    batons = [Baton(number) for number in range(len(batches))]
    if failing is not None:
        batons[failing].fail_at = 4
    threads = [threading.Thread(target=baton.run, args=(fused, texts)) for baton, texts in zip(batons, batches, strict=True)]
    for thread in threads:
        thread.start()
    while any(not baton.ended for baton in batons):
        baton = dice.choice([one for one in batons if not one.ended])
        baton.go.release()
        baton.paused.acquire()
    for thread in threads:
        thread.join()
    return [baton.answer for baton in batons]


class Nested(StoppingCriteria):
    """Asks the same model something else after every token."""

    def __init__(self, fused: FusedCausalLM, expected: Any) -> None:
        self.fused, self.expected, self.num_right = fused, expected, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.num_right += same(ask(self.fused, BATCHES[3]), self.expected)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)
