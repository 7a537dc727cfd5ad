"""Models that several comparisons share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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
