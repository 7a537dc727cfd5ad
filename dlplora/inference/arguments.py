"""Arguments of the public functions: what is of another kind is refused by name, before anything is loaded."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlplora.errors import ConfigError, GenerationError, MethodError, nearest
from dlplora.methods.base import FusionMethod
from dlplora.methods.registry import MethodSpec, available_methods
from dlplora.modules.lora_bank import AdapterBank


def require_keywords(function: Callable[..., Any], given: Mapping[str, Any], *passed_on: Callable[..., Any]) -> None:
    """Refuse a keyword that neither a public function nor one that it passes its options on to has.

    Args:
        function: The public function; the message has its name.
        given: Its ``**options``.
        passed_on: Functions whose keyword arguments it accepts, and classes whose fields.

    Raises:
        TypeError: As Python's own, with the nearest keyword.
    """
    known = {
        name: parameter.kind
        for one in (function, *passed_on)
        for name, parameter in inspect.signature(one).parameters.items()
        if one is function or isinstance(one, type) or parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    names = [name for name, kind in known.items() if kind is not inspect.Parameter.VAR_KEYWORD and name != "self"]
    for name in given:
        if name not in names:
            raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument '{name}'.{nearest(name, names)}")


def require_folders(given: Mapping[str, Any]) -> None:
    """Refuse what names no file or folder; None is not given.

    Raises:
        ConfigError: Naming the argument.
    """
    for name, value in given.items():
        if value is not None and not isinstance(value, (str, os.PathLike)):
            hint = " FusedCausalLM(model, tokenizer, bank, method) takes objects that are loaded." if name == "pretrained" else ""
            raise ConfigError(f"{name} must be the name or path of a folder, got {type(value).__name__}.{hint}")


def require_folder(name: str, value: Any) -> None:
    """Refuse what names no folder to write to, None included.

    Raises:
        ConfigError: Naming the argument.
    """
    if value is None or value == "":
        raise ConfigError(f"{name} must be the path of a folder, got {'None' if value is None else 'an empty text'}.")
    require_folders({name: value})


def require_whole(name: str, value: Any, least: int | None = None) -> None:
    """Refuse what is no whole number, or one below ``least``.

    Raises:
        ConfigError: Naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a whole number, got {value!r}.")
    if least is not None and value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}.")


def require_mapping(name: str, value: Any) -> None:
    """Refuse what is neither a mapping nor None.

    Raises:
        ConfigError: Naming the argument.
    """
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a mapping, got {type(value).__name__}.")


def chosen_method(method: Any, params: Mapping[str, Any] | None) -> str | MethodSpec | FusionMethod | None:
    """The argument ``method`` of ``from_pretrained``: a path as text, and a class by its name, or built if it is not registered.

    Raises:
        MethodError: If it is of another kind, or there are parameters for a class that is not registered.
    """
    if method is None or isinstance(method, (str, MethodSpec, FusionMethod)):
        return method
    if isinstance(method, Path):
        return str(method)
    if isinstance(method, type) and issubclass(method, FusionMethod):
        if available_methods().get(getattr(method, "name", "")) is method:
            return method.name
        if params:
            raise MethodError(f"{method.__name__} is not a registered method: pass {method.__name__}(config) in place of method_params.")
        return method()
    raise MethodError(f"method must be the name of a method, the path of its YAML file, or a FusionMethod; got {type(method).__name__}.")


def require_parts(bank: Any, method: Any) -> None:
    """Refuse names where ``FusedCausalLM`` takes loaded objects.

    Raises:
        ConfigError: Naming the argument.
    """
    for name, value, kind in (("bank", bank, AdapterBank), ("method", method, FusionMethod)):
        if not isinstance(value, kind):
            raise ConfigError(
                f"FusedCausalLM: {name} must be {kind.__name__}, got {type(value).__name__}; FusedCausalLM.from_pretrained takes names."
            )


@contextmanager
def unknown_options_named(given: Mapping[str, Any]) -> Iterator[None]:
    """What transformers says of options that its ``generate`` does not use, with the nearest ones.

    Raises:
        GenerationError: In place of transformers' own error.
    """
    try:
        yield
    except ValueError as error:
        if "`model_kwargs` are not used by the model" not in str(error):
            raise
        from transformers import GenerationConfig

        known = ["trace", "routing", "prompts", *GenerationConfig().to_dict()]
        names = [name for name in given if f"'{name}'" in str(error)]
        hints = "".join(nearest(name, known) for name in names[:1])
        raise GenerationError(f"generate() does not know the option {', '.join(names)}.{hints}") from error
