"""An independent truth: weighted deltas read from the adapter files and added to a float64 copy of the plain model."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

PREFIX = "base_model.model."


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """``scaling * B @ A`` of every adapted module of one PEFT folder, float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118 (not a dict)
    result = {}
    for key, lora_a in tensors.items():
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            result[stem.removeprefix(PREFIX)] = scaling * tensors[f"{stem}.lora_B.weight"] @ lora_a
    assert result
    return result


def merged_logits(model: Any, pool: Path, weights: Mapping[str, float], input_ids: list[int]) -> torch.Tensor:
    """Logits (T, V), float64, of the plain model with ``sum_i weights[i] * delta_i`` in its weights."""
    merged = copy.deepcopy(model).double()
    modules = dict(merged.named_modules())
    with torch.no_grad():
        for name, weight in weights.items():
            for path, delta in deltas(pool / name).items():
                modules[path].weight += weight * delta
        return merged(torch.tensor([input_ids])).logits[0]
