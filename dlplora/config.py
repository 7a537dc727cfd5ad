"""Strict configuration: YAML files to frozen dataclasses, without torch.

An unknown key is an error that names the nearest valid key; missing values are not guessed. Method files and protocol files are separate,
and a method file with a protocol key is refused, so all methods of a table have the same settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from dlplora.documents import check_plain, read_yaml
from dlplora.errors import ConfigError, DLPLoRAError, nearest

T = TypeVar("T")

PACKAGE_ROOT = Path(__file__).resolve().parent
ASSETS_ROOT = PACKAGE_ROOT / "assets"

OMIT_DEFAULT_FROM_HASH = {"omit_default_from_hash": True}
"""Metadata of a setting that was added later: omitted from records and hashes at its default, so that old records still match."""


def configs_root() -> Path:
    """The folder of shipped configurations: next to the package in a clone, inside it in a wheel."""
    in_clone = PACKAGE_ROOT.parent / "configs"
    return in_clone if (in_clone / "protocol").is_dir() else PACKAGE_ROOT / "_configs"


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read one YAML mapping; see ``documents.read_yaml`` for its limits.

    Raises:
        ConfigError: If the file is missing, is not YAML, is not a mapping, or breaks a limit.
    """
    return read_yaml(path)


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
    what = {"train": "training configuration", "bench": "benchmark"}.get(kind, kind)
    raise ConfigError(f"unknown {what} '{name}'.{nearest(name, known)} Known: {', '.join(known)}; or give the path of a YAML file.")


def config_label(name: str) -> str:
    """What records call a configuration: its name, or the name of its file without folder and suffix.

    >>> config_label("qwen2-1.5b"), config_label("my/own-1.5b.yaml")
    ('qwen2-1.5b', 'own-1.5b')
    """
    path = Path(name)
    return path.stem if path.suffix in {".yaml", ".yml"} else path.name


def list_configs(kind: str) -> list[str]:
    """Names of the shipped configurations of one kind, sorted."""
    return sorted(path.stem for path in (configs_root() / kind).glob("*.yaml"))


def check_keys(content: Mapping[str, Any], known: Iterable[str], where: str, *, error: type[DLPLoRAError] = ConfigError) -> None:
    """Refuse a key that is not known, with the nearest that is.

    Raises:
        error: At the first unknown key.
    """
    known = tuple(known)
    for key in content:
        if key not in known:
            shown = f" Valid keys: {', '.join(known) or 'none'}." if len(known) <= 40 else ""
            raise error(f"{where}: unknown key '{key}'.{nearest(str(key), known)}{shown}")


