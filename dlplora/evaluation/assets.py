"""Trained artefacts of the nano suite: shipped ones while their recipe still matches, else trained here, once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlplora.config import config_hash, configs_root, load_yaml
from dlplora.errors import ConfigError
from dlplora.inference.loading import nano_asset
from dlplora.modules.adapter_files import file_sha256
from dlplora.reporting.store import write_atomically
from dlplora.tasks.nano import nano_suite

RECIPE = "recipe.json"
CONFIGS = {"pool": "experts", "multitask": "multitask", "router": "router"}
"""Artefact -> training configuration, in the order they are made."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One artefact and where it comes from."""

    role: str
    folder: Path
    source: str
    """``shipped``, ``trained before`` or ``to be trained``."""

    @property
    def ready(self) -> bool:
        """Whether nothing has to be done for it."""
        return self.source != "to be trained"


def recipe(role: str) -> dict[str, Any]:
    """Everything the artefact is a function of: its training configuration, the backbone, the tasks' text."""
    backbone = nano_asset("backbone") / "model.safetensors"
    if not backbone.is_file():
        raise ConfigError(f"the embedded backbone is missing ({backbone}); this installation is incomplete.")
    config = load_yaml(configs_root() / "train" / f"{CONFIGS[role]}.yaml")
    tasks = {
        task.name: config_hash([task.version, task.phrasings, [[item.prompt, item.answer] for item in task.items("train", 20)]])
        for task in nano_suite().tasks
    }
    return {"config": config, "backbone_sha256": file_sha256(backbone), "tasks": tasks}


def recipe_hash(role: str) -> str:
    """Hash of ``recipe``."""
    return config_hash(recipe(role))


def stamp(role: str, folder: Path) -> None:
    """Write the recipe beside a finished artefact; its presence says that training ended."""
    described = recipe(role)
    write_atomically(folder / RECIPE, json.dumps({"recipe_hash": config_hash(described), **described}, indent=2) + "\n")


def _matches(folder: Path, wanted: str) -> bool:
    path = folder / RECIPE
    if not path.is_file():
        return False
    try:
        return bool(json.loads(path.read_text())["recipe_hash"] == wanted)
    except (json.JSONDecodeError, KeyError, TypeError):
        return False


def locate(role: str, runs: Path, *, fresh: bool) -> Asset:
    """Where an artefact is, or will be.

    The router is always trained in ``runs`` rather than taken from the package: it is the method's own part, and cheap.

    Args:
        role: ``pool``, ``multitask`` or ``router``.
        runs: Folder of local training runs.
        fresh: Whether shipped artefacts are ignored.
    """
    wanted = recipe_hash(role)
    trained = runs / role
    if _matches(trained, wanted):
        return Asset(role=role, folder=trained, source="trained before")
    if not fresh and role != "router" and _matches(nano_asset(role), wanted):
        return Asset(role=role, folder=nano_asset(role), source="shipped")
    return Asset(role=role, folder=trained, source="to be trained")


def train(role: str, runs: Path) -> Path:
    """Train one artefact into ``runs/<role>`` by its configuration, in a process of its own; resumes after an interruption.

    Raises:
        ConfigError: If training failed; its own message stands above.
    """
    folder = runs / role
    config = configs_root() / "train" / f"{CONFIGS[role]}.yaml"
    command = [sys.executable, "-m", "dlplora.cli.main", "fit", "--config", str(config), "--ckpt_path", "last"]
    command += [f"--model.init_args.export_folder={folder}", f"--trainer.default_root_dir={runs / f'{role}_training'}"]
    done = subprocess.run(command, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode != 0:
        raise ConfigError(f"training of the {role} ended with exit code {done.returncode}; see the message above. Run the command again to resume.")
    stamp(role, folder)
    return folder


def forget(runs: Path) -> None:
    """Remove local artefacts so that the next training starts anew."""
    for role in CONFIGS:
        for folder in (runs / role, runs / f"{role}_training"):
            shutil.rmtree(folder, ignore_errors=True)
