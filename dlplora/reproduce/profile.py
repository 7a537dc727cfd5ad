"""A comparison on one base model as a file: ``configs/reproduce/NAME.yaml``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlplora.config import build, config_label, configs_root, list_configs, load_yaml
from dlplora.errors import ConfigError, nearest
from dlplora.inference.backbones import NAMED, is_local_name, resolve_backbone
from dlplora.reporting.columns import REFERENCE_ROWS

PROFILES = {"paper": "local-small", "real": "real26", "nano_linear": "nano_linear", "confusable": "confusable"}
"""Suite of ``dlplora reproduce`` -> the profile that is taken if none is named."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One file of ``configs/reproduce``."""

    protocol: str
    """Name in ``configs/protocol``, or a file."""
    backbone: str | None = None
    """Folder or hub id; None is the embedded nano model, or the one that is pretrained here."""
    revision: str | None = None
    """Commit of a hub id; None takes the newest, and the records say which it was."""
    train_backbone: bool = False
    """Whether the base model is pretrained here, on the training rows."""
    methods: list[str] = field(default_factory=lambda: list(REFERENCE_ROWS))
    """Methods of the comparison unless others are named."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Role, its kind, or ``all`` -> what changes in its training configuration."""
    processes: int | None = None
    """Processes that the experts are dealt out to."""
    shape: str | None = None
    """Name of the base model's sizes (``inference.shapes``), for estimates without a download."""
    configs: dict[str, str] = field(default_factory=dict)
    """Kind of training -> training configuration, where it is not the paper suite's."""
    without_rows: str | None = None
    """Protocol that is taken where the rows of the protocol's suite are neither in a folder nor on a hub that can be reached."""

    @property
    def fit_options(self) -> dict[str, list[str]]:
        """``options`` as options of ``dlplora fit``."""
        return {role: _as_options(given) for role, given in self.options.items()}


def _as_options(settings: Mapping[str, Any], above: str = "--") -> list[str]:
    """Options with dotted keys for nested settings.

    >>> _as_options({"trainer": {"accelerator": "cpu", "max_epochs": 1}})
    ['--trainer.accelerator=cpu', '--trainer.max_epochs=1']
    """
    found: list[str] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            found += _as_options(value, f"{above}{key}.")
        else:
            found.append(f"{above}{key}={value if isinstance(value, str) else json.dumps(value)}")
    return found


def load_profile(name: str, also: Sequence[str] = ()) -> tuple[str, Profile]:
    """A profile by name or file, or the one for any base model with a folder or hub id in it; also what its runs are called.

    Args:
        name: Of a profile, a file, a folder or a hub id.
        also: Further names that the caller knows, for the error.

    Raises:
        ConfigError: If the name is neither a profile, nor a folder, nor like a hub id.
    """
    known = list_configs("reproduce")
    if Path(name).suffix in {".yaml", ".yml"}:
        return config_label(name), _read_profile(Path(name))
    path = configs_root() / "reproduce" / f"{name}.yaml"
    if name in known and name != "any":
        return name, _read_profile(path)
    local = is_local_name(name)
    if name == "any" or not (local or name.count("/") == 1):
        profiles = [*also, *(one for one in known if one != "any"), *NAMED]
        raise ConfigError(
            f"unknown base model '{name}'.{nearest(name, profiles)} Known: {', '.join(profiles)}; "
            "or give a model folder, a GGUF file, a hub id, or a profile's file."
        )
    profile = _read_profile(configs_root() / "reproduce" / "any.yaml")
    return Path(name).name, dataclasses.replace(profile, backbone=resolve_backbone(name) if local and name not in NAMED else name)


def _read_profile(path: Path) -> Profile:
    return build(Profile, load_yaml(path), str(path))


def profile_of_protocol(protocol: str) -> Profile | None:
    """The shipped profile that trains for a protocol; None if there is none, as for nano, whose artifacts are shipped."""
    for name in list_configs("reproduce"):
        profile = _read_profile(configs_root() / "reproduce" / f"{name}.yaml")
        if protocol in {profile.protocol, profile.without_rows}:
            return profile
    return None
