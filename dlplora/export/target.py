"""The target of an export: written under a temporary name, then renamed. An existing export is replaced only on request."""

from __future__ import annotations

import importlib.metadata
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dlplora.atomic import naming, write_json
from dlplora.errors import AdapterError, ConfigError
from dlplora.export.fused_adapter import FusedAdapter

DESCRIPTION_NAME = "dlplora_export.json"
"""In every exported folder; without it a folder is never replaced."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def require_free(target: Path, force: bool) -> None:
    """Check a folder to be written, before any work.

    Raises:
        ConfigError: If it exists and is not empty, unless it is an older export and ``force`` is set.
    """
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise ConfigError(f"{target} is a file; give a new folder.")
    if not any(target.iterdir()):
        return
    if not force:
        raise ConfigError(f"{target} exists and is not empty; give a new folder, or replace it with --force (force=True).")
    if not (target / DESCRIPTION_NAME).is_file():
        raise ConfigError(f"{target} was not written by an export ({DESCRIPTION_NAME} is missing) and is not replaced; remove it yourself.")


def require_adapter(adapter: object) -> None:
    """Refuse what is no ``FusedAdapter``.

    Raises:
        ConfigError: Saying how to make one.
    """
    if not isinstance(adapter, FusedAdapter):
        raise ConfigError(f"an export takes a FusedAdapter (FusedAdapter.from_pool or .from_prompt), got {type(adapter).__name__}.")


@contextmanager
def new_folder(target: Path, force: bool) -> Iterator[Path]:
    """A temporary folder to write in the block, which becomes ``target`` when the block ends; an error changes nothing.

    Raises:
        ConfigError: As ``require_free``.
    """
    require_free(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    temporary, old = (target.with_name(f".{target.name}.{token}.{kind}") for kind in ("tmp", "old"))
    temporary.mkdir()
    try:
        with naming(target):
            yield temporary
        for written in temporary.rglob("*"):
            if written.is_file():
                written.chmod(0o644)  # safetensors writes files that only their owner can read
        require_free(target, force)
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def stored(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """A tensor in the dtype of the file.

    Raises:
        ConfigError: If the dtype is unknown.
        AdapterError: If it cannot hold the values.
    """
    cast = tensor.to(require_dtype(dtype)).contiguous()
    if not torch.isfinite(cast).all():
        raise AdapterError(f"'{name}' has values that {dtype} cannot hold; export in float32.")
    return cast


def require_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ConfigError: If it is not one of ``DTYPES``.
    """
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype '{name}'; known: {', '.join(DTYPES)}.")
    return DTYPES[name]


def describe(folder: Path, kind: str, adapters: Mapping[str, FusedAdapter], dtype: str, packages: tuple[str, ...]) -> None:
    """Write what an exported folder was made from.

    Args:
        folder: Where.
        kind: ``peft``, ``merged`` or ``gguf``.
        adapters: What was exported, by the name of its file or folder.
        dtype: Of the files.
        packages: Whose versions matter.
    """
    made = {
        name: {
            "method": one.method,
            "weights": dict(one.weights),
            "rank": one.rank,
            "base_model": one.base_model,
            "sha256": dict(one.sha256),
        }
        for name, one in adapters.items()
    }
    versions = {name: importlib.metadata.version(name) for name in ("dlplora", *packages)}
    write_json(folder / DESCRIPTION_NAME, {"format": 1, "kind": kind, "dtype": dtype, "adapters": made, "versions": versions})
