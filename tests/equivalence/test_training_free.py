"""Arrow against PEFT's own; SpectR, LAG and the retrievers against float64 loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import ArrowConfig
from peft.tuners.lora.arrow import create_arrow_model
from torch import Tensor

from dlplora.baselines.arrow import Arrow, ArrowFactor, Lag, LagConfig, ScoreConfig, SpectR, SpectrConfig, prototypes
from dlplora.baselines.retriever import Lorauter, LorauterConfig, RetrieverConfig, RetrieverFusion, RetrieverMixture
from dlplora.errors import ConfigError, MethodError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import FusionMethod, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.tasks.types import Item
from dlplora.types import PromptBatch
from tests.equivalence.merged_truth import deltas

NAMES = ("alpha", "beta", "gamma")
IDS = torch.tensor([[1, 5, 9, 40, 33, 7], [1, 80, 12, 3, 61, 90]])
WORDS = {"alpha": "the cat", "beta": "Mia likes", "gamma": "two three"}


def samples(task: str, num: int) -> list[Item]:
    return [Item(task, f"{WORDS[task]} {i}", "x") for i in range(num)]


def fuse(model: Any, tokenizer: Any, pool: Path, method: FusionMethod, names: tuple[str, ...] = NAMES) -> FusedCausalLM:
    model = copy.deepcopy(model)
    context = MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings(), few_shot=samples)
    return FusedCausalLM(model, tokenizer, AdapterBank.from_pool(pool, names), method, context=context)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def plain_pool(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that PEFT's Arrow accepts: one rank, one alpha."""
    folder = tmp_path_factory.mktemp("plain_pool")
    for seed, name in enumerate(NAMES):
        make_adapter(folder / name, seed=seed + 1)
    return folder


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 1.0), (3, 0.5)])
def test_arrow_is_pefts(top_k: int, temperature: float, tiny_llama: Any, tiny_tokenizer: Any, plain_pool: Path) -> None:
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    theirs = create_arrow_model(copy.deepcopy(tiny_llama), [str(plain_pool / name) for name in NAMES], config).eval()
    logits(theirs)  # the prototypes are made at the first forward, by fifteen steps of power iteration
    exact = {path: prototypes(entry) for path, entry in AdapterBank.from_pool(plain_pool, NAMES).modules.items()}
    replaced = 0
    for path, module in theirs.named_modules():
        arrow = getattr(module, "lora_arrow", None)
        if arrow is not None and "arrow_router" in arrow:
            own = exact[path.removeprefix("base_model.model.")]
            made = arrow["arrow_router"].prototypes
            assert float((made * own).sum(-1).abs().min()) > 0.97  # the same directions, up to sign and iteration
            arrow["arrow_router"].prototypes = own.clone()
            replaced += 1
    assert replaced == 4
    ours = fuse(tiny_llama, tiny_tokenizer, plain_pool, Arrow(ScoreConfig(top_k=top_k, temperature=temperature)))
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


def test_prototypes_are_singular_vectors(tiny_pool: Path) -> None:
    found = AdapterBank.from_pool(tiny_pool).modules
    for index, name in enumerate(NAMES):
        for path, delta in deltas(tiny_pool / name).items():
            _, _, vt = np.linalg.svd(delta.numpy())
            assert abs(float(prototypes(found[path])[index].double().numpy() @ vt[0])) == pytest.approx(1.0, abs=1e-6)


def layer_truth(
    fused: FusedCausalLM, pool: Path, weigh: Callable[[np.ndarray, list[np.ndarray]], np.ndarray], factor: bool = False
) -> None:
    """The output of every fused layer on random input, token by token in float64."""
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))
    known = [deltas(pool / name) for name in NAMES]
    for path, layer in fused.patched.layers.items():
        with torch.no_grad():
            got = (layer(x) - layer.base(x)).double().numpy()
        parts = [one[path].numpy() for one in known]
        for b, t in np.ndindex(2, 3):
            token = x[b, t].double().numpy()
            weights = weigh(token, parts)
            if factor:
                a = sum(w * layer.lora_a[e].double().numpy() for e, w in enumerate(weights))
                bb = sum(w * float(layer.scaling[e]) * layer.lora_b[e].double().numpy() for e, w in enumerate(weights))
                expected = bb @ (a @ token)
            else:
                expected = sum(w * part @ token for w, part in zip(weights, parts, strict=True))
            np.testing.assert_allclose(got[b, t], expected, atol=2e-4)


