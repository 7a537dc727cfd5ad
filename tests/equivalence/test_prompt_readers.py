"""LoGo against PEFT's adapters and float64; ARIADNE and AdapterSoup against float64 loops."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dlplora.baselines.logo import LoGo, LoGoConfig
from dlplora.baselines.prototypes import AdapterSoup, AdapterSoupConfig, Ariadne, AriadneConfig
from dlplora.errors import ConfigError, MethodError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import FusionMethod, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.tasks.types import Item
from dlplora.types import PromptBatch
from tests.equivalence.merged_truth import deltas

NAMES = ("alpha", "beta", "gamma")
QUERIES = ("the cat sees", "Mia likes two", "three two", "a plum")
LAST_QUERY = "model.layers.1.self_attn.q_proj"


def samples(task: str, num: int) -> list[Item]:
    words = {"alpha": "the cat", "beta": "Mia likes", "gamma": "two three"}[task]
    return [Item(task, f"{words} {'plum ' * (i % 3)}{i}", "x") for i in range(num)]


def fuse(model: Any, tokenizer: Any, pool: Path, method: FusionMethod, names: Sequence[str] = NAMES) -> FusedCausalLM:
    model = copy.deepcopy(model)
    context = MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings(), few_shot=samples)
    return FusedCausalLM(model, tokenizer, AdapterBank.from_pool(pool, names), method, context=context)


def weights(fused: FusedCausalLM, tasks: Sequence[str] | None = None) -> np.ndarray:
    return fused.route(PromptBatch.from_texts(QUERIES, fused.tokenizer, task_names=tasks)).weights.double().numpy()  # type: ignore[union-attr]


def all_adapters(model: Any, pool: Path) -> Any:
    """PEFT's model with every adapter active at weight one."""
    peft = PeftModel.from_pretrained(copy.deepcopy(model), str(pool / "alpha"), adapter_name="alpha")
    for name in NAMES[1:]:
        peft.load_adapter(str(pool / name), adapter_name=name)
    peft.base_model.set_adapter(list(NAMES))
    return peft.eval()


@torch.no_grad()
def read_by_peft(peft: Any, ids: list[int], reads: str) -> Tensor:
    """What the last query projection gets at the last token, or the hidden state before the last block."""
    seen: list[Tensor] = []
    module = peft.base_model.model.get_submodule(LAST_QUERY)
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, -1]))
    states = peft(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    hook.remove()
    return states[1][0, -1] if reads == "residual" else seen[0]


@pytest.mark.parametrize("reads", ["input", "residual"])
@pytest.mark.parametrize(("score", "top_k"), [("norm", 2), ("entropy", 2), ("norm", 20)])
def test_logo_reads_what_peft_computes(score: Any, top_k: int, reads: Any, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, LoGo(LoGoConfig(score=score, reads=reads, top_k=top_k)))
    peft = all_adapters(tiny_llama, tiny_pool)
    parts = [deltas(tiny_pool / name)[LAST_QUERY].numpy() for name in NAMES]
    found = weights(fused)
    for row, text in enumerate(QUERIES):
        hidden = read_by_peft(peft, tiny_tokenizer(text)["input_ids"], reads).double().numpy()
        scores = []
        for part in parts:
            answer = part @ hidden
            shares = np.exp(answer - answer.max()) / np.exp(answer - answer.max()).sum()
            scores.append(np.linalg.norm(answer) if score == "norm" else 1 / (1e-6 - (shares * np.log(shares + 1e-30)).sum()))
        kept = np.argsort(scores)[::-1][:top_k]
        expected = [scores[e] / sum(scores[k] for k in kept) if e in kept else 0.0 for e in range(3)]
        np.testing.assert_allclose(found[row], expected, atol=2e-5)
    assert np.ptp(found, axis=0).max() > 1e-3  # prompts differ


def test_an_adapter_without_the_projection_takes_no_part(tiny_llama: Any, tiny_tokenizer: Any, make_adapter: Any, tmp_path: Path) -> None:
    make_adapter(tmp_path / "all", seed=1)
    make_adapter(tmp_path / "values", seed=2, target_modules=["v_proj"])
    for score in ("norm", "entropy"):
        fused = fuse(tiny_llama, tiny_tokenizer, tmp_path, LoGo(LoGoConfig(score=score)), ("all", "values"))
        np.testing.assert_array_equal(weights(fused), [[1.0, 0.0]] * 4)
    with pytest.raises(MethodError, match=r"reads a query projection .* the pool adapts none"):
        fuse(tiny_llama, tiny_tokenizer, tmp_path, LoGo(), ("values",))


def embedded(model: Any, tokenizer: Any, text: str) -> np.ndarray:
    """The encoder ``features`` in float64."""
    table = model.get_input_embeddings().weight.detach().double().numpy()
    mean = table[tokenizer(text)["input_ids"]].mean(0)
    normal = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-5)
    return normal / np.linalg.norm(normal)


