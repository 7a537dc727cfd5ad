"""Exports, loaded by other software: PEFT, plain transformers, and transformers' own rule for the row order of GGUF files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dlplora import AdapterBank, FusedAdapter, FusedCausalLM, export_gguf, export_merged, export_peft
from dlplora.baselines.averages import AvgFactor
from dlplora.cli.main import main
from dlplora.errors import AdapterError, ConfigError, DLPLoRAError, IncompatibleAdapterError, PoolError
from dlplora.export.target import DESCRIPTION_NAME
from dlplora.methods.references import Base

WEIGHTS = {"alpha": 0.7, "beta": -0.4, "gamma": 1.3}
IDS = torch.arange(3, 40).reshape(1, -1)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def loaded(base: Any, folder: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval())


def truth(base: Any, pool: Path, weights: dict[str, float]) -> Tensor:
    """The base model with ``w * alpha / r * B A``, or ``alpha / sqrt(r)``, of each adapter added to its weights by PEFT, in float64."""
    model = copy.deepcopy(base).double()
    plain = copy.deepcopy(model)
    for name, weight in weights.items():
        merged = PeftModel.from_pretrained(copy.deepcopy(plain), str(pool / name)).merge_and_unload().double()
        with torch.no_grad():
            for mine, theirs, old in zip(model.parameters(), merged.parameters(), plain.parameters(), strict=True):
                mine += weight * (theirs - old)
    return logits(model).float()


@pytest.fixture(scope="module")
def mixed_pool(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of different ranks, scalings, patterns, modules and layers."""
    folder = tmp_path_factory.mktemp("mixed")
    make_adapter(folder / "alpha", seed=1)
    make_adapter(folder / "beta", seed=2, r=6, lora_alpha=3, use_rslora=True, target_modules=["k_proj", "down_proj"])
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}}
    make_adapter(folder / "gamma", seed=3, r=2, layers_to_transform=[1], **patterns)
    return folder


@pytest.mark.parametrize("weights", [WEIGHTS, {"beta": 1.0}, {"gamma": 0.5, "alpha": 0.0}])
def test_a_peft_adapter_equals_the_weighted_adapters(weights: dict[str, float], tiny_llama: Any, mixed_pool: Path, tmp_path: Path) -> None:
    adapter = FusedAdapter.from_pool(mixed_pool, weights)
    folder = export_peft(adapter, tmp_path / "out")
    expected = truth(tiny_llama, mixed_pool, {name: weight for name, weight in weights.items() if weight})
    assert (expected - logits(tiny_llama)).abs().max() > 0.05
    torch.testing.assert_close(loaded(tiny_llama, folder), expected, atol=1e-5, rtol=1e-5)
    fused = FusedCausalLM(copy.deepcopy(tiny_llama), None, AdapterBank.from_peft({"out": folder}), Base(), context=_no_context())
    with fused.routing(torch.ones(1)):  # and what is exported is itself an adapter for a pool
        torch.testing.assert_close(logits(fused), expected, atol=1e-5, rtol=1e-5)
    made = json.loads((folder / DESCRIPTION_NAME).read_text())["adapters"]["out"]
    assert made["weights"] == {name: weight for name, weight in weights.items() if weight}
    assert set(made["sha256"]) == set(made["weights"])


def _no_context() -> Any:
    from dlplora import MethodContext

    return MethodContext(tokenizer=None, embedding=torch.nn.Embedding(1, 1))  # type: ignore[arg-type]


