"""Finding and loading backbones, and telling one backbone from another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlplora.config import ASSETS_ROOT
from dlplora.errors import ConfigError, PoolError

NANO_ASSETS = ASSETS_ROOT / "nano"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FINGERPRINT_ROWS = 64


def nano_asset(role: str) -> Path:
    """Folder of one embedded asset: ``backbone``, ``pool``, ``router`` or ``multitask``."""
    return NANO_ASSETS / role


def resolve_dtype(name: str | torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype of that name, refused where it would be emulated.

    Raises:
        ConfigError: If the name is unknown, or bfloat16 is asked for on a CPU without instructions for it.
    """
    dtype = name if isinstance(name, torch.dtype) else _DTYPES.get(str(name))
    if dtype is None:
        raise ConfigError(f"unknown dtype '{name}'. Known: {', '.join(_DTYPES)}.")
    if dtype == torch.bfloat16 and torch.device(device).type == "cpu" and not _cpu_has_bfloat16():
        raise ConfigError("this CPU has no bfloat16 instructions, which makes bfloat16 about a hundred times slower; use dtype=float32.")
    return dtype


def _cpu_has_bfloat16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported()) or torch.backends.cpu.get_cpu_capability() in {"SVE256"}


def base_fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells one backbone from another, independent of dtype and of fused layers.

    Returns:
        ``model_type``, ``hidden_size``, ``num_hidden_layers``, ``vocab_size``, and ``embedding_sha256`` over the first 64 rows
        of the input embedding, rounded to float16.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    embedding = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    rows = embedding[:_FINGERPRINT_ROWS].detach().to(device="cpu", dtype=torch.float16).contiguous()
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "embedding_sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
    }


def check_fingerprint(expected: Mapping[str, Any] | None, model: nn.Module, pool: Path) -> None:
    """Compare a pool's backbone with a model; a pool without a fingerprint passes (sizes are checked when it is fused).

    Raises:
        PoolError: Naming each fact that differs, on both sides.
    """
    if not expected:
        return
    found = base_fingerprint(model)
    different = [
        f"{key} {expected[key]} (pool) and {found[key]} (backbone)" for key in found if key in expected and expected[key] != found[key]
    ]
    if different:
        raise PoolError(f"pool {pool} was made for another backbone: {'; '.join(different)}. Pass the backbone it was trained on.")


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def resolve_backbone(name: str | Path | None) -> str:
    """A local folder wins over a hub id; None is the embedded nano backbone.

    Raises:
        ConfigError: If the name can only be a path and does not exist, or the folder has no ``config.json``.
    """
    if name is None:
        return str(nano_asset("backbone"))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} is not a model folder: config.json is missing.")
        return str(folder)
    if isinstance(name, Path) or _looks_like_path(str(name)):
        raise ConfigError(f"model folder not found: {name}.")
    return str(name)


def load_backbone(
    name: str | Path | None,
    *,
    dtype: str | torch.dtype = "float32",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A causal LM in eval mode and its tokenizer, from a folder or the hub.

    Raises:
        ConfigError: If it is not found; one line with what was looked for, where, and how to supply it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve_backbone(name)
    torch_dtype = resolve_dtype(dtype, device)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if Path(source).is_dir():
        options.pop("revision")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype, **options)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"cannot load backbone '{source}' (looked for a local folder, the hub cache in HF_HOME, then the hub): {reason} "
            "Pass a local folder, or download it once with a connection (unset HF_HUB_OFFLINE)."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(torch.device(device)).eval(), tokenizer  # type: ignore[arg-type]
