"""The input embedding of a base model without its other weights; most routers read nothing else of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlplora.errors import ConfigError
from dlplora.inference.loading import empty_backbone

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def embedding_backbone(source: str, revision: str | None = None) -> Any:
    """An empty model (``loading.empty_backbone``) with its real input embedding, float32 on the CPU.

    Args:
        source: What ``resolve_backbone`` returns.
        revision: Of a hub id.

    Raises:
        ConfigError: If the model's files do not hold the embedding as safetensors.
    """
    model = empty_backbone(source, revision)
    empty = model.get_input_embeddings()
    name = next(key for key, parameter in model.named_parameters(remove_duplicate=False) if parameter is empty.weight)
    weight = _stored_tensor(source, revision, name)
    if tuple(weight.shape) != tuple(empty.weight.shape):
        raise ConfigError(f"{source}: the stored embedding has shape {tuple(weight.shape)}, config.json says {tuple(empty.weight.shape)}.")
    embedding = nn.Embedding.from_pretrained(weight.float(), freeze=True, padding_idx=getattr(empty, "padding_idx", None))
    model.set_input_embeddings(embedding)
    return model


def _file(source: str, revision: str | None, name: str) -> Path | None:
    """A file of a model folder or hub id, downloaded if necessary; None if it does not exist."""
    from transformers.utils import cached_file

    options: dict[str, Any] = {} if Path(source).is_dir() else {"revision": revision}
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, **options)
    return None if found is None else Path(found)


def _stored_tensor(source: str, revision: str | None, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    def same(stored: str) -> bool:  # checkpoints of a bare transformer lack a prefix
        return stored == name or stored.endswith(f".{name}") or name.endswith(f".{stored}")

    file = _file(source, revision, _WEIGHTS)
    index = None if file is not None else _file(source, revision, _INDEX)
    try:
        if index is not None:
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            part = next((part for key, part in sorted(parts.items()) if same(key)), None)
            file = None if part is None else _file(source, revision, part)
        if file is not None:
            with safe_open(file, framework="pt") as tensors:
                key = next((key for key in sorted(tensors.keys()) if same(key)), None)
                if key is not None:
                    return torch.as_tensor(tensors.get_tensor(key))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(f"{source}: cannot read the input embedding: {error}") from error
    raise ConfigError(f"{source}: no safetensors file holds the input embedding '{name}'.")
