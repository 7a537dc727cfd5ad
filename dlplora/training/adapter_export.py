"""Write trained adapters as PEFT folders, each atomically."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlplora.adapters.files import WEIGHTS_NAME, write_tensors
from dlplora.atomic import naming
from dlplora.errors import AdapterError

EXPORT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save_adapter(folder: str | os.PathLike[str], config: Any, tensors: Mapping[str, Tensor], dtype: str = "float32") -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``; an older folder of that name is replaced whole.

    Args:
        folder: The adapter's folder.
        config: A ``peft.LoraConfig``.
        tensors: PEFT state-dict names (``base_model.model.<module>.lora_A.weight``) to tensors.
        dtype: Stored precision.

    Raises:
        AdapterError: If a tensor is not finite: the training diverged, and nothing is written.
    """
    folder = Path(folder)
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ready[name] = tensor.detach().to("cpu", EXPORT_DTYPES[dtype]).contiguous()
        if not torch.isfinite(ready[name]).all():
            raise AdapterError(f"adapter '{folder.name}': {name} is not finite in {dtype}; the training diverged. Lower the learning rate.")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config.inference_mode = True
    try:
        with naming(folder):
            config.save_pretrained(str(temporary))
        write_tensors(temporary / WEIGHTS_NAME, ready, {"format": "pt"})
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    return folder
