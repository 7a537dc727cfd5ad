"""The oracle where the layout shows no questions: sentence i has the adapter of task i. Against loops over merged weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.sentences import sentence_end_positions
from dlplora.methods.references import Oracle
from dlplora.types import PromptBatch
from tests.equivalence.test_kv_policy import keys_and_values, merged

NAMES = ("alpha", "beta", "gamma")
TOLD = {"Mia likes the plum\nTom sees two\nAnswer:": "gamma+alpha", "the cat\nAnn\nLeo in the tree\nAnswer:": "beta+gamma+alpha"}
STEPS = 24


@torch.no_grad()
def slow(model: Any, pool: Path, tokenizer: Any, text: str, tasks: list[str], policy: str) -> tuple[list[int], int]:
    """One row, one token at a time, and how many sentences it ended."""
    plain = {name: merged(model, pool, torch.tensor([float(name == other) for other in NAMES])) for name in tasks}
    prompt, new, ended = tokenizer(text)["input_ids"], [], 0
    past, logits = keys_and_values(plain[tasks[0]], prompt, [])
    for _ in range(STEPS):
        new.append(int(logits.argmax()))
        ended = max(ended, len(sentence_end_positions(tokenizer.decode(new), final=False)))
        turn = plain[tasks[min(ended, len(tasks) - 1)]]
        if policy == "recompute":
            _, logits = keys_and_values(turn, prompt + new, [])
        else:
            past, logits = keys_and_values(turn, new[-1:], past)
    return new, ended


@pytest.mark.parametrize("policy", ["stale", "recompute"])
def test_sentences_have_their_own_adapters(policy: str, fuse: Callable[..., FusedCausalLM], talkative: Any, tiny_pool: Path) -> None:
    talkative.double()
    fused = fuse(Oracle(Oracle.Config(segments=True, kv_policy=policy)), "reference")  # type: ignore[arg-type]
    prompts = PromptBatch.from_texts(list(TOLD), fused.tokenizer, task_names=list(TOLD.values()))
    out = fused.generate(prompts=prompts, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    for row, (text, tasks) in enumerate(TOLD.items()):
        expected, ended = slow(talkative, tiny_pool, fused.tokenizer, text, tasks.split("+"), policy)
        assert ended >= 2
        assert out[row, -STEPS:].tolist() == expected
