"""Base models for latency benchmarks: nano, a pretrained one from a package, or the sizes of public ones with random weights.

Time depends on the sizes of the matrices and not on their values; only what is kept and re-routed depends on training.
Shapes: E experts, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlplora.inference.loading import load_backbone, resolve_dtype
from dlplora.inference.shapes import POSITIONS, find_shape
from dlplora.modules.lora_bank import AdapterBank, BankEntry, empty_factors
from dlplora.training.adapter_export import save_adapter
from dlplora.training.settings import LoRASettings

LORA = LoRASettings(rank=8, lora_alpha=16, lora_dropout=0.0, target_modules=("q_proj", "v_proj"))
"""The paper's adapters; dropout is off at inference anyway."""


def meta_model(name: str) -> Any:
    """The base model without any weights: for counting.

    Raises:
        ConfigError: If the name is unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from dlplora.inference.loading import nano_asset

    shape = find_shape(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(nano_asset("backbone")) if shape is None else shape.config())


def adapted_sizes(model: nn.Module, targets: Sequence[str] = LORA.target_modules) -> dict[str, tuple[int, int]]:
    """Path -> (I, O) of the linear modules that adapters change, in the order of the model."""
    return {
        path: (module.in_features, module.out_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in targets
    }


def needed_bytes(name: str, dtype: torch.dtype, num_experts: int) -> tuple[int, int]:
    """Bytes of the base model and of a pool of so many adapters, before anything is allocated."""
    model = meta_model(name)
    per_expert = sum(LORA.rank * (inputs + outputs) for inputs, outputs in adapted_sizes(model).values())
    return sum(one.numel() for one in model.parameters()) * dtype.itemsize, per_expert * num_experts * dtype.itemsize


def load_shape(name: str, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """The base model on its device, and a tokenizer whose ids are all in its vocabulary: its own, or nano's for random weights.

    Raises:
        ConfigError: For an unknown shape or dtype, or a dtype the device emulates.
    """
    shape = find_shape(name)
    if shape is not None and shape.pretrained is not None:
        return load_backbone(shape.pretrained, dtype=dtype, device=device)
    model, tokenizer = load_backbone(None, dtype=dtype, device=device)
    if shape is None:
        model.config.max_position_embeddings = POSITIONS
        return model, tokenizer
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=resolve_dtype(dtype, device))
    return model.eval(), tokenizer


def random_bank(model: nn.Module, names: Sequence[str], seed: int = 0) -> AdapterBank:
    """A pool of random adapters (``LORA``) in the dtype and on the device of the model, as small as trained ones."""
    parameter = next(iter(model.parameters()))
    generator = torch.Generator(device=parameter.device).manual_seed(seed)

    scaling = torch.full((len(names),), LORA.scaling, device=parameter.device)
    ranks = (LORA.rank,) * len(names)
    sizes = {path: (len(names), LORA.rank, *size) for path, size in adapted_sizes(model).items()}
    factors = empty_factors(sizes, parameter.dtype, parameter.device)
    for path in sizes:
        lora_a, lora_b = factors[path]
        lora_a.normal_(0.0, 0.02, generator=generator)
        lora_b.mT.normal_(0.0, 0.02, generator=generator)
    return AdapterBank(names, {path: BankEntry(*factors[path], scaling, ranks) for path in sizes})


def first_experts(bank: AdapterBank, number: int) -> AdapterBank:
    """The first experts of a bank as views: a sweep over pool sizes holds its largest pool only."""
    modules = {
        path: BankEntry(entry.lora_a[:number], entry.lora_b[:number], entry.scaling[:number], entry.ranks[:number])
        for path, entry in bank.modules.items()
    }
    return AdapterBank(bank.names[:number], modules, bank.specs)


def write_adapter(bank: AdapterBank, expert: int, folder: Path, dtype: str) -> Path:
    """One expert of a bank as a PEFT folder."""
    entries = bank.modules.items()
    tensors = {f"base_model.model.{path}.lora_A.weight": entry.lora_a[expert] for path, entry in entries}
    tensors |= {f"base_model.model.{path}.lora_B.weight": entry.lora_b[expert] for path, entry in entries}
    return save_adapter(folder, LORA.peft_config(), tensors, dtype)


def share_weights(model: Any) -> Any:
    """A second module tree over the same parameters: wrapping its layers leaves the first one alone and costs no memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