def softmax_of_best(scores: np.ndarray, k: int, temperature: float = 1.0) -> np.ndarray:
    out, best = np.zeros(len(scores)), np.argsort(-scores)[:k]
    values = np.exp((scores[best] - scores[best].max()) / temperature)
    out[best] = values / values.sum()
    return out


def arrow_scores(token: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    return np.array([abs(np.linalg.svd(part)[2][0] @ token) for part in parts])


def test_arrow_with_factors_token_by_token(tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, uniform_pool, ArrowFactor(ScoreConfig(top_k=2)))
    layer_truth(fused, uniform_pool, lambda token, parts: softmax_of_best(arrow_scores(token, parts), 2), factor=True)


def spectral_scores(score: str, token: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    """The length of the answer, or of the token within the row space of the delta."""
    if score == "response":
        return np.array([np.linalg.norm(part @ token) for part in parts])
    return np.array([np.linalg.norm(np.linalg.svd(part)[2][: np.linalg.matrix_rank(part, tol=1e-6)] @ token) for part in parts])


SCORES = pytest.mark.parametrize("score", ["projection", "response"])


@SCORES
def test_spectr_token_by_token(score: Any, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """The pool's ranks differ, so some experts have fewer directions than the bank has room for."""
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, SpectR(SpectrConfig(top_k=2, temperature=3.0, score=score)))
    layer_truth(fused, tiny_pool, lambda token, parts: softmax_of_best(spectral_scores(score, token, parts), 2, 3.0))


@SCORES
def test_lag_token_by_token(score: Any, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, Lag(LagConfig(shortlist=2, score=score)))

    def weigh(token: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
        scores = spectral_scores(score, token, parts)
        listed = np.argsort(-arrow_scores(token, parts))[:2]
        masked = np.full(3, -np.inf)
        masked[listed] = scores[listed]
        return softmax_of_best(masked, 1)

    layer_truth(fused, tiny_pool, weigh)


def test_the_sign_of_a_prototype_does_not_matter(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    method = Arrow()
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)
    expected = logits(fused)
    method._prototypes = {path: -vectors for path, vectors in method._prototypes.items()}
    assert torch.equal(logits(fused), expected)


def embedded(model: Any, tokenizer: Any, text: str) -> np.ndarray:
    """The ``features`` encoder in float64."""
    table = model.get_input_embeddings().weight.detach().double().numpy()
    mean = table[tokenizer(text)["input_ids"]].mean(0)
    normal = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-5)
    return normal / np.linalg.norm(normal)


QUERIES = ("the cat sees", "Mia likes two", "three two", "a plum")


@pytest.mark.parametrize("top_k", [1, 2])
def test_retriever_by_hand(top_k: int, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, RetrieverMixture(RetrieverConfig(top_k=top_k, num_samples=7)))
    index = [np.mean([embedded(tiny_llama, tiny_tokenizer, f"{WORDS[name]} {i}") for i in range(7)], axis=0) for name in NAMES]
    weights = fused.route(PromptBatch.from_texts(QUERIES, tiny_tokenizer)).weights.numpy()  # type: ignore[union-attr]
    for row, text in enumerate(QUERIES):
        scores = np.array([embedded(tiny_llama, tiny_tokenizer, text) @ center for center in index])
        best = np.argsort(-scores)[:top_k]
        np.testing.assert_allclose(weights[row], [1 / top_k if e in best else 0.0 for e in range(3)], atol=1e-6)


def test_lorauter_by_hand(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, Lorauter(LorauterConfig(top_k=2, num_samples=5, temperature=0.2)))
    index = [np.mean([embedded(tiny_llama, tiny_tokenizer, f"{WORDS[name]} {i}") for i in range(5)], axis=0) for name in NAMES]
    weights = fused.route(PromptBatch.from_texts(QUERIES, tiny_tokenizer)).weights.numpy()  # type: ignore[union-attr]
    for row, text in enumerate(QUERIES):
        cosines = np.array([embedded(tiny_llama, tiny_tokenizer, text) @ center / np.linalg.norm(center) for center in index])
        np.testing.assert_allclose(weights[row], softmax_of_best(cosines, 2, 0.2), atol=1e-5)


def test_fusion_and_mixture_agree_when_one_expert_is_kept(tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path) -> None:
    def answer(method: FusionMethod) -> Tensor:
        fused = fuse(tiny_llama, tiny_tokenizer, uniform_pool, method)
        with fused.routing(fused.route(PromptBatch.from_texts(QUERIES[:2], tiny_tokenizer))):  # type: ignore[arg-type]
            return logits(fused)

    one, two = RetrieverConfig(top_k=1), RetrieverConfig(top_k=2)
    torch.testing.assert_close(answer(RetrieverFusion(one)), answer(RetrieverMixture(one)), atol=1e-5, rtol=1e-5)
    assert float((answer(RetrieverFusion(two)) - answer(RetrieverMixture(two))).abs().max()) > 1e-2


def test_a_saved_index_needs_no_inputs(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path, tmp_path: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, Lorauter())
    prompts = PromptBatch.from_texts(QUERIES, tiny_tokenizer)
    expected = fused.route(prompts).weights  # type: ignore[union-attr]
    fused.method.save(tmp_path / "it")
    bare = MethodContext(tokenizer=tiny_tokenizer, embedding=tiny_llama.get_input_embeddings())
    loaded = Lorauter.load(tmp_path / "it", AdapterBank.from_pool(tiny_pool, NAMES), bare)
    again = FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_pool(tiny_pool, NAMES), loaded, context=bare)
    assert torch.equal(again.route(prompts).weights, expected)  # type: ignore[union-attr]
    again.close()
    unknown = FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_pool(tiny_pool, NAMES), Lorauter(), context=bare)
    with pytest.raises(MethodError, match="needs 20 training inputs of every expert"):
        unknown.route(prompts)


