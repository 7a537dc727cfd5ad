"""Strict configuration: YAML files to frozen dataclasses, without torch.

A key nobody declared is an error with the nearest valid key; a missing value is never guessed. Method files and protocol
files are separate, and a method file that names a protocol key is refused: that is how settings stay identical.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from dlplora.errors import ConfigError, nearest

T = TypeVar("T")

PACKAGE_ROOT = Path(__file__).resolve().parent
ASSETS_ROOT = PACKAGE_ROOT / "assets"


def configs_root() -> Path:
    """The folder of shipped configurations: beside the package in a clone, inside it in a wheel."""
    in_clone = PACKAGE_ROOT.parent / "configs"
    return in_clone if (in_clone / "protocol").is_dir() else PACKAGE_ROOT / "_configs"


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read one YAML mapping, with OmegaConf interpolation resolved.

    Raises:
        ConfigError: If the file is missing, is not YAML, or is not a mapping.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file not found: {path}. Pass the path of an existing YAML file.")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"cannot read {path} as YAML: {first_line}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, found {type(loaded).__name__}.")
    return {str(key): value for key, value in loaded.items()}


def find_config(kind: str, name: str) -> Path:
    """Resolve ``name`` to a file: an existing path wins, then ``configs/<kind>/<name>.yaml``.

    Raises:
        ConfigError: If neither exists; the message lists the shipped names.
    """
    direct = Path(name)
    if direct.suffix in {".yaml", ".yml"}:
        if direct.is_file():
            return direct
        raise ConfigError(f"config file not found: {name}.")
    path = configs_root() / kind / f"{name}.yaml"
    if path.is_file():
        return path
    known = list_configs(kind)
    what = "training configuration" if kind == "train" else kind
    raise ConfigError(f"unknown {what} '{name}'.{nearest(name, known)} Known: {', '.join(known)}; or give the path of a YAML file.")


def list_configs(kind: str) -> list[str]:
    """Names of the shipped configurations of one kind, sorted."""
    return sorted(path.stem for path in (configs_root() / kind).glob("*.yaml"))


def _accepts(annotation: Any, value: Any) -> bool:
    """Whether a YAML value fits a (simple) annotation; unknown annotations accept anything."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(option, value) for option in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if origin in (list, tuple):
        return isinstance(value, (list, tuple))
    if origin is dict:
        return isinstance(value, Mapping)
    if annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    return True


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make a dataclass from a mapping; every key must be a field and every value must fit its type.

    Args:
        cls: A dataclass type.
        values: Keys and plain YAML values; nested mappings build nested dataclasses.
        where: What to call the source in errors, usually a file path.

    Raises:
        ConfigError: For an unknown key (with the nearest valid one), a missing required key, or a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key '{key}'.{nearest(str(key), fields)} Valid keys: {', '.join(fields) or 'none'}.")
    hints = typing.get_type_hints(cls)
    ready: dict[str, Any] = {}
    for name, value in values.items():
        annotation = hints[name]
        if dataclasses.is_dataclass(annotation) and isinstance(value, Mapping):
            ready[name] = build(typing.cast(type[Any], annotation), value, f"{where}: {name}")
            continue
        if not _accepts(annotation, value):
            wanted = getattr(annotation, "__name__", None) if not typing.get_args(annotation) else str(annotation)
            raise ConfigError(f"{where}: '{name}' must be {str(wanted).replace('typing.', '')}, got {value!r}.")
        ready[name] = tuple(value) if typing.get_origin(annotation) is tuple else value
    missing = [
        name
        for name, field in fields.items()
        if name not in ready and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing required key(s): {', '.join(missing)}.")
    try:
        return cls(**ready)
    except ConfigError:
        raise
    except ValueError as error:  # a __post_init__ check
        raise ConfigError(f"{where}: {error}") from error


def canonical_json(value: Any) -> str:
    """One spelling for equal configurations: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def config_hash(value: Any) -> str:
    """First 12 hex digits of the SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]


def require_writable(folder: str | os.PathLike[str], what: str) -> None:
    """Find out before hours of work whether a folder can be written; nothing is left behind.

    Args:
        folder: Where something is going to be written; it need not exist.
        what: What it is for, for the error.

    Raises:
        ConfigError: If neither the folder nor its nearest existing parent takes files.
    """
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(dir=place):
            pass
    except OSError as error:
        raise ConfigError(f"{what}: cannot write in {place} ({error.strerror}). Choose another folder than {folder}.") from error
