"""Adapters that PEFT itself writes and the bank cannot fuse exactly: each is refused with the name of what stands in the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dlplora.adapters.config import config_problems, same_base
from dlplora.adapters.files import read_adapter
from dlplora.adapters.headers import read_header, read_tensor_headers
from dlplora.errors import AdapterError, IncompatibleAdapterError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.references import Base
from dlplora.modules.lora_bank import AdapterBank

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "'use_dora' is set"),
    "trained head": ({"modules_to_save": ["lm_head"]}, "'modules_to_save' is set"),
    "biases of LoRA": ({"lora_bias": True}, "'lora_bias' is set"),
    "biases of the base": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, "'trainable_token_indices' is set"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
    "activated LoRA": ({"alora_invocation_tokens": [1, 2]}, "'alora_invocation_tokens' is set"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_are_refused(kind: str, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    options, part = KINDS[kind]
    folder = make_adapter(tmp_path / "it", **options)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    text = str(caught.value)
    assert part in text
    assert "'it'" in text
    assert "\n" not in text


def test_pissa_changes_the_backbone_and_converted_it_does_not(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    import copy

    from peft import LoraConfig, get_peft_model

    ids = torch.tensor([[1, 5, 9, 40]])
    base = copy.deepcopy(tiny_llama)
    model = get_peft_model(tiny_llama, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    first = tmp_path / "first"
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(first)
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
        expected = model.eval()(input_ids=ids).logits
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(first))
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        read_adapter(tmp_path / "raw")
    fused = FusedCausalLM(base, tiny_tokenizer, AdapterBank.from_peft({"plain": tmp_path / "plain"}), Base())
    with fused.routing(torch.ones(1)), torch.no_grad():
        torch.testing.assert_close(fused(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)  # PEFT's conversion subtracts in float32


@pytest.fixture
def config(tiny_pool: Path) -> dict[str, Any]:
    return dict(json.loads((tiny_pool / "alpha" / CONFIG).read_text()))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"target_parameters": ["self_attn.q_proj.weight"]}, "'target_parameters' is set"),
        ({"layer_replication": [[0, 1]]}, "'layer_replication' is set"),
        ({"use_quaternions": True}, "'use_quaternions' is set to True, a setting that this version does not know"),
        ({"spectral_config": {"k": 3}}, "'spectral_config'"),
        ({"qalora_group_size": 16, "use_qalora": True}, "'use_qalora'"),
        ({"kasa_config": {"beta": 0.1}}, "'kasa_config'"),
        ({"use_bdlora": {"n": 2}}, "'use_bdlora'"),
        ({"monteclora_config": {"n": 2}}, "'monteclora_config'"),
        ({"velora_config": {"n": 2}}, "'velora_config'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"r": 2.5}, "'r' must be"),
        ({"r": True}, "'r' must be"),
        ({"lora_alpha": float("nan")}, "'lora_alpha'"),
        ({"lora_alpha": 0}, "'lora_alpha'"),
        ({"rank_pattern": {"q_proj": 0}}, "'rank_pattern' gives 'q_proj' the value 0"),
        ({"rank_pattern": ["q_proj"]}, "'rank_pattern' must map"),
        ({"alpha_pattern": {"q_proj": "x"}}, "'alpha_pattern' gives 'q_proj' the value 'x'"),
        ({"alpha_pattern": {"(": 3}}, "not a regular expression"),
        ({"peft_type": None}, "peft_type is None"),
    ],
)
def test_configurations_that_are_refused(config: dict[str, Any], change: dict[str, Any], part: str) -> None:
    assert part in " ".join(config_problems(config | change))


@pytest.mark.parametrize(
    "change",
    [
        {"use_quaternions": False},
        {"spectral_config": None, "spectral_layers": [], "spectral_name": ""},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"loftq_config": {"loftq_bits": 4}},
        {"megatron_core": "megatron.core", "qalora_group_size": 32},
        {"runtime_config": {"ephemeral_gpu_offload": False}},
        {"bias": "none", "peft_version": "9.9.9"},
    ],
)
def test_settings_that_change_nothing_are_accepted(config: dict[str, Any], change: dict[str, Any]) -> None:
    assert config_problems(config | change) == []


def test_a_default_of_the_installed_peft_is_accepted(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import dlplora.adapters.config as rules

    monkeypatch.setattr(rules, "UNDERSTOOD", rules.UNDERSTOOD - {"megatron_core"})
    assert config_problems(config) == []
    assert "'megatron_core'" in config_problems(config | {"megatron_core": "mine"})[0]


@pytest.fixture
def folder(tiny_pool: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pool / "alpha", tmp_path / "alpha"))


def test_every_length_of_a_truncated_file_is_refused(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    for length in (0, 4, 8, 50, len(content) // 2, len(content) - 1):
        (folder / WEIGHTS).write_bytes(content[:length])
        with pytest.raises(AdapterError, match=r"'alpha'.*damaged or truncated"):
            read_adapter(folder)
    (folder / WEIGHTS).write_bytes(content + b"\0")
    with pytest.raises(AdapterError, match="the tensors end at byte"):
        read_adapter(folder)
    (folder / WEIGHTS).write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
    with pytest.raises(AdapterError, match="the header alone needs"):
        read_adapter(folder)


def test_headers_are_those_of_the_safetensors_library(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    headers = read_tensor_headers(folder / WEIGHTS)
    assert {key: header.shape for key, header in headers.items()} == {key: tuple(value.shape) for key, value in tensors.items()}
    raw = (folder / WEIGHTS).read_bytes()
    for key, header in headers.items():
        assert raw[header.start : header.end] == tensors[key].numpy().tobytes()
    module = read_header(folder, "alpha").modules["model.layers.1.self_attn.q_proj"]
    assert (module.rank, module.d_in, module.d_out, module.dtype, module.scaling) == (4, 32, 32, "float32", 2.0)


def test_integers_and_eight_bit_floats_are_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    for dtype, name in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        save_file({key: value.to(dtype) for key, value in tensors.items()}, folder / WEIGHTS)
        with pytest.raises(AdapterError, match=f"stored as {name}"):
            read_adapter(folder)


def test_names_of_one_backbone() -> None:
    assert same_base("unsloth/llama-3-8b-bnb-4bit", "org/Llama-3-8B")
    assert same_base("meta-llama/Llama-2-7b-hf", "org/Llama-2-7b")
    assert same_base("/data/models/mine", "Qwen/Qwen2-7B")  # a folder of another machine can hold anything; sizes decide
    assert same_base("C:\\models\\mine", "Qwen/Qwen2-7B")
    assert same_base(None, "x/y")
    assert same_base("", "x/y")
    assert not same_base("Qwen/Qwen2-7B", "Qwen/Qwen2-7B-Instruct")
    assert not same_base("Qwen/Qwen2-7B", "Qwen/Qwen2-1.5B")


def test_a_hub_backbone_is_compared_by_name(tiny_pool: Path, tmp_path: Path) -> None:
    from dlplora.adapters.fingerprint import check_base_names
    from dlplora.adapters.pool import load_pool

    pool = Path(shutil.copytree(tiny_pool, tmp_path / "pool"))
    for name in ("alpha", "beta"):
        config = json.loads((pool / name / CONFIG).read_text()) | {"base_model_name_or_path": "org/one-1b"}
        (pool / name / CONFIG).write_text(json.dumps(config))
    check_base_names(load_pool(pool), "other/One-1B")
    check_base_names(load_pool(pool), str(tmp_path))  # a folder's name says nothing
    with pytest.raises(IncompatibleAdapterError, match=r"than 'org/two': 'alpha' \(org/one-1b\), 'beta' \(org/one-1b\)"):
        check_base_names(load_pool(pool), "org/two")
