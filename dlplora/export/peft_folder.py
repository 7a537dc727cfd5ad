"""Export as one ordinary PEFT adapter, which PEFT, vLLM, SGLang and LoRAX load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlplora.adapters.files import WEIGHTS_NAME, write_tensors
from dlplora.export.fused_adapter import FusedAdapter
from dlplora.export.target import describe, new_folder, require_adapter, require_dtype, stored


def export_peft(
    adapter: FusedAdapter, folder: str | Path, *, base_model: str | None = None, dtype: str = "float32", force: bool = False
) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Rank and alpha are K, so the scaling is 1 in every reader; weights and scalings are in B. In float32 the logits are those of the
    weighted adapters up to rounding.

    Args:
        adapter: What to write.
        folder: New or empty folder.
        base_model: What the configuration names as its base model; None takes what the adapters name.
        dtype: Stored precision.
        force: Replace an older export.

    Raises:
        ConfigError: If the folder is taken.
        AdapterError: If the dtype cannot hold the values.
    """
    require_adapter(adapter)
    require_dtype(dtype)
    with new_folder(Path(folder), force) as temporary:
        write_peft(temporary, adapter, base_model, dtype)
        describe(temporary, "peft", {Path(folder).name: adapter}, dtype, ("peft",))
    return Path(folder)


def export_peft_pool(
    adapters: Mapping[str, FusedAdapter], folder: str | Path, *, base_model: str | None = None, dtype: str = "float32", force: bool = False
) -> Path:
    """Write several adapters as ``FOLDER/NAME``; arguments and errors as for ``export_peft``."""
    require_dtype(dtype)
    with new_folder(Path(folder), force) as temporary:
        for name, adapter in adapters.items():
            write_peft(temporary / name, adapter, base_model, dtype)
        describe(temporary, "peft", adapters, dtype, ("peft",))
    return Path(folder)


def write_peft(folder: Path, adapter: FusedAdapter, base_model: str | None, dtype: str) -> None:
    """The two files of a PEFT adapter."""
    from peft import LoraConfig

    folder.mkdir(exist_ok=True)
    tensors = {}
    for path, (lora_a, lora_b) in adapter.modules.items():
        for side, factor in (("A", lora_a), ("B", lora_b)):
            key = f"base_model.model.{path}.lora_{side}.weight"
            tensors[key] = stored(key, factor, dtype)
    options: dict[str, Any] = {"fan_in_fan_out": True} if adapter.fan_in_fan_out else {}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.rank,
        lora_dropout=0.0,
        target_modules=list(adapter.target_modules),
        base_model_name_or_path=base_model or adapter.base_model,
        inference_mode=True,
        **options,
    )
    config.save_pretrained(str(folder))
    write_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
