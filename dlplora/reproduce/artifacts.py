"""Trained artifacts: shipped ones of the nano suite while their recipe still matches, else trained here, once.

Roles: ``pool``, ``router``, adapters trained on all tasks (``multitask`` and its other ranks), ``trained/PRESET`` for the gates of
a method that ``LitFusion`` trains, and ``backbone`` for a small one of one's own.
"""

from __future__ import annotations

import ctypes
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

from dlplora.adapters.pool import MANIFEST_NAME, write_manifest
from dlplora.atomic import write_atomically
from dlplora.config import config_hash, configs_root, load_yaml
from dlplora.errors import ConfigError
from dlplora.inference.loading import nano_asset
from dlplora.methods.registry import build_method, hashed_params, load_method_spec
from dlplora.reproduce.recipe import NANO, Setting

RECIPE = "recipe.json"
CONFIGS = {"pool": "experts", "multitask": "multitask", "router": "router"}
"""Role -> training configuration where the two differ or the artifact is shipped; another role's configuration bears its name."""
TRAINED = "trained/"
"""Prefix of the roles of trained methods."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One artifact and where it comes from."""

    role: str
    seed: int
    folder: Path
    source: str
    """``shipped``, ``trained before`` or ``to be trained``."""

    @property
    def ready(self) -> bool:
        """Whether nothing has to be done for it."""
        return self.source != "to be trained"


def roles_of(preset: str) -> tuple[str, ...]:
    """Roles a method needs, in the order they are made; every method needs the pool."""
    wanted = build_method(load_method_spec(preset)).artifact_roles
    return ("pool", *(f"{TRAINED}{preset}" if role == "trained" else role for role in wanted))


def kind_of(role: str) -> str:
    """The role without the method it belongs to."""
    return "trained" if role.startswith(TRAINED) else role


def config_path(role: str, setting: Setting) -> Path:
    """The training configuration of a role.

    Raises:
        ConfigError: If there is none.
    """
    kind = kind_of(role)
    name = setting.configs.get(kind) or ("fusion" if kind == "trained" else CONFIGS.get(role, role))
    path = configs_root() / "train" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"nothing says how to train '{role}': {path} is missing.")
    return path


def recipe(role: str, seed: int = 0, setting: Setting = NANO) -> dict[str, Any]:
    """Everything the artifact is a function of: its training configuration, the backbone, the tasks' text; for gates also the
    method's parameters and the pool's recipe; the seed if it is not the configuration's own."""
    described: dict[str, Any] = {"config": load_yaml(config_path(role, setting)), **setting.facts(kind_of(role))}
    if role.startswith(TRAINED):
        spec = load_method_spec(role.removeprefix(TRAINED))
        described |= {"method": spec.method, "params": hashed_params(spec), "pool": recipe_hash("pool", seed, setting)}
    return described | ({"seed": seed} if seed else {})


def recipe_hash(role: str, seed: int = 0, setting: Setting = NANO) -> str:
    """Hash of ``recipe``."""
    return config_hash(recipe(role, seed, setting))


def stamp(role: str, folder: Path, seed: int = 0, setting: Setting = NANO) -> None:
    """Write the recipe beside a finished artifact; its presence says that training ended.

    What a backbone's pretraining has noted in that file stays, under ``pretraining``.
    """
    described = recipe(role, seed, setting)
    if role == "backbone":
        noted = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        described["pretraining"] = noted.get("pretraining", noted)
        write_atomically(folder / RECIPE, json.dumps({"recipe_hash": recipe_hash(role, seed, setting), **described}, indent=2) + "\n")
        return
    write_atomically(folder / RECIPE, json.dumps({"recipe_hash": config_hash(described), **described}, indent=2) + "\n")


def _matches(folder: Path, wanted: str) -> bool:
    path = folder / RECIPE
    if not path.is_file():
        return False
    try:
        return bool(json.loads(path.read_text())["recipe_hash"] == wanted)
    except (json.JSONDecodeError, KeyError, TypeError):
        return False


def home(runs: Path, seed: int) -> Path:
    """The folder of one seed's artifacts."""
    return runs / f"seed{seed}" if seed else runs


