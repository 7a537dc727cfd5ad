"""Checks of a training command line before the parser sees it, and the parser's long messages made short.

The parser of the training command explains a misspelt key in a dozen lines. A user wants one: which key, where, and the
nearest valid one.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlplora.errors import ConfigError, nearest

TOP_LEVEL = ("seed_everything", "trainer", "model", "data", "ckpt_path", "verbose")
PARTS = ("model", "data")
_NOISE = ("Does not validate against", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value type:")


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

    Raises:
        ConfigError: If a file is missing or no YAML mapping, or a key of file or override is unknown.
    """
    classes: dict[str, Any] = {}
    for position, argument in enumerate(arguments):
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
    import yaml

    if not path.is_file():
        raise ConfigError(f"config file not found: {path}. The shipped ones are under configs/train.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path} as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping with the keys seed_everything, model, data and trainer.")
    check_keys(content, TOP_LEVEL, str(path))
    if isinstance(content.get("trainer"), dict):
        check_keys(content["trainer"], trainer_keys(), f"{path}: trainer")
    classes: dict[str, Any] = {}
    for part in PARTS:
        section = content.get(part)
        if isinstance(section, dict):
            where = f"{path}: {part}"
            check_keys(section, ("class_path", "init_args", "dict_kwargs"), where)
            cls = _find_class(str(section.get("class_path", "")), where)
            if cls is not None:
                classes[part] = cls
                _check_arguments(cls, section.get("init_args") or {}, f"{where}: {cls.__name__}")
    return classes


def check_keys(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse a key that is not known, with the nearest that is.

    Raises:
        ConfigError: At the first unknown key.
    """
    for key in content:
        if key not in known:
            shown = f" Valid keys: {', '.join(known)}." if len(known) <= 20 else ""
            raise ConfigError(f"{where}: unknown key '{key}'.{nearest(str(key), known)}{shown}")


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
