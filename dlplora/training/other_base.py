"""Recipes of the nano model on another base model: what depends on the model is set anew, unless the command line gives it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlplora.config import configs_root, load_yaml

RATES = ((10e6, 5e-3), (500e6, 2e-3), (math.inf, 2e-4))
"""Parameters of a base model, at most, and the learning rate of an adapter on it: those of nano, SmolLM2-135M and Qwen2-1.5B to 8 B
(``configs/train/experts.yaml``, ``real_experts.yaml``, ``paper_experts.yaml``)."""
BASE_KEYS = ("backbone", "pretrained")
_NULL = ("", "null", "None", "~")


def fitted_to_base(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """A command line with the settings that another base model needs, placed so that options and later files still win.

    The name that a recipe gives its own base model is dropped. A shipped recipe of the nano model also gets a learning rate for the
    model's size, the dtype of its checkpoint where that is fast, and the best accelerator of this machine.

    Args:
        arguments: Command, ``--config`` with the path of a file, and options.

    Returns:
        The command line, and what was set, for people; None if nothing was.

    Raises:
        ConfigError: If the recipe or the base model is not found.
    """
    given = _given(arguments)
    base = next((given[f"model.{key}"] for key in BASE_KEYS if f"model.{key}" in given), "")
    place = _first_config(arguments)
    if base in _NULL or place is None:
        return list(arguments), None
    end, path = place
    values = (load_yaml(path).get("model") or {}) if path.is_file() else {}
    values = (values.get("init_args") or {}) if isinstance(values, dict) else {}
    values = values if isinstance(values, dict) else {}
    settings: dict[str, str] = {}
    if values.get("base_model_name") is not None and "model.base_model_name" not in given:
        settings["model.init_args.base_model_name"] = "null"
    shown = {}
    if path.resolve().parent == (configs_root() / "train").resolve() and not any(values.get(key) for key in BASE_KEYS):
        shown = {key: value for key, value in _settings(base, values, given).items() if key.replace(".init_args", "") not in given}
    options = [f"--{key}={value}" for key, value in (settings | shown).items()]
    text = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in shown.items())
    note = f"recipe {path.stem} on base model {base}: {text} (an option such as --{next(iter(shown))} changes it)" if shown else None
    return [*arguments[:end], *options, *arguments[end:]], note


def _settings(base: str, values: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    from dlplora.inference.backbones import resolve_backbone
    from dlplora.inference.devices import choose_device, dtype_name, resolve_dtype
    from dlplora.inference.loading import empty_backbone

    source, accelerator = resolve_backbone(base), given.get("trainer.accelerator", "auto")
    dtype = dtype_name(resolve_dtype("auto", choose_device("cpu" if accelerator == "cpu" else None), source))
    found = {"trainer.accelerator": "auto", "model.init_args.dtype": "float32" if dtype == "float32" else "bfloat16"}
    if "lora" in values:
        size = sum(parameter.numel() for parameter in empty_backbone(source).parameters())
        rate = min(float(values["optimizer"]["lr"]), next(rate for most, rate in RATES if size <= most))
        found = {"model.init_args.optimizer.lr": f"{rate:g}", **found}
    return found


def _given(arguments: Sequence[str]) -> dict[str, str]:
    """Options and their values, without ``init_args`` in their names; the last of equal ones."""
    found = {}
    for place, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            following = arguments[place + 1] if place + 1 < len(arguments) else ""
            found[name.replace(".init_args.", ".")] = value if equals else following
    return found


def _first_config(arguments: Sequence[str]) -> tuple[int, Path] | None:
    """The position behind the first configuration, and its file."""
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in {"--config", "-c"} and (equals or place + 1 < len(arguments)):
            return (place + 1, Path(value)) if equals else (place + 2, Path(arguments[place + 1]))
    return None
