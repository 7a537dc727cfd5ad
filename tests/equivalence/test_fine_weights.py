"""Weights of single layers and single ranks: qa-FLoRA against PEFT and float64, the kernels against a loop over rank-one adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dlplora.baselines.hilora import HiLoRA, HiLoRAConfig
from dlplora.baselines.qa_flora import QaFlora, QaFloraConfig, row_bytes
from dlplora.cli.main import main
from dlplora.errors import ConfigError, MethodError, RoutingError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.kernels import dense, reference
from dlplora.methods.base import FusionMethod, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.serve.deciding import require_servable
from dlplora.tasks.types import Item
from dlplora.types import PromptBatch
from tests.equivalence.merged_truth import deltas

NAMES = ("alpha", "beta", "gamma")
TEXTS = ("Mia sees the red box.", "the cat", "two three")


def samples(task: str, num: int) -> list[Item]:
    words = {"alpha": "the cat", "beta": "Mia likes", "gamma": "two three"}[task]
    return [Item(task, f"{words} {'plum ' * (i % 3)}{i}", "x") for i in range(num)]


def fuse(model: Any, tokenizer: Any, pool: Path, method: FusionMethod, **options: Any) -> FusedCausalLM:
    model = copy.deepcopy(model)
    context = MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings(), few_shot=samples)
    return FusedCausalLM(model, tokenizer, AdapterBank.from_pool(pool, NAMES), method, context=context, **options)


def planned(fused: FusedCausalLM) -> Tensor:
    return fused.route(PromptBatch.from_texts(TEXTS, fused.tokenizer)).weights  # type: ignore[union-attr]


@torch.no_grad()
def log_shares(model: Any, ids: list[int]) -> np.ndarray:
    """Log distributions (2, V) after both blocks at the last token, float64 from transformers' hidden states."""
    llama = model.base_model.model if isinstance(model, PeftModel) else model
    states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    rows = []
    for state in (llama.model.norm(states[1])[0, -1], states[2][0, -1]):
        scores = (llama.lm_head.weight.double() @ state.double()).numpy()
        rows.append(scores - scores.max() - np.log(np.exp(scores - scores.max()).sum()))
    return np.stack(rows)


def test_qa_flora_by_peft(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    found = planned(fuse(tiny_llama, tiny_tokenizer, tiny_pool, QaFlora())).double().numpy().reshape(3, 2, 3)
    adapted = [PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(tiny_pool / name)).eval() for name in NAMES]
    for row, text in enumerate(TEXTS):
        ids = tiny_tokenizer(text)["input_ids"]
        base = log_shares(tiny_llama, ids)
        divergence = np.stack([(np.exp(base) * (base - log_shares(model, ids))).sum(-1) for model in adapted], axis=-1)
        np.testing.assert_allclose(found[row], divergence / divergence.sum(-1, keepdims=True), atol=1e-5)
    assert np.abs(found[:, 0] - found[:, 1]).max() > 0.05  # blocks differ
    assert np.ptp(found, axis=0).max() > 0.05  # prompts differ


def test_every_layer_runs_under_its_own_weights(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, QaFlora())
    weights, parts = planned(fused), [deltas(tiny_pool / name) for name in NAMES]
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), fused.routing(weights):
        for path, layer in fused.patched.layers.items():
            own = weights.double().reshape(3, 2, 3)[:, int(path.split(".")[2])]
            expected = sum(own[:, e, None, None] * (x.double() @ part[path].T) for e, part in enumerate(parts))
            np.testing.assert_allclose((layer(x) - layer.base(x)).double().numpy(), expected.numpy(), atol=1e-4)
    with torch.no_grad(), fused.routing(torch.tensor([0.0, 1.0, 0.0])):  # given by a caller: every layer alike
        one = fused(input_ids=torch.tensor([[1, 5, 9]])).logits
        peft = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(tiny_pool / "beta")).eval()
        torch.testing.assert_close(one, peft(input_ids=torch.tensor([[1, 5, 9]])).logits, atol=1e-5, rtol=1e-5)
    assert fused.method.reported == {"routing_rows_per_prompt": 4}


