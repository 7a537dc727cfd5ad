"""Fingerprints of base models, and the check that a pool was made for a given base model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlplora.adapters.add import adapters_for_other_bases
from dlplora.adapters.pool import Pool
from dlplora.errors import IncompatibleAdapterError, PoolError

_ROWS = 64


def base_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Facts that distinguish base models, independent of fused layers, quantisation and dtype.

    Returns:
        ``model_type``, ``hidden_size``, ``num_hidden_layers``, ``vocab_size``, and ``embedding_sha256`` over the first 64 rows
        of the input embedding, rounded to float16. A model that was loaded in bfloat16 has lost bits of those rows, which
        are then taken from its file, if it has one.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    embedding = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    rows = _stored_rows(model, embedding) if embedding.dtype == torch.bfloat16 else None
    rows = embedding[:_ROWS] if rows is None else rows
    rows = rows.detach().to(device="cpu", dtype=torch.float16).contiguous()
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "embedding_sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
    }


def _stored_rows(model: Any, embedding: Tensor) -> Tensor | None:
    """The first rows of the embedding as the model's file holds them; None for a model that was not loaded from safetensors."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    name = next(key for key, parameter in model.named_parameters(remove_duplicate=False) if parameter is embedding)

    def file(wanted: str) -> str | None:
        return cached_file(  # type: ignore[no-any-return]
            model.config.name_or_path,
            wanted,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
            revision=getattr(model, "hub_commit", None),
        )

    if not model.config.name_or_path:
        return None
    whole, index = file(SAFE_WEIGHTS_NAME), file(SAFE_WEIGHTS_INDEX_NAME)
    if whole is None and index is not None:
        parts = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        whole = next((file(part) for key, part in sorted(parts.items()) if _same_weight(key, name)), None)
    if whole is None:
        return None
    with safe_open(whole, framework="pt") as tensors:
        key = next((key for key in sorted(tensors.keys()) if _same_weight(key, name)), None)
        return None if key is None else tensors.get_slice(key)[:_ROWS]


def _same_weight(stored: str, name: str) -> bool:
    """Whether two names differ by a prefix at most (checkpoints of a bare transformer lack ``model.``)."""
    return stored == name or stored.endswith(f".{name}") or name.endswith(f".{stored}")


def check_backbone(pool: Pool, model: nn.Module, backbone: str) -> None:
    """Compare a pool's base model with a model, by fingerprint, or with ``backbone``, its folder or hub id, if the pool has none.

    Sizes are checked when the model is fused.

    Raises:
        PoolError: Naming each fact that differs, on both sides.
        IncompatibleAdapterError: Naming the adapters of another base model.
    """
    if pool.base_model:
        _check_fingerprint(pool.base_model, model, pool.path)
    else:
        check_base_names(pool, backbone)


def _check_fingerprint(expected: Mapping[str, Any], model: nn.Module, pool: Path) -> None:
    found = base_fingerprint(model)
    different = [
        f"{key} {expected[key]} (pool) and {found[key]} (base model)" for key in found if key in expected and expected[key] != found[key]
    ]
    if different:
        raise PoolError(f"pool {pool} was made for another base model: {'; '.join(different)}. Pass the base model it was trained on.")


def check_base_names(pool: Pool, backbone: str) -> None:
    """Compare the base model each adapter names with the name of the loaded one, where both are names and no fingerprint decides.

    A local folder can be called anything, so only a hub id is compared.

    Raises:
        IncompatibleAdapterError: Naming the adapters and both sides.
    """
    if pool.base_model is not None or Path(backbone).is_dir():
        return
    others = adapters_for_other_bases(pool, backbone)
    if others:
        shown = ", ".join(f"'{name}' ({base})" for name, base in others.items())
        raise IncompatibleAdapterError(
            f"pool {pool.path} has adapters of another base model than '{backbone}': {shown}. "
            "Pass their base model, or, if it is the same under another name, add them with `dlplora pool add --allow-other-base`."
        )
