"""Every ``kv_policy`` against slow loops that share nothing with it: no cache at all, or keys and values kept by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from dlplora.errors import GenerationError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.sentences import sentence_end_positions
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch
from tests.equivalence.by_length import ByLength, by_length
from tests.equivalence.merged_truth import deltas

TEXTS = ("the cat sees", "Mia likes the plum. Who likes it? Answer:", "a", "Tom and Ann and Leo in the tree . two three")
STEPS = 24


@pytest.fixture
def talkative(talkative: Any) -> Any:
    """The same in float64."""
    return talkative.double()


def fused_with(model: Any, tokenizer: Any, pool: Path, policy: str, pieces: str = "whole") -> FusedCausalLM:
    bank = AdapterBank.from_pool(pool, dtype=torch.float64)
    return FusedCausalLM(model, tokenizer, bank, by_length(policy, pieces), backend="reference")


def merged(model: Any, pool: Path, weights: Tensor) -> Any:
    """The plain model with ``sum w s B A`` added to its weights: no fused layer in sight."""
    plain = copy.deepcopy(model)
    for name, weight in zip(("alpha", "beta", "gamma"), weights.tolist(), strict=True):
        for path, delta in deltas(pool / name).items():
            with torch.no_grad():
                plain.get_submodule(path).weight += weight * delta
    return plain


def keys_and_values(model: Any, ids: list[int], past: list[tuple[Tensor, Tensor]]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Process tokens after a hand-kept list of keys and values; the longer list and the logits of the last token."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)
    begin = past[0][0].shape[2] if past else 0
    positions = torch.arange(begin, begin + len(ids))[None]
    out = model(input_ids=torch.tensor([ids]), past_key_values=cache, position_ids=positions, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers], out.logits[0, -1]


@torch.no_grad()
def slow(model: Any, pool: Path, tokenizer: Any, text: str, policy: str) -> tuple[list[int], list[Tensor], int]:
    """One row, one token at a time: tokens, their logits, and how often it was re-routed."""
    route = ByLength().route
    prompt = tokenizer(text)["input_ids"]
    plain = merged(model, pool, route(PromptBatch.from_texts((text,), tokenizer))[0])
    frozen, logits = keys_and_values(plain, prompt, [])
    past = frozen
    new: list[int] = []
    seen: list[Tensor] = []
    ended = turns = 0
    for _ in range(STEPS):
        seen.append(logits)
        new.append(int(logits.argmax()))
        said = tokenizer.decode(new)
        ends = len(sentence_end_positions(said, final=False))
        if ends > ended:
            ended, turns = ends, turns + 1
            plain = merged(model, pool, route(PromptBatch.from_texts((text.strip() + said,), tokenizer))[0])
            if policy == "prompt_frozen":
                past = keys_and_values(plain, new[:-1], frozen)[0] if new[:-1] else frozen
        if policy == "recompute":
            _, logits = keys_and_values(plain, prompt + new, [])  # no cache at all
        else:
            past, logits = keys_and_values(plain, new[-1:], past)
    return new, seen, turns


@pytest.mark.parametrize("policy", ["stale", "recompute", "prompt_frozen"])
def test_policies_equal_slow_loops(policy: str, talkative: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    expected = [slow(talkative, tiny_pool, tiny_tokenizer, text, policy) for text in TEXTS]
    assert sum(turns for _, _, turns in expected) >= 6
    fused = fused_with(copy.deepcopy(talkative), tiny_tokenizer, tiny_pool, policy)
    prompts = PromptBatch.from_texts(TEXTS, tiny_tokenizer)
    out = fused.generate(
        prompts=prompts,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for row, (new, logits, _) in enumerate(expected):
        assert out.sequences[row, -STEPS:].tolist() == new
        got = torch.stack([step[row] for step in out.logits])
        assert (got - torch.stack(logits)).abs().max() < 1e-5  # generate() hands logits out in float32


def test_policies_differ(talkative: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    said = {}
    for policy in ("stale", "recompute", "prompt_frozen"):
        fused = fused_with(copy.deepcopy(talkative), tiny_tokenizer, tiny_pool, policy)
        said[policy] = fused.generate(list(TEXTS), max_new_tokens=STEPS, do_sample=False, eos_token_id=None).tolist()
    assert said["stale"] != said["recompute"] != said["prompt_frozen"] != said["stale"]


@pytest.mark.parametrize("policy", ["recompute", "prompt_frozen"])
def test_sampled_copies_are_recomputed_apart(policy: str, talkative: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """Sampling with several sequences a prompt: each sequence's logits are those of a pass without cache over the same tokens."""
    fused = fused_with(copy.deepcopy(talkative), tiny_tokenizer, tiny_pool, policy)
    trace: list[dict[str, Any]] = []
    torch.manual_seed(3)
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": STEPS, "eos_token_id": None}
    out = fused.generate(list(TEXTS[:2]), trace=trace, output_logits=True, return_dict_in_generate=True, **options)
    assert {entry["row"] for entry in trace if entry["sentence_idx"]} == {0, 1, 2, 3}
    if policy == "prompt_frozen":
        return
    for row in range(4):
        entries = [entry for entry in trace if entry["row"] == row and entry["sentence_idx"]]
        weights = torch.tensor([entries[-1]["weights"].get(name, 0.0) for name in ("alpha", "beta", "gamma")])
        tokens = out.sequences[row][out.sequences[row] != 0].tolist()
        with torch.no_grad():
            logits = merged(talkative, tiny_pool, weights)(torch.tensor([tokens[:-1]])).logits[0, -1]
        assert (out.logits[-1][row] - logits).abs().max() < 1e-3  # the trace rounds weights to four digits


def test_other_caches_are_refused(talkative: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = fused_with(copy.deepcopy(talkative), tiny_tokenizer, tiny_pool, "recompute")
    with pytest.raises(GenerationError, match=r"kv_policy 'recompute' rewrites a dynamic cache.*use kv_policy=stale"):
        fused.generate("the cat", max_new_tokens=4, cache_implementation="static")
    fused.method.policy = "fresh"
    with pytest.raises(GenerationError, match="unknown kv_policy 'fresh'; known: stale, recompute, prompt_frozen"):
        fused.generate("the cat", max_new_tokens=4)