def locate(role: str, runs: Path, *, fresh: bool, seed: int = 0, setting: Setting = NANO) -> Asset:
    """Where an artifact is, or will be.

    The router is always trained in ``runs`` rather than taken from the package: it is the method's own part, and cheap.

    Args:
        role: As above.
        runs: Folder of local training runs.
        fresh: Whether shipped artifacts are ignored.
        seed: Seed of the training; only seed 0 is shipped.
        setting: Backbone and tasks.
    """
    wanted = recipe_hash(role, seed, setting)
    trained = home(runs, seed) / role
    if _matches(trained, wanted):
        return Asset(role=role, seed=seed, folder=trained, source="trained before")
    if setting.shipped and not fresh and role != "router" and _matches(nano_asset(role), wanted):
        return Asset(role=role, seed=seed, folder=nano_asset(role), source="shipped")
    return Asset(role=role, seed=seed, folder=trained, source="to be trained")


def _command(role: str, setting: Setting, folder: Path, resume: Path, extra: Sequence[str] = ()) -> list[str]:
    command = [sys.executable, "-m", "dlplora.cli.main", "fit", "--config", str(config_path(role, setting)), "--ckpt_path", "last"]
    places = [f"--model.init_args.export_folder={folder}", f"--trainer.default_root_dir={resume}"]
    return [*command, *setting.arguments(kind_of(role)), *places, *extra]


def _start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a training that does not outlive this process: after a hard kill a second one would write into the same folder."""
    return subprocess.Popen(command, preexec_fn=_end_with_parent if sys.platform == "linux" else None, **options)


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


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
        raise ConfigError(f"training of {role} ended with exit code {bad}; see the message above. Run the command again to resume.")


def train(role: str, runs: Path, *, seed: int = 0, pool: Path | None = None, processes: int | None = None, setting: Setting = NANO) -> Path:
    """Train one artifact into its folder by its configuration, in processes of its own; resumes after an interruption.

    Args:
        role: As above.
        runs: Folder of local training runs.
        seed: Of the training.
        pool: The pool that gates are trained over.
        processes: Processes of a pool; None takes the setting's.
        setting: Backbone and tasks.

    Raises:
        ConfigError: If training failed; its own message stands above.
    """
    folder, resume = home(runs, seed) / role, home(runs, seed) / f"{role}_training"
    extra = [f"--seed_everything={seed}"] if seed else []
    if role == "pool":
        _train_pool(setting, folder, resume, extra, processes or setting.processes)
    else:
        if role.startswith(TRAINED):
            extra += [f"--model.init_args.method={role.removeprefix(TRAINED)}", f"--model.init_args.pool={pool}"]
        _wait(role, [_start(_command(role, setting, folder, resume, extra))])
    stamp(role, folder, seed, setting)
    return folder


def _train_pool(setting: Setting, folder: Path, resume: Path, seeded: Sequence[str], processes: int | None) -> None:
    """The experts of a pool do not depend on one another, so on a CPU they are dealt out to one single-threaded process a core: a
    model this small keeps one core busy and gains nothing from a second."""
    names = setting.chosen().names
    count = max(1, min(processes or os.cpu_count() or 1, 4, len(names)))
    shards = [names[i::count] for i in range(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if count > 1 else None
    started = []
    for i, shard in enumerate(shards):
        extra = [*seeded, f"--data.init_args.tasks={','.join(shard)}"]
        # Only the first process shows its progress; several bars on one terminal overwrite each other.
        output = None if i == 0 else subprocess.DEVNULL
        command = _command("pool", setting, resume / f"part{i}", resume / f"run{i}", extra)
        started.append(_start(command, env=environment, stdout=output, stderr=output))
    _wait("the pool", started)
    folder.mkdir(parents=True, exist_ok=True)
    for i, shard in enumerate(shards):
        for name in shard:
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(resume / f"part{i}" / name, folder / name)
    notes = [json.loads((resume / f"part{i}" / "training.json").read_text()) for i in range(count)]
    tokens = {"training_tokens": sum(part["training_tokens"] for part in notes)}
    write_atomically(folder / "training.json", json.dumps(notes[0] | {"metrics": {}} | tokens, indent=2) + "\n")
    write_manifest(folder, names, json.loads((resume / "part0" / MANIFEST_NAME).read_text())["base_model"])


def forget(runs: Path, roles: Sequence[str], seed: int = 0) -> None:
    """Remove local artifacts so that the next training starts anew."""
    for role in roles:
        for folder in (home(runs, seed) / role, home(runs, seed) / f"{role}_training"):
            shutil.rmtree(folder, ignore_errors=True)
