"""Merges against float64 loops over the entries, and against PEFT where PEFT does the same thing; every trap of PEFT's merges."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from dlplora.baselines.averages import AvgFactor, RandomRoute
from dlplora.baselines.merges import DareLinear, DareTies, MagnitudePrune, MergeConfig, SVDMerge, Ties, factored
from dlplora.errors import AdapterError, ConfigError, IncompatibleAdapterError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import MethodContext
from dlplora.methods.registry import build_method
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch
from tests.equivalence.merged_truth import deltas

NAMES = ("alpha", "beta", "gamma")
MERGES = {"svd": SVDMerge, "magnitude_prune": MagnitudePrune, "ties": Ties, "dare_linear": DareLinear, "dare_ties": DareTies}


def context(tokenizer: Any, model: Any, seed: int = 0) -> MethodContext:
    return MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings(), seed=seed)


def merged(method: Any, pool: Path, tokenizer: Any, model: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """The merged delta of every module in float64."""
    bank = method.prepare(AdapterBank.from_pool(pool), context(tokenizer, model, seed))
    assert bank.names == ("merged",)
    return {
        path: float(entry.scaling[0]) * entry.lora_b[0].double().numpy() @ entry.lora_a[0].double().numpy()
        for path, entry in bank.modules.items()
    }


def truths(pool: Path) -> dict[str, list[np.ndarray]]:
    read = [deltas(pool / name) for name in NAMES]
    return {path: [one[path].numpy() for one in read] for path in read[0]}


def trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    order = np.argsort(-np.abs(delta), axis=None, kind="stable")[: int(density * delta.size)]
    out = np.zeros(delta.size)
    out[order] = delta.flatten()[order]
    return out.reshape(delta.shape)


def ties_by_hand(taus: list[np.ndarray], weight: float, how: str) -> np.ndarray:
    out = np.zeros(taus[0].shape)
    for place in np.ndindex(*out.shape):
        values = [tau[place] for tau in taus]
        vote = sum(values) if how == "total" else sum(np.sign(values))
        sign = 1 if vote >= 0 else -1
        agreeing = [value for value in values if np.sign(value) == sign]
        out[place] = weight * sum(agreeing) / max(1, len(agreeing))
    return out


@pytest.mark.parametrize("how", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_ties_entry_by_entry(how: Any, density: float, tiny_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    method = Ties(MergeConfig(density=density, weight=0.7, majority_sign_method=how))
    for path, delta in merged(method, tiny_pool, tiny_tokenizer, tiny_llama).items():
        taus = [trimmed(tau, density) if density < 1 else tau for tau in truths(tiny_pool)[path]]
        np.testing.assert_allclose(delta, ties_by_hand(taus, 0.7, how), atol=2e-5)


def test_pruned_average_entry_by_entry(tiny_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    for path, delta in merged(MagnitudePrune(MergeConfig(density=0.3)), tiny_pool, tiny_tokenizer, tiny_llama).items():
        np.testing.assert_allclose(delta, sum(trimmed(tau, 0.3) for tau in truths(tiny_pool)[path]) / 3, atol=2e-5)


def test_svd_is_the_truncated_average(tiny_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    for rank in (None, 2, 99):
        for path, delta in merged(SVDMerge(MergeConfig(svd_rank=rank)), tiny_pool, tiny_tokenizer, tiny_llama).items():
            average = sum(truths(tiny_pool)[path]) / 3
            u, s, vt = np.linalg.svd(average, full_matrices=False)
            keep = {None: 6, 2: 2, 99: len(s)}[rank]  # without a rank: the largest of the pool
            np.testing.assert_allclose(delta, (u[:, :keep] * s[:keep]) @ vt[:keep], atol=2e-5)


@pytest.mark.parametrize("cls", [DareLinear, DareTies])
def test_dare_keeps_entries_or_drops_them(cls: Any, tiny_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    """Every entry is a sum over a subset of the rescaled entries; the share kept is the density; seed and name decide."""
    density = 0.4
    method = cls(MergeConfig(density=density, weight=1.0))
    first = merged(method, tiny_pool, tiny_tokenizer, tiny_llama)
    kept = []
    for path, delta in first.items():
        parts = [tau / density for tau in truths(tiny_pool)[path]]
        options = np.stack([sum((parts[i] for i in range(3) if bits >> i & 1), np.zeros_like(delta)) for bits in range(8)])
        if cls is DareLinear:
            gap = np.abs(options - delta)
            assert float(gap.min(0).max()) < 1e-4
            kept += [bin(int(bits)).count("1") / 3 for bits in gap.argmin(0).flatten()]
    if cls is DareLinear:
        assert np.mean(kept) == pytest.approx(density, abs=0.03)
    again = merged(cls(MergeConfig(density=density, weight=1.0)), tiny_pool, tiny_tokenizer, tiny_llama)
    other = merged(cls(MergeConfig(density=density, weight=1.0)), tiny_pool, tiny_tokenizer, tiny_llama, seed=1)
    for path, delta in first.items():
        np.testing.assert_array_equal(delta, again[path])
        assert np.abs(delta - other[path]).max() > 0.01


def test_dare_leaves_the_global_generator_alone(tiny_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    merged(DareLinear(MergeConfig()), tiny_pool, tiny_tokenizer, tiny_llama)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("expert", NAMES)
def test_one_adapter_alone_is_that_adapter(name: str, expert: str, tiny_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    """At density 1 and weight 1, rsLoRA and mixed alpha included: the trap of PEFT's merged scaling."""
    method = MERGES[name](MergeConfig(density=1.0, weight=1.0))
    bank = AdapterBank.from_pool(tiny_pool, [expert])
    fused = FusedCausalLM(copy.deepcopy(tiny_llama), tiny_tokenizer, bank, method, context=context(tiny_tokenizer, tiny_llama))
    ids = torch.tensor([[1, 5, 9, 40, 33, 7]])
    adapted = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(tiny_pool / expert)).eval()
    with torch.no_grad(), fused.routing(torch.ones(1)):
        torch.testing.assert_close(fused(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_svd_equals_pefts_where_alpha_and_rank_agree(
    make_adapter: Callable[..., Path], tiny_tokenizer: Any, tiny_llama: Any, tmp_path: Path
) -> None:
    for seed, name in enumerate(NAMES):
        make_adapter(tmp_path / name, seed=seed, r=4, lora_alpha=4)
    adapted = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(tmp_path / "alpha"), adapter_name="alpha")
    for name in NAMES[1:]:
        adapted.load_adapter(str(tmp_path / name), adapter_name=name)
    adapted.add_weighted_adapter(list(NAMES), [1 / 3] * 3, "sum", combination_type="svd", svd_rank=4)
    adapted.set_adapter("sum")
    adapted.eval()  # PEFT leaves the new adapter's dropout in training mode
    fused = FusedCausalLM(copy.deepcopy(tiny_llama), tiny_tokenizer, AdapterBank.from_pool(tmp_path), SVDMerge())
    ids = torch.tensor([[1, 5, 9, 40, 33, 7]])
    with torch.no_grad(), fused.routing(torch.ones(1)):
        torch.testing.assert_close(fused(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=2e-5, rtol=1e-5)


def test_half_precision_adapters_are_merged_in_float32(
    make_adapter: Callable[..., Path], tiny_tokenizer: Any, tiny_llama: Any, tmp_path: Path
) -> None:
    for seed, name in enumerate(NAMES):
        make_adapter(tmp_path / name, seed=seed, dtype=torch.bfloat16)
    bank = AdapterBank.from_pool(tmp_path, dtype=torch.bfloat16)
    single = Ties(MergeConfig(density=0.5)).prepare(bank, context(tiny_tokenizer, tiny_llama))
    exact = Ties(MergeConfig(density=0.5)).prepare(AdapterBank.from_pool(tmp_path), context(tiny_tokenizer, tiny_llama))
    for path, entry in single.modules.items():
        assert entry.lora_a.dtype == torch.bfloat16
        got = entry.lora_b[0].float() @ entry.lora_a[0].float()
        wanted = exact.modules[path].lora_b[0] @ exact.modules[path].lora_a[0]
        assert float((got - wanted).norm() / wanted.norm()) < 0.01  # only the storage is rounded


EVERY_MERGE = [*MERGES, "avg_factor", "avg_core", "ties_core", "dare_core", "tsv", "iso_c", "knots_ties", "wudi", "wudi_adam"]


def fused_merge(name: str, pool: Path, tokenizer: Any, model: Any, dtype: torch.dtype = torch.float32) -> FusedCausalLM:
    """The preset's own settings on a fresh base model; nobody calls ``eval`` on it."""
    backbone = copy.deepcopy(model).to(dtype)
    bank = AdapterBank.from_pool(pool, dtype=dtype)
    return FusedCausalLM(backbone, tokenizer, bank, build_method(name), context=context(tokenizer, backbone))


@pytest.mark.parametrize("name", EVERY_MERGE)
def test_a_merged_adapter_has_no_dropout(name: str, uniform_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    """PEFT's new adapter comes up with its dropout in training mode. The experts here were trained with dropout 0.1."""
    backbone = copy.deepcopy(tiny_llama).train()
    method = build_method(name)
    fused = FusedCausalLM(backbone, tiny_tokenizer, AdapterBank.from_pool(uniform_pool), method, context=context(tiny_tokenizer, backbone))
    assert not any(module.training for module in fused.modules())
    ids = torch.tensor([[1, 5, 9, 40, 33, 7]])
    with torch.no_grad(), fused.routing(torch.ones(1)):
        assert torch.equal(fused(input_ids=ids).logits, fused(input_ids=ids).logits)


@pytest.mark.parametrize("name", EVERY_MERGE)
def test_a_second_merge_is_a_new_one(name: str, uniform_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    """PEFT keeps the old adapter silently if the name is taken; ours is called ``merged`` each time and made again."""
    method = build_method(name)
    told = context(tiny_tokenizer, tiny_llama)
    method.prepare(AdapterBank.from_pool(uniform_pool, ["alpha", "beta"]), told)
    again = method.prepare(AdapterBank.from_pool(uniform_pool, ["beta", "gamma"]), told)
    fresh = build_method(name).prepare(AdapterBank.from_pool(uniform_pool, ["beta", "gamma"]), told)
    assert again.names == fresh.names == ("merged",)
    assert again.checksum() == fresh.checksum()
    with pytest.raises(AdapterError, match="adapter names must be unique"):
        AdapterBank(("merged", "merged"), again.modules)


@pytest.mark.parametrize("name", EVERY_MERGE)
def test_a_half_precision_pool_stays_in_half_precision(name: str, uniform_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    """PEFT turns such adapters into float32 when it loads them, unless it is told not to."""
    fused = fused_merge(name, uniform_pool, tiny_tokenizer, tiny_llama, torch.bfloat16)
    for entry in fused.bank.modules.values():
        assert (entry.lora_a.dtype, entry.lora_b.dtype) == (torch.bfloat16, torch.bfloat16)
    for layer in fused.patched.layers.values():
        assert (layer.lora_a.dtype, layer.lora_b.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("name", EVERY_MERGE)
def test_a_merge_of_half_precision_factors_is_computed_in_float32(
    name: str, make_adapter: Callable[..., Path], tiny_tokenizer: Any, tiny_llama: Any, tmp_path: Path
) -> None:
    """The same rounded factors, once stored as bfloat16 and once as float32: only the storage of the result may differ."""
    for seed, expert in enumerate(NAMES):
        make_adapter(tmp_path / expert, seed=seed, dtype=torch.bfloat16)
    told = context(tiny_tokenizer, tiny_llama)
    half = build_method(name).prepare(AdapterBank.from_pool(tmp_path, dtype=torch.bfloat16), told)
    full = build_method(name).prepare(AdapterBank.from_pool(tmp_path, dtype=torch.float32), told)
    for path, entry in half.modules.items():
        assert torch.equal(entry.lora_a, full.modules[path].lora_a.bfloat16())
        assert torch.equal(entry.lora_b, full.modules[path].lora_b.bfloat16())


@pytest.mark.parametrize("name", EVERY_MERGE)
def test_a_merge_wants_no_gradients(name: str, uniform_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    """PEFT's ``set_adapter`` asks for gradients again; a merge has nothing to train, and neither has what is under it."""
    before = [parameter.requires_grad_(False) for parameter in tiny_llama.parameters()]
    assert before
    fused = fused_merge(name, uniform_pool, tiny_tokenizer, tiny_llama)
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    for layer in fused.patched.layers.values():
        assert not layer.lora_a.requires_grad
        assert not layer.lora_b.requires_grad
    ids = torch.tensor([[1, 5, 9]])
    with fused.routing(torch.ones(1)):
        assert not fused(input_ids=ids).logits.requires_grad


def test_adapters_that_train_biases_are_refused(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT loads one such adapter and fails at the second; a merge would lose the biases."""
    make_adapter(tmp_path / "alpha", seed=1)
    make_adapter(tmp_path / "beta", seed=2, bias="lora_only")
    with pytest.raises(AdapterError, match=r"beta.*bias is 'lora_only'"):
        AdapterBank.from_pool(tmp_path)


def test_factored_is_exact_or_the_best() -> None:
    delta = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    lora_a, lora_b = factored(delta, None)
    torch.testing.assert_close(lora_b @ lora_a, delta, atol=1e-5, rtol=1e-5)
    assert [part.shape for part in factored(delta, 2)] == [(2, 5), (7, 2)]


def test_average_of_factors_by_hand(uniform_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    bank = AdapterBank.from_pool(uniform_pool)
    for path, delta in merged(AvgFactor(), uniform_pool, tiny_tokenizer, tiny_llama).items():
        entry = bank.modules[path]
        mean_a = entry.lora_a.double().numpy().mean(0)
        mean_b = (entry.scaling.double().numpy()[:, None, None] * entry.lora_b.double().numpy()).mean(0)
        np.testing.assert_allclose(delta, mean_b @ mean_a, atol=1e-5)
        cross = sum(truths(uniform_pool)[path]) / 3
        assert np.abs(delta - cross).max() > 0.05  # it is not the average of the deltas


def test_average_of_factors_needs_one_rank(tiny_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    with pytest.raises(IncompatibleAdapterError, match=r"'avg_factor'.*alpha 4, beta 6, gamma 2"):
        merged(AvgFactor(), tiny_pool, tiny_tokenizer, tiny_llama)


def test_random_expert_is_uniform_and_a_function_of_prompt_and_seed(tiny_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    texts = [f"the cat {i} sees {j}" for i in range(20) for j in range(15)]
    prompts = PromptBatch.from_texts(texts, tiny_tokenizer)
    rows = []
    for seed in (0, 0, 1):
        method = RandomRoute()
        method.prepare(AdapterBank.from_pool(tiny_pool), context(tiny_tokenizer, tiny_llama, seed))
        rows.append(method.route(prompts))
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    counts = rows[0].sum(0).tolist()
    assert sum(counts) == 300
    assert all(70 < count < 130 for count in counts)
    assert torch.equal(method.route(PromptBatch.from_texts(texts[7:8], tiny_tokenizer)), rows[2][7:8])


@pytest.mark.parametrize(("options", "part"), [({"density": 0.0}, "density"), ({"density": 1.1}, "density"), ({"svd_rank": 0}, "svd_rank")])
def test_settings_out_of_range(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        build_method("ties", options)
