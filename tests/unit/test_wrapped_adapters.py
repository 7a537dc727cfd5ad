"""Adapters saved from compiled, sharded or parallel models: read where the wrapper is unmistakable, otherwise the prefix is named."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dlplora.adapters.inspect import inspect_adapter
from dlplora.errors import AdapterError, IncompatibleAdapterError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.references import Base
from dlplora.modules.lora_bank import AdapterBank

IDS = torch.tensor([[1, 5, 9, 40, 33, 7]])


def renamed(source: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    shutil.copytree(source, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({rename(key): tensor for key, tensor in tensors.items()}, file)
    return folder


WRAPPED = {
    "compiled": ("_orig_mod.", lambda key: "_orig_mod." + key),
    "compiled inside": ("_orig_mod.", lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.")),
    "ddp": ("module.", lambda key: "module." + key),
    "ddp of a compiled one": ("module., _orig_mod.", lambda key: "module._orig_mod." + key),
    "fsdp": (
        "_fsdp_wrapped_module.",
        lambda key: "_fsdp_wrapped_module." + key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    ),
    "checkpointed": (
        "_checkpoint_wrapped_module.",
        lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    ),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_unmistakable_wrappers_are_left_out(kind: str, tiny_llama: Any, tiny_tokenizer: Any, make_adapter: Any, tmp_path: Path) -> None:
    names, rename = WRAPPED[kind]
    plain = make_adapter(tmp_path / "plain", seed=1, rank_pattern={r"layers\.0\.self_attn\.q_proj": 6})
    folder = renamed(plain, tmp_path / "wrapped", rename)
    expected = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(plain)).eval()(input_ids=IDS).logits
    fused = FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_peft({"it": folder}), Base())
    with torch.no_grad(), fused.routing(torch.ones(1)):
        torch.testing.assert_close(fused(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
    (hint,) = inspect_adapter("it", folder).hints
    assert hint.startswith("saved from a wrapped model")
    assert all(f"'{name}'" in hint for name in names.split(", "))


@pytest.mark.parametrize("prefix", ["module", "net.backbone"])
def test_other_prefixes_are_named(prefix: str, tiny_llama: Any, tiny_tokenizer: Any, make_adapter: Any, tmp_path: Path) -> None:
    plain = make_adapter(tmp_path / "plain", seed=1)
    folder = renamed(plain, tmp_path / "wrapped", lambda key: key.replace("base_model.model.", f"base_model.model.{prefix}."))
    with pytest.raises(IncompatibleAdapterError, match=rf"saved from a wrapped model: '{prefix}\.' must be removed"):
        FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_peft({"it": folder}), Base())


def test_another_backbone_is_still_another_backbone(tiny_llama: Any, tiny_tokenizer: Any, make_adapter: Any, tmp_path: Path) -> None:
    folder = renamed(make_adapter(tmp_path / "plain"), tmp_path / "it", lambda key: key.replace("self_attn", "attention"))
    with pytest.raises(IncompatibleAdapterError, match="trained on another base model"):
        FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_peft({"it": folder}), Base())


def test_the_same_factor_twice(make_adapter: Any, tmp_path: Path) -> None:
    folder = renamed(make_adapter(tmp_path / "plain"), tmp_path / "it", lambda key: key)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"_orig_mod.{key}": tensor.clone() for key, tensor in tensors.items()}, file)
    with pytest.raises(AdapterError, match="are one factor"):
        AdapterBank.from_peft({"it": folder})