def test_rows_are_split_by_their_predicted_memory(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """By hand for the tiny model: width 32, 2 blocks, inner width 48, 4 heads, 3 adapters of rank 6 at most."""
    tokens, vocabulary = 10, len(tiny_tokenizer)
    by_hand = tokens * (32 * 3 + 6 * 32 + 3 * 48 + 2 * 18) * 4 + 4 * tokens**2 * 4 + 3 * vocabulary * 8
    assert row_bytes(tiny_llama.config, tokens, 4, 18) == by_hand
    whole = fuse(tiny_llama, tiny_tokenizer, tiny_pool, QaFlora(QaFloraConfig(memory_mb=1)))
    expected = planned(whole)
    assert whole.method.rows_at_once(tokens) == (1 << 20) // by_hand  # type: ignore[operator]
    for rows, wanted in ((1, [1, 1, 1, 1]), (3, [3, 1])):
        split = fuse(tiny_llama, tiny_tokenizer, tiny_pool, QaFlora())
        sizes: list[int] = []

        def note(module: Any, args: Any, kwargs: Any, sizes: list[int] = sizes) -> None:
            sizes.append(len(kwargs["input_ids"]))

        split.model.model.register_forward_pre_hook(note, with_kwargs=True)
        split.method.rows_at_once = lambda tokens, rows=rows: rows  # type: ignore[method-assign, assignment]
        torch.testing.assert_close(planned(split), expected, atol=1e-5, rtol=1e-4)
        assert sizes == wanted * 3
    assert whole.method.rows_at_once(100_000) == 1  # type: ignore[operator]  # never none
    with pytest.raises(ConfigError, match="memory_mb"):
        QaFloraConfig(memory_mb=0)


def test_adapters_that_move_nothing_share_equally(tiny_llama: Any, tiny_tokenizer: Any, make_adapter: Any, tmp_path: Path) -> None:
    for name in NAMES:
        make_adapter(tmp_path / name, scale=0.0)
    torch.testing.assert_close(planned(fuse(tiny_llama, tiny_tokenizer, tmp_path, QaFlora())), torch.full((3, 6), 1 / 3))


def test_layers_apart_need_a_kernel_that_can(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    for backend in ("folded", "merged"):
        with pytest.raises(RoutingError, match=rf"'{backend}' has one weight per adapter.*'qa_flora' weights layers or ranks separately"):
            fuse(tiny_llama, tiny_tokenizer, tiny_pool, QaFlora(), backend=backend)
    expected = planned(fuse(tiny_llama, tiny_tokenizer, tiny_pool, QaFlora()))
    slow = fuse(tiny_llama, tiny_tokenizer, tiny_pool, QaFlora(), backend="reference")
    torch.testing.assert_close(planned(slow), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="weights layers separately"):
        require_servable(slow)


def test_the_harness_takes_weights_of_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options are scored and texts written under them; what is reported of a prompt is the mean over its layers."""
    command = ["eval", "--method", "qa_flora", "--tasks", "gate_colors,translate_zargi", "--limit", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    routing = json.loads(capsys.readouterr().out)["routing"]
    assert routing["routing_rows_per_prompt"] == 27
    assert routing["num_plans"] == 4
    assert 1 <= routing["mean_experts_kept"] <= 26


def test_a_layer_outside_of_the_blocks_is_refused(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    bank = AdapterBank.from_tensors(("one",), {"lm_head": [(torch.ones(2, 32), torch.ones(345, 2), 1.0)]})
    context = MethodContext(tokenizer=tiny_tokenizer, embedding=tiny_llama.get_input_embeddings())
    with pytest.raises(MethodError, match="module 'lm_head' is outside"):
        QaFlora().prepare(bank, context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_weights_of_ranks_are_the_adapters_weights(dtype: torch.dtype) -> None:
    """Bit for bit; and unequal ones are those of as many adapters of rank one."""
    generator = torch.Generator().manual_seed(0)
    x, lora_a = torch.randn(2, 5, 16, generator=generator).to(dtype), torch.randn(3, 4, 16, generator=generator).to(dtype)
    lora_b, weights = torch.randn(3, 12, 4, generator=generator).to(dtype), torch.rand(2, 5, 3, generator=generator)
    alike = weights[..., None].expand(-1, -1, -1, 4)
    assert torch.equal(dense.fused_delta(x, lora_a, lora_b, alike), dense.fused_delta(x, lora_a, lora_b, weights))
    apart = torch.rand(2, 5, 3, 4, generator=generator)
    ones = reference.fused_delta(x, lora_a.reshape(12, 1, 16), lora_b.mT.reshape(12, 12, 1), apart.flatten(-2))
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    for kernel in (dense, reference):
        torch.testing.assert_close(kernel.fused_delta(x, lora_a, lora_b, apart), ones, atol=tolerance, rtol=0.02)


RANKS = {"alpha": 4, "beta": 6, "gamma": 2}


def test_hiloras_posterior_by_hand(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """Spherical Gaussians from their density; the encoder ``features`` in float64."""

    def embedded(text: str) -> np.ndarray:
        mean = tiny_llama.get_input_embeddings().weight.detach().double().numpy()[tiny_tokenizer(text)["input_ids"]].mean(0)
        normal = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-5)
        return normal / np.linalg.norm(normal)

    method = HiLoRA(HiLoRAConfig(encoder="features", num_samples=6, temperature=0.5))
    fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)
    found = method.posteriors(PromptBatch.from_texts(TEXTS, tiny_tokenizer)).numpy()
    for row, text in enumerate(TEXTS):
        logs = []
        for name in NAMES:
            points = np.stack([embedded(item.prompt) for item in samples(name, 6)])
            variance = points.var(axis=0).mean()
            density = -0.5 * np.log(2 * np.pi * variance) - (embedded(text) - points.mean(0)) ** 2 / (2 * variance)
            logs.append(density.mean() / 0.5)
        np.testing.assert_allclose(found[row], np.exp(logs) / np.exp(logs).sum(), atol=1e-4)


def test_hilora_shares_its_budget() -> None:
    method = HiLoRA(HiLoRAConfig(encoder="features", least=2, mass=0.9, budget=0.5))
    generator = np.random.default_rng(0)
    shares, ranks = np.array([0.1, 0.5, 0.35, 0.05]), np.array([8, 8, 8, 8])
    draws = np.stack([method.allocate(shares, ranks, generator) for _ in range(4000)])
    assert set(draws.sum(1)) == {12}  # three adapters reach the mass of 0.9: half of their 24 components
    assert (draws <= 8).all()
    assert not draws[:, 3].any()
    np.testing.assert_allclose(draws.mean(0)[0], 12 * 0.1 / 0.95, atol=0.1)  # the least likely is never cut: a plain binomial
    sure = np.array([1.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(method.allocate(sure, ranks, generator), [8, 0, 0, 0])  # half of 16, all drawn for the first
    np.testing.assert_array_equal(method.allocate(sure, np.array([3, 9, 8, 8]), generator), [3, 3, 0, 0])  # the rest goes to the next


def test_hilora_token_by_token(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """The delta of every layer from single components, in float64."""
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, HiLoRA(HiLoRAConfig(encoder="features", temperature=1.0)))
    parts = planned(fused)
    counts = (parts * torch.tensor(list(RANKS.values()))).numpy()
    np.testing.assert_allclose(counts, counts.round(), atol=1e-5)
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), fused.routing(parts):
        for layer in fused.patched.layers.values():
            got = (layer(x) - layer.base(x)).double().numpy()
            a, b = layer.lora_a.double().numpy(), layer.lora_b.double().numpy()
            for row, token in np.ndindex(3, 4):
                vector, expected = x[row, token].double().numpy(), np.zeros(b.shape[1])
                for expert, rank in enumerate(RANKS.values()):
                    scores = [abs(a[expert, j] @ vector) / np.linalg.norm(a[expert, j]) for j in range(rank)]
                    for j in np.argsort(scores)[::-1][: round(float(counts[row, expert]))]:
                        expected = expected + float(layer.scaling[expert]) * (a[expert, j] @ vector) * b[expert, :, j]
                np.testing.assert_allclose(got[row, token], expected, atol=1e-4)
    assert 0 < float((parts > 0).float().mean()) <= 1


def test_all_components_are_the_adapter_bit_for_bit(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, HiLoRA(HiLoRAConfig(encoder="features")))
    ids = torch.tensor([[1, 5, 9, 40], [1, 80, 12, 3]])
    with torch.no_grad(), fused.routing(torch.tensor([1.0, 1.0, 0.0])):
        by_rank = fused(input_ids=ids).logits
        for layer in fused.patched.layers.values():
            layer.rank_gate = None
        assert torch.equal(by_rank, fused(input_ids=ids).logits)


def test_hiloras_settings_that_mean_nothing() -> None:
    for bad in ({"num_samples": 1}, {"least": 0}, {"budget": 0.0}, {"mass": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ConfigError, match="must"):
            HiLoRAConfig(**bad)