def test_ariadnes_centroids_are_a_fixed_point_and_the_nearest_wins(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """Every centroid is the mean of the inputs that are nearest to it: what k-means ends with."""
    method = Ariadne(AriadneConfig(encoder="features", num_samples=30, num_centroids=3))
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)
    centroids, owners = method.centroids.double().numpy(), method.owners.numpy()
    for expert, name in enumerate(NAMES):
        points = np.stack([embedded(tiny_llama, tiny_tokenizer, item.prompt) for item in samples(name, 30)])
        own = centroids[owners == expert]
        assert 1 < len(own) <= 3
        member = np.linalg.norm(points[:, None] - own[None], axis=-1).argmin(1)
        np.testing.assert_allclose(own, [points[member == index].mean(0) for index in range(len(own))], atol=1e-5)
    queries = np.stack([embedded(tiny_llama, tiny_tokenizer, text) for text in QUERIES])
    best = owners[np.linalg.norm(queries[:, None] - centroids[None], axis=-1).argmin(1)]
    np.testing.assert_array_equal(weights(fused), np.eye(3)[best])
    assert len(set(best)) > 1


def test_one_centroid_is_the_mean(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    method = Ariadne(AriadneConfig(encoder="features", num_samples=5, num_centroids=1))
    fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)
    expected = [np.mean([embedded(tiny_llama, tiny_tokenizer, item.prompt) for item in samples(name, 5)], axis=0) for name in NAMES]
    np.testing.assert_allclose(method.centroids.double().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_adapter_soup_by_hand(leave_one_out: bool, tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path) -> None:
    config = AdapterSoupConfig(encoder="features", num_samples=6, top_k=2, leave_one_out=leave_one_out)
    fused = fuse(tiny_llama, tiny_tokenizer, uniform_pool, AdapterSoup(config))
    means = [np.mean([embedded(tiny_llama, tiny_tokenizer, item.prompt) for item in samples(name, 6)], axis=0) for name in NAMES]
    tasks = ("gamma", "alpha", "beta", "gamma")
    found = weights(fused, tasks)
    for row, task in enumerate(tasks):
        own = NAMES.index(task)
        cosines = [mean @ means[own] / np.linalg.norm(mean) if not leave_one_out or e != own else -9 for e, mean in enumerate(means)]
        np.testing.assert_allclose(found[row], [0.5 if e in np.argsort(cosines)[1:] else 0.0 for e in range(3)])
    assert bool(found[1, 0] == 0.0) is leave_one_out
    for tasks_given in (None, ("gama",) * 4):
        with pytest.raises(MethodError, match="has no task"):
            weights(fused, tasks_given)


def test_settings_that_mean_nothing(tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path) -> None:
    bad: list[tuple[Any, dict[str, Any]]] = [
        (LoGoConfig, {"top_k": 0}), (AriadneConfig, {"num_centroids": 0}), (AriadneConfig, {"num_samples": 0}),
        (AdapterSoupConfig, {"top_k": 0}),
    ]  # fmt: skip
    for cls, settings in bad:
        with pytest.raises(ConfigError, match="must be at least 1"):
            cls(**settings)
    alone = AdapterSoup(AdapterSoupConfig(encoder="features", leave_one_out=True))
    with pytest.raises(MethodError, match="needs two adapters"):
        fuse(tiny_llama, tiny_tokenizer, uniform_pool, alone, ("alpha",))
