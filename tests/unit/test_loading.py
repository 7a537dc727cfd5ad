"""Backbones that cannot be loaded: one line each that says why; and settings that come from files and --model_args."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dlplora.cli.main import main
from dlplora.config import list_configs
from dlplora.errors import ConfigError
from dlplora.evaluation.protocol import Protocol, load_protocol
from dlplora.inference.loading import load_backbone
from dlplora.lm_eval.model_args import parse_model_args

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def with_code(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model folder whose classes are written in a Python file of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "own.py").write_text(CODE)
    edit(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    return folder


def test_code_of_a_model_is_not_run_unless_asked_for(
    with_code: Path, tiny_pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"brings Python code of its own .*trust_remote_code=True") as caught:
        load_backbone(with_code)
    assert "\n" not in str(caught.value)
    assert str(with_code) in str(caught.value)
    assert main(["generate", "x", "--method", "base", "--pretrained", str(with_code), "--pool", str(tiny_pool)]) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert not list(tmp_path.rglob("ran"))
    model, _ = load_backbone(with_code, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert list(tmp_path.rglob("ran"))


def test_damaged_and_incomplete_models(folder: Path) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({key: value for key, value in tensors.items() if "layers.1.mlp" not in key}, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"3 weights are not in its files, the first is model.layers.1.mlp.down_proj.weight"):
        load_backbone(folder)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=rf"cannot load base model '{folder}': "):
        load_backbone(folder)
    weights.unlink()
    with pytest.raises(ConfigError, match=rf"cannot load base model '{folder}': .*model.safetensors"):
        load_backbone(folder)
    edit(folder, model_type="nobody_knows")
    with pytest.raises(ConfigError, match="nobody_knows"):
        load_backbone(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot load base model"):
        load_backbone(folder)


def test_a_model_that_is_no_causal_language_model(folder: Path) -> None:
    edit(folder, model_type="t5", architectures=["T5Model"])
    with pytest.raises(ConfigError, match="T5Config"):
        load_backbone(folder)


# ---------------------------------------------------------------------- settings


def test_settings_reach_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    args, _ = parse_model_args({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16", "attn_implementation": "eager", "revision": 7})
    assert args.loading() == {
        "revision": "7",
        "trust_remote_code": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": False,
        "attn_implementation": "eager",
    }
    with pytest.raises(ConfigError, match=r"load_in_4bits.*Did you mean 'load_in_4bit'"):
        parse_model_args({"load_in_4bits": True})
    with pytest.raises(ConfigError, match="load_in_8bit"):
        parse_model_args({"load_in_8bit": "maybe"})


def test_later_settings_leave_old_hashes_alone() -> None:
    plain = load_protocol("nano")
    assert plain.hash() == "89e92a61e921"  # of every committed record
    assert "load_in_4bit" not in plain.resolved()
    bits = Protocol(load_in_4bit=True)
    assert bits.resolved()["load_in_4bit"] is True
    assert bits.hash() != Protocol().hash()
    assert Protocol(attn_implementation="eager").hash() not in {bits.hash(), Protocol().hash()}
    with pytest.raises(ConfigError, match="exclude each other"):
        Protocol(load_in_4bit=True, load_in_8bit=True)


def test_protocols_of_the_papers_backbones() -> None:
    backbones = {
        "qwen2-1.5b": "Qwen/Qwen2-1.5B",
        "qwen2-7b": "Qwen/Qwen2-7B",
        "llama2-7b": "meta-llama/Llama-2-7b-hf",
        "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    }
    assert set(backbones) <= set(list_configs("protocol"))
    for name, hub_id in backbones.items():
        protocol = load_protocol(name)
        assert (protocol.backbone, protocol.dtype, protocol.apply_chat_template, protocol.suite) == (hub_id, "bfloat16", False, "paper26")
        assert protocol.batch_size >= 16
