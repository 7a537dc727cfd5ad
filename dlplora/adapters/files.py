"""Read PEFT LoRA folders: ``adapter_config.json`` and ``adapter_model.safetensors``, without unpickling.

Adapters that cannot be fused exactly are refused, with the reason: DoRA, biases, trained embeddings, ``modules_to_save``, other PEFT
types, and any setting that is not known (``adapters.config``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dlplora.adapters.config import CONFIG_NAME, WEIGHTS_NAME, base_name, read_config
from dlplora.adapters.headers import AdapterHeader, read_header
from dlplora.errors import AdapterError

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "AdapterSpec", "LoraWeights", "file_sha256", "read_adapter", "read_config", "write_tensors"]

LARGEST_DELTA = 1e19
"""No model computes with larger weights: their outputs overflow float32 when a normalisation layer squares them."""

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
    description: str | None = None
    """What the adapter is for, in a few words, from the manifest of its pool."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: If the disk is full; safetensors has an error of its own for that.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(0, str(error), str(path)) from error


def _require_moderate(header: AdapterHeader, tensors: Mapping[str, Tensor]) -> None:
    """Refuse finite factors whose product is too large for any model to compute with."""
    for module, entry in header.modules.items():
        largest = [max(map(abs, torch.stack(torch.aminmax(tensors[key])).tolist())) for key in (entry.key_a, entry.key_b)]
        if abs(entry.scaling) * largest[0] * largest[1] > LARGEST_DELTA:
            raise AdapterError(
                f"adapter '{header.name}': the factors of '{module}' in {header.path / WEIGHTS_NAME} reach {largest[0]:.0e} and "
                f"{largest[1]:.0e}, and a layer computes with their product. The file is damaged, or the training diverged."
            )


def _read_tensors(header: AdapterHeader) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = header.path / WEIGHTS_NAME
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"adapter '{header.name}': {path} is damaged or truncated: {error}.") from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"adapter '{header.name}': '{key}' in {path} holds NaN or infinite values.")
    return tensors


def read_adapter(path: str | Path, name: str | None = None) -> tuple[AdapterSpec, dict[str, LoraWeights]]:
    """Read one PEFT folder.

    Args:
        path: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: Expert name; None takes the folder's name.

    Returns:
        Facts, and ``{module path: (A (R, I), B (O, R), scaling)}`` in the stored dtype. Module paths are those of the
        base model, sorted.

    Raises:
        UnsafeFileError: If the folder holds pickled weights only.
        AdapterError: For anything missing, damaged, not finite, or impossible to fuse exactly.
    """
    folder = Path(path)
    name = folder.name if name is None else name
    header = read_header(folder, name)
    tensors = _read_tensors(header)
    _require_moderate(header, tensors)
    spec = AdapterSpec(
        name=name,
        path=folder,
        base_model=base_name(header.config),
        rank=int(header.config["r"]),
        alpha=float(header.config["lora_alpha"]),
        use_rslora=bool(header.config.get("use_rslora")),
        target_modules=header.targets,
        ranks={module: entry.rank for module, entry in header.modules.items()},
        scalings={module: entry.scaling for module, entry in header.modules.items()},
        sha256=file_sha256(folder / WEIGHTS_NAME),
    )
    return spec, {path: (tensors[entry.key_a], tensors[entry.key_b], entry.scaling) for path, entry in header.modules.items()}