def test_ranks_add_up_and_short_names_are_kept_where_they_are_exact(tiny_pool: Path, mixed_pool: Path, tmp_path: Path) -> None:
    config = json.loads((export_peft(FusedAdapter.from_pool(tiny_pool, WEIGHTS), tmp_path / "a") / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4 + 6 + 2, 12, ["q_proj", "v_proj"])
    config = json.loads((export_peft(FusedAdapter.from_pool(mixed_pool, WEIGHTS), tmp_path / "b") / "adapter_config.json").read_text())
    assert config["r"] == 4 + 3  # the largest of all modules: q_proj of alpha and, by its pattern, of gamma
    assert "model.layers.1.self_attn.q_proj" in config["target_modules"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_checkpoint_is_read_by_plain_transformers(
    tied: bool, tiny_llama: Any, tiny_tokenizer: Any, make_adapter: Callable[..., Path], mixed_pool: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, pool, weights = tiny_llama, mixed_pool, WEIGHTS
    if tied:  # the output layer is adapted, the embedding that it shares its weight with is not
        base.config.tie_word_embeddings = True
        base.tie_weights()
        pool, weights = tmp_path / "pool", {"head": 0.8}
        make_adapter(pool / "head", seed=5, target_modules=["lm_head"])
        _keep_factors(pool / "head")
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    adapter = FusedAdapter.from_pool(pool, weights)
    expected = loaded(base, export_peft(adapter, tmp_path / "peft"))
    folder = export_merged(adapter, tmp_path / "out", pretrained=tmp_path / "base")
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=1e-4)
    assert (expected - logits(base)).abs().max() > 0.05
    assert AutoTokenizer.from_pretrained(folder)("a cat")["input_ids"] == tiny_tokenizer("a cat")["input_ids"]
    if tied:
        assert torch.equal(found.get_input_embeddings().weight, base.get_input_embeddings().weight)


def _keep_factors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "lora_" in key}, file)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_gguf_files_have_the_names_and_the_row_order_of_the_base_model(
    architecture: str, tiny_llama: Any, tiny_tokenizer: Any, mixed_pool: Path, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra 'smollm2' is not installed")
    from transformers import Qwen2Config
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    config = tiny_llama.config
    if architecture == "qwen2":
        config = Qwen2Config(**{key: value for key, value in config.to_dict().items() if key not in {"model_type", "architectures"}})
    config.save_pretrained(tmp_path / "base")  # no weights are needed
    adapter = FusedAdapter.from_pool(mixed_pool, WEIGHTS)
    reader = gguf.GGUFReader(export_gguf(adapter, tmp_path / "it.gguf", pretrained=tmp_path / "base"))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert (fields["general.architecture"], fields["general.type"], fields["adapter.type"]) == (architecture, "adapter", "lora")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(tensors) == 2 * len(adapter.modules)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "mlp.down_proj": "ffn_down"}
    order = LlamaTensorProcessor()
    for path in adapter.modules:
        _, _, layer, leaf = path.split(".", 3)
        lora_a, lora_b = (tensors[f"blk.{layer}.{names[leaf]}.weight.lora_{side}"] for side in "ab")
        delta = fields["adapter.lora.alpha"] / lora_b.shape[1] * lora_b @ lora_a
        if architecture == "llama" and leaf in {"self_attn.q_proj", "self_attn.k_proj"}:
            heads = (4, 4) if leaf == "self_attn.q_proj" else (4, 2)
            delta = torch.from_numpy(order._reverse_permute_weights(delta.numpy(), *heads))
        torch.testing.assert_close(delta, adapter.delta(path), atol=1e-6, rtol=1e-6)


def test_the_plan_of_a_prompt(tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path, tmp_path: Path) -> None:
    """Also for a method that sums factors: A and B apart."""
    for factors in (False, True):
        method = AvgFactor() if factors else _fixed()
        fused = FusedCausalLM(copy.deepcopy(tiny_llama), tiny_tokenizer, AdapterBank.from_pool(uniform_pool), method)
        adapter = FusedAdapter.from_prompt(fused, "the cat likes a plum.")
        with torch.no_grad(), fused.routing(torch.tensor([list(adapter.weights.values())] if factors else [[0.25, 0.0, 0.75]])):
            expected = logits(fused)
        torch.testing.assert_close(loaded(tiny_llama, export_peft(adapter, tmp_path / str(factors))), expected, atol=1e-5, rtol=1e-5)
        assert adapter.rank == (4 if factors else 8)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        FusedAdapter.from_prompt(fused, " ")


def _fixed() -> Any:
    class Fixed(Base):
        def route(self, prompts: Any) -> Tensor:
            return torch.tensor([[0.25, 0.0, 0.75]]).repeat(len(prompts), 1)

    return Fixed()