TOO_MANY: list[tuple[Callable[[int], FusionMethod], int]] = [
    (lambda k: Arrow(ScoreConfig(top_k=k)), 3), (lambda k: SpectR(SpectrConfig(top_k=k)), 3), (lambda k: Lag(LagConfig(shortlist=k)), 3),
    (lambda k: RetrieverMixture(RetrieverConfig(top_k=k)), 3), (lambda k: Lorauter(LorauterConfig(top_k=k)), 3),
]  # fmt: skip


@pytest.mark.parametrize(("make", "default"), TOO_MANY, ids=["arrow", "spectr", "lag", "retriever", "lorauter"])
def test_a_pool_of_two_keeps_both_by_default(
    make: Callable[[int], FusionMethod], default: int, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path
) -> None:
    """The presets keep three; a smaller pool keeps all, and no one of none."""

    def answer(k: int) -> Tensor:
        fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, make(k), NAMES[:2])
        state = fused.route(PromptBatch.from_ids(IDS.tolist(), tiny_tokenizer))
        return logits(fused) if state is None else state.weights

    assert torch.equal(answer(default), answer(2))
    with pytest.raises(MethodError, match="must be at least 1"):
        answer(0)


def test_settings_that_mean_nothing(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    with pytest.raises(MethodError, match="'top_k' must be between 1 and the number of experts"):
        fuse(tiny_llama, tiny_tokenizer, tiny_pool, Lag(LagConfig(shortlist=2, top_k=3)))
    with pytest.raises(ConfigError, match="temperature"):
        ScoreConfig(temperature=0.0)
    with pytest.raises(MethodError, match=r"sentence[-_]transformers"):
        fuse(tiny_llama, tiny_tokenizer, tiny_pool, RetrieverMixture(RetrieverConfig(encoder="no/such-model")))