@cache
def _adapter(cls: type) -> Any:
    """The validator of a dataclass; making one takes longer than using it."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def build(cls: type[T], values: Any, where: str, *, error: type[DLPLoRAError] = ConfigError) -> T:
    """Make a dataclass from plain data: every key must be a field, and every value must fit its type at every depth.

    Validates everything that is read from files and command lines. Types are strict: no text becomes a number, no number
    a boolean. Lists become tuples and mappings become dataclasses where the annotations say so.

    Args:
        cls: A dataclass type.
        values: A mapping of keys to plain values, as JSON and YAML have them.
        where: What to call the source in errors, usually a file path.
        error: What to raise.

    Raises:
        error: For an unknown key (with the nearest valid one), a missing key, a value of another type, or one that the class refuses.
    """
    from pydantic import ValidationError

    if not isinstance(values, Mapping):
        raise error(f"{where} must be an object (a mapping of keys to values), got {short(values)}.")
    check_keys(values, [field.name for field in dataclasses.fields(cls)], where, error=error)  # type: ignore[arg-type]
    try:
        text = json.dumps(values)
    except (TypeError, ValueError, RecursionError) as problem:
        raise error(f"{where}: holds a value that is not text, a number, a list or a mapping: {problem}.") from problem
    try:
        made = cast(T, _adapter(cast(Any, cls)).validate_json(text, strict=True, extra="forbid"))
    except ValidationError as problem:
        raise error(_reason(cls, values, problem.errors(include_url=False), where)) from problem
    if "NaN" in text or "Infinity" in text:
        check_plain(json.loads(text), where, error=error)
    return made


def short(value: Any, most: int = 60) -> str:
    """A value in an error message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def _reason(cls: type, values: Any, problems: Sequence[Mapping[str, Any]], where: str) -> str:
    """What a validator found, in one sentence: a key that is unknown or missing before a value that does not fit."""
    first = min(problems, key=lambda one: one["type"] not in {"unexpected_keyword_argument", "missing"})
    place = _Place(cls, values)
    for part in first["loc"]:
        if not place.enter(part):
            break
    inside = f"{where}: {place.owner_path}" if place.owner_path else where
    if first["type"] == "value_error":  # a __post_init__ check; some messages name their place
        text = str(first["ctx"]["error"])
        return text if text.startswith(where) else f"{where}: {place.path}: {text}" if place.path else f"{where}: {text}"
    if first["type"] == "unexpected_keyword_argument":
        known = [field.name for field in dataclasses.fields(place.owner)]
        return f"{inside}: unknown key '{first['loc'][-1]}'.{nearest(str(first['loc'][-1]), known)} Valid keys: {', '.join(known)}."
    if first["type"] == "missing" and isinstance(first["loc"][-1], str):
        names = [str(one["loc"][-1]) for one in problems if one["type"] == "missing" and one["loc"][:-1] == first["loc"][:-1]]
        return f"{inside}: missing required key(s): {', '.join(names)}."
    limits = {"greater_than_equal": "at least {ge:g}", "less_than_equal": "at most {le:g}", "greater_than": "more than {gt:g}"}
    wanted = limits[first["type"]].format(**first["ctx"]) if first["type"] in limits else _name_of(place.annotation)
    return f"{where}: '{place.path}' must be {wanted}, got {short(place.value)}."


def _name_of(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        return _name_of(typing.get_args(annotation)[0])
    if dataclasses.is_dataclass(annotation):
        return "an object"
    return re.sub(r"\b(\w+\.)+(?=\w)", "", str(annotation)) if typing.get_args(annotation) else str(annotation.__name__)


class _Place:
    """A place in a document: its path in words, the annotation and the value there, and the dataclass it belongs to."""

    def __init__(self, cls: type, value: Any) -> None:
        self.annotation: Any = cls
        self.value = value
        self.path = self.owner_path = ""
        self.owner: Any = cls

    def enter(self, part: str | int) -> bool:
        """Go one step down; False where a union has several options, of which none fits."""
        while (options := self._options()) is not None:
            if len(options) != 1:
                return False
            self.annotation = options[0]
        arguments = typing.get_args(self.annotation)
        if dataclasses.is_dataclass(self.annotation):
            self.owner, self.owner_path = self.annotation, self.path
            inner = typing.get_type_hints(self.annotation, include_extras=True).get(str(part))
            if inner is None or not isinstance(self.value, Mapping) or part not in self.value:
                return False
        elif typing.get_origin(self.annotation) is dict:
            inner = arguments[1]
        elif typing.get_origin(self.annotation) in (list, tuple) and isinstance(part, int):
            inner = arguments[0] if arguments[-1] is Ellipsis or part >= len(arguments) else arguments[part]
        else:
            return False
        if isinstance(part, int) and isinstance(self.value, (list, tuple)) and part >= len(self.value):
            return False
        self.annotation, self.value = inner, self.value[part]
        self.path += f"[{part}]" if isinstance(part, int) else f".{part}" if self.path else part
        return True

    def _options(self) -> list[Any] | None:
        if typing.get_origin(self.annotation) is typing.Annotated:
            return [typing.get_args(self.annotation)[0]]
        if typing.get_origin(self.annotation) in (typing.Union, types.UnionType):
            return [option for option in typing.get_args(self.annotation) if option is not type(None)]
        return None


def canonical_json(value: Any) -> str:
    """One spelling for equal configurations: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def config_hash(value: Any) -> str:
    """First 12 hex digits of the SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]


def require_writable(folder: str | os.PathLike[str], what: str) -> None:
    """Check before hours of work whether a folder is writable; leaves no files.

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
