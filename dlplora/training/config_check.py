"""Check a training command line before the parser does, and shorten the parser's messages.

The parser explains a misspelt key in a dozen lines. The message here is one line: the key, its place, and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dlplora.config import build, check_keys
from dlplora.documents import read_yaml, refuse_resolvers
from dlplora.errors import ConfigError, nearest

PARTS = ("model", "data")
_NOISE = ("Does not validate against", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value type:")


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The keys of a training configuration; what stands under them is the training command's parser to judge."""

    seed_everything: bool | int | None = None
    trainer: dict[str, Any] | str | None = None
    model: dict[str, Any] | str | None = None
    data: dict[str, Any] | str | None = None
    ckpt_path: str | None = None
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A class and its arguments."""

    class_path: str | None = None
    init_args: dict[str, Any] | None = None
    dict_kwargs: dict[str, Any] | None = None


def first_reason(text: str) -> str:
    """A parser's message of many lines on one line, without the parser's inner workings.

    >>> first_reason("Parser key \\"a\\":\\n  - Expected a <class 'int'>\\n  - Expected a <class 'NoneType'>\\n  Given value: x")
    'a: Expected a int: Given value: x'
    """
    kept: list[str] = []
    for raw in text.splitlines():
        line = raw.strip(" -").rstrip(":")
        if (
            not line
            or line.startswith(tuple(noise.rstrip(":") for noise in _NOISE))
            or re.match(r"Given value: (NestedArg|Namespace)\(", line)
        ):
            continue
        line = re.sub(r"Parser key \"([^\"]+)\"", r"\1", line)
        line = re.sub(r"Problem with given class_path '([^']+)'", r"\1", line)
        kept.append(re.sub(r"<class '([^']+)'>", r"\1", line))
    reason = ": ".join(kept) or "the configuration cannot be parsed"
    return reason if len(reason) <= 400 else reason[:397] + "..."


def check_command_line(arguments: Sequence[str]) -> dict[str, Any]:
    """Check the YAML files of a command line, then its overrides.

    Returns:
        The classes of ``model`` and ``data`` that the files name, as far as they are ours.

    A configuration may not read the environment: that reference is taken away from OmegaConf for this process.

    Raises:
        ConfigError: If a file is missing or no YAML mapping, or a key of file or override is unknown.
    """
    classes: dict[str, Any] = {}
    OmegaConf.clear_resolver("oc.env")  # the parser fills references in by itself, also those of files that a file names
    for position, argument in enumerate(arguments):
        refuse_resolvers(argument, "command line")
        name, _, value = argument.partition("=")
        if name in {"--config", "-c"}:
            path = value or (arguments[position + 1] if position + 1 < len(arguments) else "")
            if not path:
                raise ConfigError("--config needs the path of a YAML file.")
            classes |= _check_config(Path(path))
    if any(argument.startswith(("--model.class_path", "--data.class_path", "--model=", "--data=")) for argument in arguments):
        return classes  # another class than the file's: the parser's business
    for argument in arguments:
        if argument.startswith("--"):
            _check_override(argument[2:].partition("=")[0].split("."), classes)
    return classes


def _check_config(path: Path) -> dict[str, Any]:
    """Check one file; returns the class of each part."""
    if not path.is_file():
        raise ConfigError(f"config file not found: {path}. Shipped ones are given by name, for instance `dlplora fit router`.")
    config = build(_Run, read_yaml(path), str(path))
    if isinstance(config.trainer, dict):
        check_keys(config.trainer, trainer_keys(), f"{path}: trainer")
    classes: dict[str, Any] = {}
    for part in PARTS:
        section = getattr(config, part)
        if isinstance(section, dict):
            where = f"{path}: {part}"
            named = build(_Part, section, where)
            cls = _find_class(named.class_path or "", where)
            if cls is not None:
                classes[part] = cls
                _check_arguments(cls, named.init_args or {}, f"{where}: {cls.__name__}")
    return classes


def trainer_keys() -> tuple[str, ...]:
    """Parameters of Lightning's trainer."""
    import lightning as L

    return tuple(name for name in inspect.signature(L.Trainer.__init__).parameters if name != "self")


def _find_class(class_path: str, where: str) -> Any:
    """A class of ours, imported; None for other packages' classes and for abbreviated names."""
    module_name, _, class_name = class_path.rpartition(".")
    if not module_name.startswith("dlplora."):
        return None
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{where}: class_path '{class_path}': {error}.") from error
    if not hasattr(module, class_name):
        raise ConfigError(f"{where}: module {module_name} has no class '{class_name}'.{nearest(class_name, dir(module))}")
    return getattr(module, class_name)


def _parameters(cls: Any) -> dict[str, Any]:
    """Parameter or field names of a class and their annotations."""
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls.__init__)
    return {name: hints.get(name) for name in inspect.signature(cls.__init__).parameters if name != "self"}


def _check_arguments(cls: Any, values: Mapping[str, Any], where: str) -> None:
    known = _parameters(cls)
    check_keys(values, tuple(known), where)
    for name, value in values.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(known[name]):
            _check_arguments(known[name], value, f"{where}: {name}")


def _check_override(keys: Sequence[str], classes: Mapping[str, Any]) -> None:
    if keys[0] == "trainer" and len(keys) > 1:
        check_keys({keys[1].rstrip("+"): None}, trainer_keys(), "--trainer")
    if keys[0] not in classes or len(keys) < 2:
        return
    names = keys[2:] if keys[1] == "init_args" else keys[1:]
    nested: dict[str, Any] = {}
    for name in reversed(names):
        nested = {name: nested}
    _check_arguments(classes[keys[0]], nested, f"--{keys[0]}: {classes[keys[0]].__name__}")
