"""DLP with entmax against the optimality conditions of its definition; DLP with the paper-size router against its file in float64."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dlplora.baselines.dlp_entmax import DLPEntmax, entmax
from dlplora.baselines.dlp_paper5m import DLPPaper5M
from dlplora.cli.main import main
from dlplora.errors import ConfigError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import MethodContext
from dlplora.methods.dlp import DLP
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.router import MiniMLPRouter
from dlplora.types import PromptBatch

TEXTS = ("Mia sees the red box.", "the cat", "Ann likes a dog and Tom likes a pear.", "yes or no: is the plum blue?")
LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=26)


def simplex_projection(point: np.ndarray) -> np.ndarray:
    """The nearest point of the simplex: try every size of the support."""
    ordered = np.sort(point)[::-1]
    for size in range(len(point), 0, -1):
        tau = (ordered[:size].sum() - 1) / size
        if ordered[size - 1] > tau:
            return np.maximum(point - tau, 0.0)
    raise AssertionError


@settings(max_examples=60, deadline=None)
@given(LOGITS)
def test_alpha_two_is_the_euclidean_projection(logits: list[float]) -> None:
    found = entmax(torch.tensor(logits), 2.0).double().numpy()
    np.testing.assert_allclose(found, simplex_projection(np.array(logits, dtype=np.float64)), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.sampled_from([1.1, 1.5, 2.0, 3.0]))
def test_entmax_maximises_its_objective(logits: list[float], alpha: float) -> None:
    """The objective is concave, so the conditions of Karush, Kuhn and Tucker are enough: one slope on the support, none above it."""
    z = np.array(logits, dtype=np.float64)
    w = entmax(torch.tensor(logits), alpha).double().numpy()
    assert w.sum() == pytest.approx(1.0, abs=1e-6)
    assert (w >= 0).all()
    slope = z + (1 - alpha * w ** (alpha - 1)) / (alpha * (alpha - 1))  # of w.z + H_alpha(w), Tsallis
    kept = w > 1e-6
    assert np.ptp(slope[kept]) < 2e-2 if alpha == 1.1 else np.ptp(slope[kept]) < 1e-4 * max(1.0, np.abs(z).max())
    assert (slope[~kept] <= slope[kept].max() + 2e-2).all()


def test_fewer_experts_with_more_sparsity() -> None:
    logits = torch.tensor([[2.0, 1.6, 1.0, -1.0]])
    assert [(entmax(logits / (1 - s), 1.5) > 0).sum().item() for s in (0.0, 0.5, 0.9)] == [3, 2, 1]
    torch.testing.assert_close(entmax(torch.zeros(1, 4), 1.5), torch.full((1, 4), 0.25))
    np.testing.assert_allclose(entmax(torch.tensor([0.5, 0.0]), 2.0).numpy(), [0.75, 0.25], atol=1e-7)


@pytest.mark.skipif(importlib.util.find_spec("entmax") is None, reason="the package entmax is not installed")
def test_entmax_is_the_packages() -> None:
    import entmax as package

    logits = torch.randn(50, 26, generator=torch.Generator().manual_seed(0)) * 4
    torch.testing.assert_close(entmax(logits, 1.5), package.entmax15(logits), atol=1e-6, rtol=0)
    torch.testing.assert_close(entmax(logits, 2.0), package.sparsemax(logits), atol=1e-6, rtol=0)


@pytest.fixture
def context(tiny_llama: Any, tiny_tokenizer: Any) -> MethodContext:
    return MethodContext(tokenizer=tiny_tokenizer, embedding=tiny_llama.get_input_embeddings())


def test_weights_come_from_the_routers_logits(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path, context: Any, tmp_path: Path) -> None:
    bank = AdapterBank.from_pool(tiny_pool)
    folder = DLP.example_artifacts(tmp_path, bank, context)["router"]
    router = MiniMLPRouter.load(folder, context.embedding)
    method = DLPEntmax(DLPEntmax.Config(alpha=2.0, sparsity=0.25))
    method.use_router(router)
    fused = FusedCausalLM(copy.deepcopy(tiny_llama), tiny_tokenizer, bank, method, context=context)
    prompts = PromptBatch.from_texts(TEXTS, tiny_tokenizer)
    with torch.no_grad():
        logits = router(prompts.input_ids, prompts.attention_mask).double().numpy() / float(router.temperature) / 0.75
    found = fused.route(prompts).weights.double().numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(found, [simplex_projection(row) for row in logits], atol=1e-5)
    assert len({int(count) for count in (found > 0).sum(1)}) > 1
    with torch.no_grad():
        np.testing.assert_array_equal(method.select(method.probabilities(prompts)[0]).numpy(), found > 0)


def test_settings_that_mean_nothing() -> None:
    for bad, match in (({"alpha": 1.0}, "larger than 1"), ({"sparsity": 1.0}, "less than 1")):
        with pytest.raises(ConfigError, match=match):
            DLPEntmax.Config(**bad)


def test_the_router_of_the_papers_size_by_hand(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path, context: Any, tmp_path: Path) -> None:
    """Table, mean, four layers with GELU, temperature, threshold, softmax of the kept probabilities: from the file, in float64."""
    from math import erf

    bank = AdapterBank.from_pool(tiny_pool)
    artifacts = DLPPaper5M.example_artifacts(tmp_path, bank, context)
    router = MiniMLPRouter.load(artifacts["router_paper5m"], context.embedding)
    assert router.num_trained_parameters == 30000 * 128 + 129 * 768 + 769 * 768 + 769 * 512 + 513 * 3
    with torch.no_grad():
        router.temperature.fill_(2.0)
    router.save(tmp_path / "warm")
    given = MethodContext(tokenizer=tiny_tokenizer, embedding=context.embedding, artifacts={"router_paper5m": tmp_path / "warm"})
    fused = FusedCausalLM(copy.deepcopy(tiny_llama), tiny_tokenizer, bank, DLPPaper5M(), context=given)
    tensors = {key: value.double().numpy() for key, value in load_file(tmp_path / "warm" / "router.safetensors").items()}
    layers = sorted({int(key.split(".")[1]) for key in tensors if key.startswith("mlp.")})
    expected = []
    for text in TEXTS:
        x = tensors["table.weight"][tiny_tokenizer(text)["input_ids"]].mean(0)
        for place, layer in enumerate(layers):
            x = tensors[f"mlp.{layer}.weight"] @ x + tensors[f"mlp.{layer}.bias"]
            if place < 3:
                x = x * 0.5 * (1 + np.array([erf(value / 2**0.5) for value in x]))
        probs = np.exp(x / 2.0 - (x / 2.0).max())
        probs /= probs.sum()
        kept = probs >= 0.2
        expected.append(np.where(kept, np.exp(probs), 0.0) / np.exp(probs)[kept].sum())
    found = fused.route(PromptBatch.from_texts(TEXTS, tiny_tokenizer)).weights  # type: ignore[union-attr]
    np.testing.assert_allclose(found.double().numpy(), expected, atol=1e-5)
    assert len({tuple(row) for row in (found > 0).tolist()}) > 1


def test_the_router_of_the_papers_size_must_be_trained_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["eval", "--method", "dlp_paper5m", "--limit", "1", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "needs a router_paper5m; none was given" in message
    assert "--artifact router_paper5m=FOLDER" in message
    assert main(["eval", "--method", "dlp_paper5m", "--artifact", "router_paper5m", "--limit", "1", "--out", str(tmp_path)]) == 2
    assert "must be ROLE=DIR" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))
