"""Models that several comparisons share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import FusionMethod, MethodContext
from dlplora.modules.lora_bank import AdapterBank


@pytest.fixture
def talkative(tiny_llama: Any, tiny_tokenizer: Any) -> Any:
    """A tiny float32 model with a head that prefers full stops and words and never ends: it speaks in sentences."""
    bias = torch.full((len(tiny_tokenizer),), -30.0)
    words = [" the", " cat", " Mia", " sees", " box", ".", "!", " two", "?", "\n"]
    bias[[tiny_tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]] = 0.0
    tiny_llama.lm_head = nn.Linear(32, len(tiny_tokenizer))
    with torch.no_grad():
        tiny_llama.lm_head.weight.normal_(0, 1.5, generator=torch.Generator().manual_seed(9))
        tiny_llama.lm_head.bias.copy_(bias)
    return tiny_llama


@pytest.fixture
def fuse(talkative: Any, tiny_tokenizer: Any, tiny_pool: Path) -> Callable[..., FusedCausalLM]:
    """Factory: a method on a copy of ``talkative`` with the tiny pool."""

    def make(method: FusionMethod, backend: str = "auto") -> FusedCausalLM:
        model = copy.deepcopy(talkative)
        context = MethodContext(tokenizer=tiny_tokenizer, embedding=model.get_input_embeddings())
        return FusedCausalLM(model, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), method, backend=backend, context=context)

    return make


@pytest.fixture
def double(talkative: Any) -> Any:
    """``talkative`` in float64."""
    return talkative.double()


@pytest.fixture
def truths(double: Any, tiny_tokenizer: Any, tiny_pool: Path) -> dict[str, dict[str, list[int]]]:
    """What the unpatched model, PEFT with ``beta`` and the slow loop say to each text."""
    from tests.equivalence.test_kv_policy import STEPS, TEXTS, slow

    prompts = {text: tiny_tokenizer(text, return_tensors="pt") for text in TEXTS}
    fixed = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    adapted = PeftModel.from_pretrained(copy.deepcopy(double), str(tiny_pool / "beta"), autocast_adapter_dtype=False).double()
    found = {
        name: {text: model.generate(**ids, **fixed)[0, ids["input_ids"].shape[1] :].tolist() for text, ids in prompts.items()}
        for name, model in (("base", double), ("beta", adapted))
    }
    assert found["base"] != found["beta"]
    return {**found, "auto": {text: slow(double, tiny_pool, tiny_tokenizer, text, "stale")[0] for text in TEXTS}}
