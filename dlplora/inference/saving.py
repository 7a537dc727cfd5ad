"""Folders of saved fused models: pool, method and a reference to the base model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dlplora.adapters.pool import write_manifest
from dlplora.config import build, short
from dlplora.documents import read_json
from dlplora.errors import ConfigError, MethodError, UnavailableMethodError
from dlplora.methods.base import FusionMethod, MethodContext
from dlplora.methods.registry import MethodSpec, build_method, load_method_spec, method_class
from dlplora.modules.lora_bank import AdapterBank

CONFIG_NAME = "fused_config.json"


@dataclass(frozen=True, kw_only=True)
class _Description:
    """The content of ``fused_config.json``."""

    format: int
    pretrained: str | None
    method: str
    backend: str
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """What a folder written by ``save`` says."""

    pretrained: str | None
    pool: Path
    method: str
    method_folder: Path
    backend: str
    artifacts: dict[str, Path]


def save(
    target: Path,
    bank: AdapterBank,
    method: FusionMethod,
    *,
    base_model: Mapping[str, Any],
    artifacts: Mapping[str, Path],
    pretrained: str | None,
    backend: str,
) -> None:
    """Write a folder atomically.

    Args:
        target: New or empty folder.
        bank: The experts as they were loaded.
        method: Its ``save`` writes its own folder.
        base_model: Fingerprint of the base model.
        artifacts: Folders the method was prepared from, by role; copied.
        pretrained: Name of the base model; None is the embedded one.
        backend: Kernel backend asked for.

    Raises:
        ConfigError: If the folder is not empty, or the bank was not loaded from adapter folders.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty; give a new folder.")
    specs = {name: bank.specs[name] for name in bank.names if name in bank.specs}
    if not specs or len(specs) != bank.num_experts:
        raise ConfigError("only a bank that was loaded from adapter folders can be saved; this one was made from tensors.")
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "pool").mkdir(parents=True)
    for name, spec in specs.items():
        shutil.copytree(spec.path, temporary / "pool" / name)
    described = {name: spec.description for name, spec in specs.items()}
    write_manifest(temporary / "pool", list(specs), dict(base_model), descriptions=described)
    method.save(temporary / "method")
    for role, path in artifacts.items():
        if path.is_dir():
            shutil.copytree(path, temporary / "artifacts" / role)
    description = {"format": 1, "pretrained": pretrained, "method": method.name, "backend": backend, "names": list(specs)}
    (temporary / CONFIG_NAME).write_text(json.dumps(description, indent=2) + "\n")
    if target.exists():
        target.rmdir()
    os.replace(temporary, target)


def read(folder: str | Path | None) -> SavedModel | None:
    """The description of a folder written by ``save``; None for anything else.

    Raises:
        ConfigError: If the description is damaged or of an unknown format.
    """
    if folder is None or not (Path(folder) / CONFIG_NAME).is_file():
        return None
    folder = Path(folder)
    path = folder / CONFIG_NAME
    content = read_json(path)
    if content.get("format") != 1:
        raise ConfigError(f"{path} is damaged: format {short(content.get('format'))} is not known; expected 1.")
    saved = build(_Description, content, str(path))
    return SavedModel(
        pretrained=saved.pretrained,
        pool=folder / "pool",
        method=saved.method,
        method_folder=folder / "method",
        backend=saved.backend,
        artifacts={role.name: role for role in sorted((folder / "artifacts").glob("*")) if role.is_dir()},
    )


def load_method(saved: SavedModel, bank: AdapterBank, context: MethodContext) -> FusionMethod:
    """The saved method, with its trained parts.

    Raises:
        MethodError: If it is not installed.
    """
    try:
        cls = method_class(saved.method)
    except MethodError as error:
        raise MethodError(f"the saved model uses a method that is not installed: {error}") from error
    return cls.load(saved.method_folder, bank, context)


def untrained_method(name: str) -> UnavailableMethodError:
    """What to say of a method without its trained gates."""
    return UnavailableMethodError(
        f"method '{name}' has to be trained first: dlplora fit fusion --model.init_args.method={name} "
        "--model.init_args.pretrained=BASE --model.init_args.pool=POOL, with your tasks (docs/local_tasks.md). Then pass its folder: "
        "trained=FOLDER, on the command line --trained FOLDER."
    )


def require_no_adapters(method: str | MethodSpec | FusionMethod) -> None:
    """Check that a method can do without a pool.

    Raises:
        ConfigError: If it uses adapters.
    """
    spec = load_method_spec(method) if isinstance(method, str) else method
    name, used = (spec.name, spec) if isinstance(spec, FusionMethod) else (spec.name, method_class(spec.method))
    if used.metadata.granularity != "none":
        raise ConfigError(
            f"method '{name}' needs a pool of adapters: pass pool=FOLDER (--pool FOLDER), or method=base for the base model alone."
        )


def choose_method(
    saved: SavedModel | None,
    method: str | MethodSpec | FusionMethod,
    params: Mapping[str, Any] | None,
    bank: AdapterBank,
    context: MethodContext,
    *,
    untrained: bool,
) -> FusionMethod:
    """The method of a saved model, a trained one from the folder ``context.artifacts["trained"]``, or a new one.

    Args:
        saved: The saved model, if one is loaded; its method is taken unless another name or other parameters are asked for.
        method: Preset, path or method; or what ``load_method_spec`` read; or a method that is built, which may hold trained parts.
        params: Overrides of the parameters of a method that is not built yet.
        bank, context: As for ``FusionMethod.prepare``.
        untrained: Whether a method that needs training may be returned without it, in order to train it.

    Raises:
        MethodError: If the trained folder is missing, belongs to another method or pool, or was trained with other parameters; or if
            parameters are given for a method that is built.
    """
    bare = method.method if isinstance(method, MethodSpec) and method.path is None and not method.params else method
    if saved is not None and bare == saved.method and not params:
        return load_method(saved, bank, context)
    if isinstance(method, FusionMethod):
        if params:
            raise MethodError(f"method '{method.name}' is already built; give method_params with a method's name only.")
        built, name, asked = method, method.name, [item.name for item in fields(method.config)]
    else:
        spec = load_method_spec(method, params) if isinstance(method, str) else method
        built = build_method(spec, None if isinstance(method, str) else params)
        name, asked = spec.name, [*spec.params, *(params or {})]
    folder = context.artifacts.get("trained")
    if folder is None or "trained" not in built.metadata.needs:
        if "trained" in built.metadata.needs and not untrained and built is not method:
            raise untrained_method(name)
        return built
    known = built.saved_config(folder, bank)
    other = {key for key in asked if getattr(known, key) != getattr(built.config, key)}
    if other - set(built.evaluation_params):
        key = sorted(other - set(built.evaluation_params))[0]
        raise MethodError(
            f"{folder} was trained with {key}={getattr(known, key)!r}, '{name}' asks for {getattr(built.config, key)!r}. "
            "Train it with that value, or leave the parameter out."
        )
    loaded = built.load(folder, bank, context)
    loaded.config = replace(loaded.config, **{key: getattr(built.config, key) for key in other})
    return loaded
