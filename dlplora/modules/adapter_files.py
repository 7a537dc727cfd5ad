"""Reading PEFT LoRA folders: ``adapter_config.json`` and ``adapter_model.safetensors``, and nothing that needs unpickling.

What cannot be fused exactly is refused by name: DoRA, biases, trained embeddings, ``modules_to_save``, other PEFT types.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlplora.errors import AdapterError, UnsafeFileError

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")

LoraWeights = tuple[Tensor, Tensor, float]
"""A (R, I), B (O, R), scaling."""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Facts about one adapter folder.

    ``ranks`` and ``scalings`` are per adapted module, since rank and alpha patterns and rsLoRA may differ between modules.
    """

    name: str
    path: Path
    base_model: str | None
    rank: int
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...]
    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    sha256: str


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The adapter's configuration, refused if it asks for something the bank cannot fuse exactly.

    Raises:
        AdapterError: If the file is missing, is not JSON, or names an unsupported feature.
    """
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise AdapterError(f"adapter '{name}': folder not found: {folder}.")
    if not path.is_file():
        raise AdapterError(f"adapter '{name}': {CONFIG_NAME} is missing in {folder}; expected a PEFT LoRA folder.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"adapter '{name}': {path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"adapter '{name}': {path} must hold an object, found {type(config).__name__}.")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"adapter '{name}': peft_type is {config.get('peft_type')!r}, only 'LORA' can be fused ({path}).")
    unsupported = {
        "use_dora": "DoRA scales by the norm of the merged weight, which is not a sum of deltas",
        "modules_to_save": "fully trained modules are not low-rank deltas",
        "lora_bias": "biases on the LoRA matrices are not part of the bank",
        "trainable_token_indices": "trained token embeddings are not low-rank deltas",
        "target_parameters": "LoRA on bare parameters is not supported",
        "layer_replication": "replicated layers change the backbone",
        "megatron_config": "Megatron layers are not supported",
        "alora_invocation_tokens": "activated LoRA switches by token",
        "arrow_config": "an Arrow router is not an adapter",
    }
    for key, reason in unsupported.items():
        if config.get(key):
            raise AdapterError(f"adapter '{name}': '{key}' is set in {path}; {reason}. Train it without, or merge it into the base model.")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"adapter '{name}': bias is {config['bias']!r} in {path}; only adapters with bias='none' can be fused.")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or config[key] <= 0:
            raise AdapterError(f"adapter '{name}': '{key}' must be a positive number in {path}, got {config.get(key)!r}.")
    return config


def _pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module path, at a dot, wins."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_NAME
    if not path.is_file():
        if list(folder.glob("adapter_model.bin")) or list(folder.glob("*.pt")):
            raise UnsafeFileError(
                f"adapter '{name}': {folder} holds pickled weights only, which can run code when read; "
                f"save it again with safe_serialization=True."
            )
        raise AdapterError(f"adapter '{name}': {WEIGHTS_NAME} is missing in {folder}.")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"adapter '{name}': {path} is damaged or truncated: {error}.") from error


def _pair_up(tensors: Mapping[str, Tensor], name: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            kind = "a trained embedding" if "lora_embedding" in key else "a tensor that is no LoRA factor"
            raise AdapterError(f"adapter '{name}': '{key}' in {folder / WEIGHTS_NAME} is {kind}; it cannot be fused.")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"adapter '{name}': '{key}' in {folder / WEIGHTS_NAME} holds NaN or infinite values.")
        pairs.setdefault(match["module"], {})[match["side"]] = tensor
    if not pairs:
        raise AdapterError(f"adapter '{name}': no LoRA weights in {folder / WEIGHTS_NAME}.")
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(f"adapter '{name}': module '{module}' has only lora_{next(iter(pair))}; both factors are needed.")
        if pair["A"].ndim != 2 or pair["B"].ndim != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = f"{tuple(pair['A'].shape)} and {tuple(pair['B'].shape)}"
            raise AdapterError(f"adapter '{name}': factors of '{module}' have shapes {shapes}; expected (R, I) and (O, R).")
    return pairs


def read_adapter(path: str | Path, name: str | None = None) -> tuple[AdapterSpec, dict[str, LoraWeights]]:
    """Read one PEFT folder.

    Args:
        path: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: Expert name; None takes the folder's name.

    Returns:
        Facts, and ``{module path: (A (R, I), B (O, R), scaling)}`` in the stored dtype. Module paths are those of the
        backbone, sorted.

    Raises:
        UnsafeFileError: If the folder holds pickled weights only.
        AdapterError: For anything missing, damaged, not finite, or impossible to fuse exactly.
    """
    folder = Path(path)
    name = folder.name if name is None else name
    config = read_config(folder, name)
    pairs = _pair_up(_read_tensors(folder, name), name, folder)
    weights: dict[str, LoraWeights] = {}
    for module in sorted(pairs):
        lora_a, lora_b = pairs[module]["A"], pairs[module]["B"]
        rank = lora_a.shape[0]
        declared = int(_pattern_value(config.get("rank_pattern"), module, config["r"]))
        if declared != rank:
            raise AdapterError(f"adapter '{name}': {CONFIG_NAME} declares rank {declared} for '{module}', the weights have rank {rank}.")
        alpha = float(_pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"]))
        weights[module] = (lora_a, lora_b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    spec = AdapterSpec(
        name=name,
        path=folder,
        base_model=config.get("base_model_name_or_path"),
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        use_rslora=bool(config.get("use_rslora")),
        target_modules=tuple(sorted({module.rsplit(".", 1)[-1] for module in weights})),
        ranks={module: value[0].shape[0] for module, value in weights.items()},
        scalings={module: value[2] for module, value in weights.items()},
        sha256=file_sha256(folder / WEIGHTS_NAME),
    )
    return spec, weights
