"""Identity of a run before anything is loaded: checksums of folders, identity of the base model, device and dtype."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.adapters.files import file_sha256
from dlplora.config import config_hash
from dlplora.evaluation.protocol import Protocol
from dlplora.inference.backbones import resolve_backbone
from dlplora.inference.devices import AUTO, DTYPES, choose_device, dtype_name, resolve_dtype
from dlplora.inference.gguf import read_source
from dlplora.inference.saving import read as saved_model

if TYPE_CHECKING:
    import torch

NOTES = ("recipe.json", "training.json")
"""Files of an artifact that say how it was made, with times that differ between equal runs."""


def folder_hash(folder: Path, unread: Collection[str] = ()) -> str:
    """Hash over the weights and JSON files of an artifact folder, names included; notes on how it was trained do not count.

    Args:
        folder: The artifact.
        unread: Names of further files that do not count, since the method does not read them.
    """
    skipped = {*NOTES, *unread}
    files = sorted(path for path in folder.rglob("*") if path.suffix in {".safetensors", ".json"} and path.name not in skipped)
    return config_hash([[str(path.relative_to(folder)), file_sha256(path)] for path in files])


def backbone_identity(name: str | None, revision: str | None) -> dict[str, Any]:
    """Name and checksum of a local base model, or hub id and revision; nothing is loaded.

    A model that was converted from a GGUF file is identified by that file: its name with the beginning of its checksum, so that no table
    mixes it with other weights, and the whole checksum.
    """
    source = resolve_backbone(name)
    converted = read_source(Path(source))
    if converted is not None:
        return {"name": f"{converted['file']}@{converted['sha256'][:8]}", "revision": None, "sha256": converted["sha256"]}
    weights = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    label = "nano" if name is None else Path(source).name if weights else source
    return {"name": label, "revision": revision, "sha256": config_hash([file_sha256(path) for path in weights]) if weights else None}


def run_device(backbone: str | None, device: str | None) -> torch.device:
    """The device of a run: the named one, else the CPU for the embedded model (as in its records) and the best one for any other.

    Raises:
        ConfigError: If this machine does not have the device.
    """
    return choose_device("cpu" if device is None and backbone is None else device)


def chosen_dtype(protocol: Protocol, device: str | None) -> str:
    """Name of the dtype of a run; ``auto`` resolved for its base model and device, so that hashes and records name what was used.

    Raises:
        ConfigError: If the device or the dtype is unknown.
    """
    place = run_device(protocol.backbone, device)
    if protocol.dtype != AUTO:
        return protocol.dtype if protocol.dtype in DTYPES else dtype_name(resolve_dtype(protocol.dtype, place))
    saved = saved_model(protocol.backbone)
    backbone = protocol.backbone if saved is None else saved.pretrained
    return dtype_name(resolve_dtype(AUTO, place, None if backbone is None else resolve_backbone(backbone), protocol.revision))
