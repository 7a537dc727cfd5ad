"""CAT against float64 sums of whole matrices, its gradient against the one of a merged model, and where it starts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlplora.baselines.cat import Cat
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.references import AvgDelta
from dlplora.modules.lora_bank import AdapterBank
from tests.equivalence.merged_truth import deltas

NAMES = ("alpha", "beta", "gamma")
IDS = torch.tensor([[1, 5, 9, 40, 33, 7], [1, 80, 12, 3, 61, 90]])


def fuse(model: Any, tokenizer: Any, pool: Path) -> FusedCausalLM:
    return FusedCausalLM(copy.deepcopy(model), tokenizer, AdapterBank.from_pool(pool, NAMES), Cat(), backend="dense")


def alpha_of(fused: FusedCausalLM, module: str) -> Tensor:
    return fused.method.weights[module.replace(".", "/")]


def draw(fused: FusedCausalLM) -> None:
    """Weights as if trained: each its own, some negative."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weights in fused.method.parameters():
            weights.copy_(torch.randn(3, generator=generator))


def merged(model: Any, fused: FusedCausalLM, pool: Path) -> tuple[Any, list[dict[str, Tensor]]]:
    """A float64 model with the weighted deltas in its weights, and the deltas."""
    parts = [deltas(pool / name) for name in NAMES]
    plain = copy.deepcopy(model).double()
    modules = dict(plain.named_modules())
    with torch.no_grad():
        for path in parts[0]:
            alpha = alpha_of(fused, path).detach().double()
            modules[path].weight += sum(alpha[i] * part[path] for i, part in enumerate(parts))
    return plain, parts


def test_a_scalar_for_every_adapter_and_module(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool)
    draw(fused)
    plain, parts = merged(tiny_llama, fused, tiny_pool)
    assert fused.method.num_trained_parameters == 3 * len(parts[0])
    with torch.no_grad():
        torch.testing.assert_close(fused(input_ids=IDS).logits.double(), plain(input_ids=IDS).logits, atol=2e-4, rtol=1e-4)


def test_its_gradient_is_the_weights_gradient_along_each_delta(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """``dL / d alpha_el = <dL / dW_l, dW_el>``, with ``dL / dW`` from a plain model that has no adapters."""
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool)
    draw(fused)
    plain, parts = merged(tiny_llama, fused, tiny_pool)

    def loss(model: Any) -> Tensor:
        logits = model(input_ids=IDS).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())

    loss(plain).backward()
    loss(fused).backward()
    modules = dict(plain.named_modules())
    sizes = []
    for path in parts[0]:
        gradient = alpha_of(fused, path).grad
        assert gradient is not None
        expected = torch.stack([(modules[path].weight.grad * part[path]).sum() for part in parts])
        torch.testing.assert_close(gradient.double(), expected, atol=1e-4, rtol=1e-3)
        sizes.append(expected.abs().min())
    assert min(sizes) > 1e-3  # every adapter of every module is pulled somewhere


def test_it_starts_as_the_average_and_reads_no_input(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool)
    average = FusedCausalLM(copy.deepcopy(tiny_llama), tiny_tokenizer, AdapterBank.from_pool(tiny_pool, NAMES), AvgDelta())
    with torch.no_grad(), average.routing(torch.full((3,), 1 / 3)):
        torch.testing.assert_close(fused(input_ids=IDS).logits, average(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    draw(fused)
    for module, layer in fused.patched.layers.items():
        weights = fused.method.gate(module, torch.randn(2, 5, layer.in_features))
        assert weights.shape == (2, 5, 3)
        assert torch.equal(weights, alpha_of(fused, module).expand(2, 5, 3))


def test_the_server_refuses_it(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """It is static, so its granularity does not say that gates hold its weights."""
    from dlplora.errors import ConfigError
    from dlplora.serve.deciding import require_servable

    with pytest.raises(ConfigError, match="'cat' has gates inside the layers"):
        require_servable(fuse(tiny_llama, tiny_tokenizer, tiny_pool))
