"""X-LoRA against PEFT's own class, with and without a cache; nothing of one request is left for the next."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, XLoraConfig, get_peft_model
from torch import Tensor

from dlplora.baselines.xlora import XLoRA, XLoRAConfig, XLoRAFrozen
from dlplora.errors import ConfigError, GenerationError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch

NAMES = ("alpha", "beta", "gamma")
IDS = torch.tensor([[1, 5, 9, 40, 33, 7], [1, 80, 12, 3, 61, 90]])
TEXTS = ("the cat sees", "Mia likes the plum. Who likes it?", "a")


def fuse(model: Any, tokenizer: Any, pool: Path, method: Any, sharp: float = 8.0) -> FusedCausalLM:
    fused = FusedCausalLM(copy.deepcopy(model), tokenizer, AdapterBank.from_pool(pool, NAMES), method)
    with torch.no_grad():
        method.weight.mul_(sharp)
        method.bias.add_(torch.linspace(-0.5, 0.5, method.bias.numel()).view_as(method.bias))
    return fused


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> Tensor:
    return model(input_ids=IDS, **kwargs).logits


@pytest.mark.parametrize("layerwise", [False, True])
def test_it_is_pefts(layerwise: bool, tiny_llama: Any, tiny_tokenizer: Any, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    for seed, name in enumerate(NAMES):
        make_adapter(tmp_path / name, seed=seed, lora_alpha=3 + 4 * seed)
    method = XLoRA(XLoRAConfig(layerwise=layerwise, temperature=0.7))
    ours = fuse(tiny_llama, tiny_tokenizer, tmp_path, method)
    base = copy.deepcopy(tiny_llama)
    base.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        xlora_depth=1,
        softmax_temperature=0.7,
        layerwise_scalings=layerwise,
        adapters={str(i): str(tmp_path / name) for i, name in enumerate(NAMES)},
    )
    theirs = get_peft_model(base, config).eval()
    (head,) = [module for name, module in theirs.named_modules() if name.endswith("internal_xlora_classifier")]
    with torch.no_grad():
        head.layers[-1].weight.copy_(method.weight.flatten(0, 1))
        head.layers[-1].bias.copy_(method.bias.flatten())
    expected = logits(theirs)
    assert float((expected - logits(tiny_llama)).abs().max()) > 0.05
    torch.testing.assert_close(logits(ours, use_cache=False), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)


def test_decoding_with_a_cache_is_decoding_without(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, XLoRA())
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        for texts in (TEXTS[:1], TEXTS):
            with_cache = fused.generate(list(texts), max_new_tokens=10, use_cache=True, **options)
            without = fused.generate(list(texts), max_new_tokens=10, use_cache=False, **options)
            assert torch.equal(with_cache, without)


def test_requests_leave_nothing_behind(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, XLoRA())
    first = logits(fused)
    told = fused.generate(list(TEXTS), max_new_tokens=8, do_sample=False)
    assert torch.equal(logits(fused), first)
    with pytest.raises(IndexError):
        fused(input_ids=torch.tensor([[10**6]]))
    assert torch.equal(logits(fused), first)
    assert torch.equal(fused.generate(list(TEXTS), max_new_tokens=8, do_sample=False), told)
    with torch.no_grad():  # two requests, step by step in turn
        one = fused(input_ids=IDS[:1, :3], use_cache=True)
        two = fused(input_ids=IDS[1:, :4], use_cache=True)
        one_end = fused(input_ids=IDS[:1, 3:], past_key_values=one.past_key_values, use_cache=True).logits
        two_end = fused(input_ids=IDS[1:, 4:], past_key_values=two.past_key_values, use_cache=True).logits
    torch.testing.assert_close(one_end, first[:1, 3:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(two_end, first[1:, 4:], atol=1e-5, rtol=1e-5)


def test_a_cache_filled_elsewhere_is_refused(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    from transformers import StaticCache

    with torch.no_grad():
        foreign = tiny_llama(input_ids=IDS[:, :3], use_cache=True).past_key_values
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, XLoRA())
    with pytest.raises(GenerationError, match="holds 3 tokens, the first pass has read 0"):
        fused(input_ids=IDS[:, 3:], past_key_values=foreign)
    with pytest.raises(GenerationError, match="needs DynamicCache, got StaticCache"):
        fused(input_ids=IDS, past_key_values=StaticCache(config=tiny_llama.config, max_cache_len=16))


def test_limits(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    method = XLoRA()
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)
    with torch.no_grad():
        method.bias.copy_(torch.tensor([[0.0, 1e4, 0.0]]))
    adapted = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(tiny_pool / "beta")).eval()
    torch.testing.assert_close(logits(fused), logits(adapted), atol=1e-5, rtol=1e-5)
    off = fuse(tiny_llama, tiny_tokenizer, tiny_pool, XLoRA(XLoRAConfig(global_scaling_weight=0.0)))
    torch.testing.assert_close(logits(off), logits(tiny_llama), atol=1e-6, rtol=1e-6)
    with pytest.raises(ConfigError, match="temperature"):
        XLoRAConfig(temperature=0.0)


def test_frozen_weights_are_those_of_the_last_prompt_token(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    method = XLoRAFrozen()
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)
    plan = fused.route(PromptBatch.from_texts(TEXTS, tiny_tokenizer))
    assert plan is not None
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = tiny_llama(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1].double()
        expected = (hidden @ method.weight.detach().double().T + method.bias.detach().double()).softmax(0)
        torch.testing.assert_close(plan.weights[row].double(), expected, atol=1e-5, rtol=1e-5)