def test_half_precision_bases_export_exact_adapters(tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path) -> None:
    fused = FusedCausalLM(
        copy.deepcopy(tiny_llama).bfloat16(), tiny_tokenizer, AdapterBank.from_pool(uniform_pool, dtype=torch.bfloat16), _fixed()
    )
    exact = FusedAdapter.from_pool(uniform_pool, {"alpha": 0.25, "gamma": 0.75})
    found = FusedAdapter.from_prompt(fused, "the cat")
    assert all(torch.equal(found.modules[path][1], lora_b) for path, (_, lora_b) in exact.modules.items())


def test_what_cannot_be_exported_is_refused(tiny_pool: Path, tmp_path: Path) -> None:
    def refused(kind: type[DLPLoRAError], match: str, weights: dict[str, Any]) -> None:
        with pytest.raises(kind, match=match):
            FusedAdapter.from_pool(tiny_pool, weights)

    refused(PoolError, "no adapter 'alpa'. Did you mean 'alpha'", {"alpa": 1.0})
    refused(ConfigError, "nothing to export", {"alpha": 0.0})
    refused(ConfigError, "nothing to export", {})
    refused(ConfigError, "finite number, got nan", {"alpha": float("nan")})
    refused(AdapterError, "float32 cannot hold", {"alpha": 1e39})
    adapter = FusedAdapter.from_pool(tiny_pool, {"alpha": 1e6})
    with pytest.raises(AdapterError, match="float16 cannot hold"):
        export_peft(adapter, tmp_path / "half", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_another_base_model_is_refused(tiny_llama: Any, tiny_pool: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra 'smollm2' is not installed")
    adapter = FusedAdapter.from_pool(tiny_pool, {"alpha": 1.0})
    tiny_llama.config.hidden_size = 64
    tiny_llama.config.save_pretrained(tmp_path / "other")
    with pytest.raises(IncompatibleAdapterError, match="another base model"):
        export_gguf(adapter, tmp_path / "x.gguf", pretrained=tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def test_the_command(tiny_llama_folder: Path, tiny_pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--pool", str(tiny_pool), "--pretrained", str(tiny_llama_folder)]

    def run(*arguments: str, code: int = 0) -> str:
        assert main(["export", *arguments, *where]) == code
        text = capsys.readouterr()
        assert text.err.count("\n") <= 1
        return text.err if code else text.out

    out = str(tmp_path / "out")
    assert "alpha 0.5, gamma 1; rank 6" in run("peft", out, "--weight", "alpha=0.5", "--weight", "gamma=1", "--weight", "beta=0")
    assert "--force" in run("peft", out, "--weight", "alpha=1", code=2)
    assert "rank 4" in run("peft", out, "--weight", "alpha=1", "--force")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    assert "is not replaced" in run("merged", str(mine), "--weight", "alpha=1", "--force", code=2)
    assert (mine / "letter.txt").read_text() == "dear"
    assert "Did you mean 'alpha'" in run("peft", str(tmp_path / "x"), "--weight", "alpa=1", code=2)
    assert "NAME=NUMBER" in run("peft", str(tmp_path / "x"), "--weight", "alpha", code=2)
    assert "twice" in run("peft", str(tmp_path / "x"), "--weight", "alpha=1", "--weight", "alpha=2", code=2)
    assert "unknown dtype" in run("peft", str(tmp_path / "x"), "--weight", "alpha=1", "--save-dtype", "int8", code=2)
    assert "must end with .gguf" in run("gguf", str(tmp_path / "x"), "--weight", "alpha=1", code=2)
    assert "alpha 0.3333" in run("merged", str(tmp_path / "m"), "--prompt", "the cat", "--method", "avg_delta")
    assert "uses no adapter" in run("peft", str(tmp_path / "x"), "--prompt", "the cat", "--method", "base", code=2)
    assert "3 adapters" in run("peft", str(tmp_path / "each"), "--each")
    pytest.importorskip("gguf", reason="the extra 'smollm2' is not installed")
    assert "3 adapters" in run("gguf", str(tmp_path / "files"), "--each")
    assert {path.name for path in (tmp_path / "files").iterdir()} == {"alpha.gguf", "beta.gguf", "gamma.gguf", DESCRIPTION_NAME}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or path.name == "x"]
