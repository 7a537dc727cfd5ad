"""Find trained artifacts: shipped with the package if their recipe still matches, else in a folder of local trainings.

Roles: ``pool``, ``router``, adapters trained on all tasks (``multitask`` and its other ranks), ``trained/PRESET`` for the gates of a method
that ``LitFusion`` trains, and ``backbone`` for a small base model trained here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlplora.adapters.pool import MANIFEST_NAME
from dlplora.atomic import write_atomically
from dlplora.config import config_hash, configs_root, load_yaml
from dlplora.documents import read_json
from dlplora.errors import ConfigError
from dlplora.inference.loading import nano_asset
from dlplora.methods.registry import MethodSpec, build_method, hashed_params, load_method_spec
from dlplora.reproduce.recipe import NANO, TRAINED, Setting, kind_of

RECIPE = "recipe.json"
CONFIGS = {"pool": "experts", "multitask": "multitask", "router": "router"}
"""Role -> training configuration where the two differ or the artifact is shipped; another role's configuration bears its name."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One artifact and where it comes from."""

    role: str
    seed: int
    folder: Path
    source: str
    """``shipped``, ``trained before`` or ``to be trained``."""

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.role}, seed {self.seed}" if self.seed else self.role

    @property
    def ready(self) -> bool:
        """Whether nothing has to be done for it."""
        return self.source != "to be trained"


def roles_of(method: str | MethodSpec) -> tuple[str, ...]:
    """Roles a method needs, in the order they are made; every method needs the pool."""
    spec = load_method_spec(method) if isinstance(method, str) else method
    return ("pool", *(f"{TRAINED}{spec.name}" if role == "trained" else role for role in build_method(spec).artifact_roles))


def config_path(role: str, setting: Setting) -> Path:
    """The training configuration of a role.

    Raises:
        ConfigError: If there is none.
    """
    kind = kind_of(role)
    name = setting.configs.get(kind) or ("fusion" if kind == "trained" else CONFIGS.get(role, role))
    path = configs_root() / "train" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"no training configuration for '{role}': {path} is missing.")
    return path


def recipe(role: str, seed: int = 0, setting: Setting = NANO) -> dict[str, Any]:
    """Everything the artifact is a function of: its training configuration, the base model, the tasks' text; for gates also the
    method's parameters and the pool's recipe; the seed if it is not the configuration's own."""
    described: dict[str, Any] = {"config": load_yaml(config_path(role, setting)), **setting.facts(role)}
    if role.startswith(TRAINED):
        spec = load_method_spec(role.removeprefix(TRAINED))
        described |= {"method": spec.method, "params": hashed_params(spec), "pool": recipe_hash("pool", seed, setting)}
    return described | ({"seed": seed} if seed else {})


def recipe_hash(role: str, seed: int = 0, setting: Setting = NANO) -> str:
    """Hash of ``recipe``."""
    return config_hash(recipe(role, seed, setting))


def write_recipe(role: str, folder: Path, seed: int = 0, setting: Setting = NANO) -> None:
    """Write the recipe beside a finished artifact; its presence says that training ended.

    What a base model's pretraining has noted in that file stays, under ``pretraining``.

    Raises:
        ConfigError: If the training has exported nothing.
    """
    if not is_complete(folder):
        raise ConfigError(f"training of {role} ended without an export in {folder}. Run the command again to resume.")
    described = recipe(role, seed, setting)
    if role == "backbone":
        noted = read_json(folder / RECIPE)
        described["pretraining"] = noted.get("pretraining", noted)
        write_atomically(folder / RECIPE, json.dumps({"recipe_hash": recipe_hash(role, seed, setting), **described}, indent=2) + "\n")
        return
    write_atomically(folder / RECIPE, json.dumps({"recipe_hash": config_hash(described), **described}, indent=2) + "\n")


def is_complete(folder: Path) -> bool:
    """Whether a folder holds exported weights: its own, or those of every adapter that a pool's manifest names."""
    manifest = folder / MANIFEST_NAME
    try:
        parts = [folder / adapter["name"] for adapter in read_json(manifest)["adapters"]] if manifest.is_file() else [folder]
    except (ConfigError, KeyError, TypeError):
        return False
    return all(any(part.glob("*.safetensors")) for part in parts)


def _matches(folder: Path, wanted: str) -> bool:
    path = folder / RECIPE
    if not path.is_file() or not is_complete(folder):
        return False
    try:
        return bool(read_json(path).get("recipe_hash") == wanted)
    except ConfigError:
        return False


def artifact_dir(runs: Path, seed: int) -> Path:
    """The folder of one seed's artifacts."""
    return runs / f"seed{seed}" if seed else runs


def locate(role: str, runs: Path, *, fresh: bool, seed: int = 0, setting: Setting = NANO) -> Artifact:
    """Where an artifact is, or will be.

    The router is always trained in ``runs`` rather than taken from the package: it is the method's own part, and cheap.

    Args:
        role: As above.
        runs: Folder of local training runs.
        fresh: Whether shipped artifacts are ignored.
        seed: Seed of the training; only seed 0 is shipped.
        setting: Base model and tasks.
    """
    wanted = recipe_hash(role, seed, setting)
    trained = artifact_dir(runs, seed) / role
    if _matches(trained, wanted):
        return Artifact(role=role, seed=seed, folder=trained, source="trained before")
    if setting.shipped and not fresh and role != "router" and _matches(nano_asset(role), wanted):
        return Artifact(role=role, seed=seed, folder=nano_asset(role), source="shipped")
    return Artifact(role=role, seed=seed, folder=trained, source="to be trained")


def delete_artifacts(runs: Path, roles: Sequence[str], seed: int = 0) -> None:
    """Remove local artifacts so that the next training starts again."""
    for role in roles:
        for folder in (artifact_dir(runs, seed) / role, artifact_dir(runs, seed) / f"{role}_training"):
            shutil.rmtree(folder, ignore_errors=True)
