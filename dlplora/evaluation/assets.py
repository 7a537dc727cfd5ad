"""Trained artefacts of the nano suite: shipped ones while their recipe still matches, else trained here, once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlplora.config import config_hash, configs_root, load_yaml
from dlplora.errors import ConfigError
from dlplora.inference.loading import nano_asset
from dlplora.modules.adapter_files import file_sha256
from dlplora.modules.pool import MANIFEST_NAME, write_manifest
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


def _command(role: str, folder: Path, resume: Path, extra: Sequence[str] = ()) -> list[str]:
    config = configs_root() / "train" / f"{CONFIGS[role]}.yaml"
    command = [sys.executable, "-m", "dlplora.cli.main", "fit", "--config", str(config), "--ckpt_path", "last"]
    return [*command, f"--model.init_args.export_folder={folder}", f"--trainer.default_root_dir={resume}", *extra]


def _wait(role: str, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for all; one that fails, or Ctrl-C, ends the others."""
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
    if 130 in codes or -signal.SIGINT in codes:
        raise KeyboardInterrupt
    if any(codes):
        bad = next(code for code in codes if code)
        raise ConfigError(f"training of the {role} ended with exit code {bad}; see the message above. Run the command again to resume.")


def train(role: str, runs: Path, *, seed: int | None = None, processes: int | None = None) -> Path:
    """Train one artefact into ``runs/<role>`` by its configuration, in processes of its own; resumes after an interruption.

    The experts of a pool do not depend on one another, so on a CPU they are dealt out to one single-threaded process a core: a model
    this small keeps one core busy and gains nothing from a second.

    Args:
        role: ``pool``, ``multitask`` or ``router``.
        runs: Folder of local training runs.
        seed: Replaces the configuration's seed.
        processes: Processes of the pool; None takes the number of cores, at most four.

    Raises:
        ConfigError: If training failed; its own message stands above.
    """
    folder, resume = runs / role, runs / f"{role}_training"
    seeded = [] if seed is None else [f"--seed_everything={seed}"]
    if role != "pool":
        _wait(role, [subprocess.Popen(_command(role, folder, resume, seeded))])
        stamp(role, folder)
        return folder
    names = nano_suite().names
    count = max(1, min(processes or os.cpu_count() or 1, 4, len(names)))
    shards = [names[i::count] for i in range(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if count > 1 else None
    started = []
    for i, shard in enumerate(shards):
        extra = [*seeded, f"--data.init_args.tasks={','.join(shard)}"]
        # Only the first process shows its progress; several bars on one terminal overwrite each other.
        output = None if i == 0 else subprocess.DEVNULL
        started.append(
            subprocess.Popen(_command(role, resume / f"part{i}", resume / f"run{i}", extra), env=environment, stdout=output, stderr=output)
        )
    _wait(role, started)
    folder.mkdir(parents=True, exist_ok=True)
    for i, shard in enumerate(shards):
        for name in shard:
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(resume / f"part{i}" / name, folder / name)
    write_manifest(folder, names, json.loads((resume / "part0" / MANIFEST_NAME).read_text())["base_model"])
    stamp(role, folder)
    return folder


def forget(runs: Path) -> None:
    """Remove local artefacts so that the next training starts anew."""
    for role in CONFIGS:
        for folder in (runs / role, runs / f"{role}_training"):
            shutil.rmtree(folder, ignore_errors=True)
