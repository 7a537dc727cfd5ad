"""Train one artifact in separate processes; the same call resumes an interrupted training."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlplora.adapters.pool import MANIFEST_NAME, write_manifest
from dlplora.atomic import write_atomically
from dlplora.documents import read_json
from dlplora.errors import ConfigError
from dlplora.interruption import DISK_FAILED, INTERRUPTED, TERMINATED, Terminated
from dlplora.reproduce.artifacts import artifact_dir, config_path, write_recipe
from dlplora.reproduce.recipe import NANO, TRAINED, Setting

STDERR = 2
"""File descriptor of standard error."""
POLL_S = 0.1
GRACE_S = 60
"""How long an interrupted training may take to write its checkpoint before it is killed."""


def _command(role: str, setting: Setting, folder: Path, resume: Path, extra: Sequence[str] = ()) -> list[str]:
    command = [sys.executable, "-m", "dlplora.training", "fit", "--config", str(config_path(role, setting)), "--ckpt_path", "last"]
    places = [f"--model.init_args.export_folder={folder}", f"--trainer.default_root_dir={resume}"]
    return [*command, *setting.arguments(role), *places, *extra]


def _start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a training that does not outlive this process: after a hard kill a second one would write into the same folder."""
    # The last line that a training prints is for who called it alone; our standard output holds the results.
    options.setdefault("stdout", STDERR)
    return subprocess.Popen(command, preexec_fn=_end_with_parent if sys.platform == "linux" else None, **options)


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # A scheduler sends the signal before a preemption to a whole process group; the parent passes it on as a wish for a checkpoint.
    for announced in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(announced, signal.SIG_IGN)


def _wait(role: str, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for all; if one fails, or we are interrupted, the others are asked to write a checkpoint and stop.

    Raises:
        KeyboardInterrupt: If a process was interrupted or terminated.
        OSError: If one could not read or write a file.
        ConfigError: If one ended with another exit code than 0.
    """
    try:
        codes = [process.poll() for process in processes]
        while None in codes and not any(codes):
            time.sleep(POLL_S)
            codes = [process.poll() for process in processes]
    finally:
        _stop(processes)
    codes = [process.returncode for process in processes]
    # the first of several that were stopped because of one failed by itself
    bad = next((code for code in codes if code not in {0, TERMINATED, -signal.SIGTERM}), next((code for code in codes if code), 0))
    if bad in {TERMINATED, -signal.SIGTERM}:
        raise Terminated
    if bad in {INTERRUPTED, -signal.SIGINT}:
        raise KeyboardInterrupt
    if bad == DISK_FAILED:  # says nothing against the training: whoever started it may try again elsewhere
        raise OSError(errno.EIO, f"training of {role} could not read or write a file; its message is above")
    if bad:
        raise ConfigError(f"training of {role} ended with exit code {bad}; its message is above. Run the command again to resume.")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask what still runs to stop, and give it time: our own end would kill it in the middle of a checkpoint."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def train(role: str, runs: Path, *, seed: int = 0, pool: Path | None = None, processes: int | None = None, setting: Setting = NANO) -> Path:
    """Train one artifact into its folder by its configuration, in processes of its own; resumes after an interruption.

    Args:
        role: See ``artifacts``.
        runs: Folder of local training runs.
        seed: Of the training.
        pool: The pool that gates are trained over.
        processes: Processes of a pool; None takes the setting's.
        setting: Base model and tasks.

    Raises:
        ConfigError: If training failed; its own message stands above.
        KeyboardInterrupt: If it was interrupted.
    """
    folder, resume = artifact_dir(runs, seed) / role, artifact_dir(runs, seed) / f"{role}_training"
    extra = [f"--seed_everything={seed}"] if seed else []
    if role == "pool":
        _train_pool(setting, folder, resume, extra, processes or setting.processes)
    else:
        if role.startswith(TRAINED):
            extra += [f"--model.init_args.method={role.removeprefix(TRAINED)}", f"--model.init_args.pool={pool}"]
        _wait(role, [_start(_command(role, setting, folder, resume, extra))])
    write_recipe(role, folder, seed, setting)
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
    assemble_pool({name: resume / f"part{i}" for i, shard in enumerate(shards) for name in shard}, folder, names)


def train_experts(names: Sequence[str], folder: Path, resume: Path, *, seed: int = 0, setting: Setting = NANO) -> None:
    """Train some experts of a pool in one process; resumes after an interruption.

    Args:
        names: Their tasks.
        folder: Where they go; ``assemble_pool`` makes a pool of several such folders.
        resume: For resume files.
        seed: Of the training.
        setting: Base model and tasks.

    Raises:
        ConfigError: If training failed; its own message stands above.
        KeyboardInterrupt: If it was interrupted.
    """
    extra = [*([f"--seed_everything={seed}"] if seed else []), f"--data.init_args.tasks={','.join(names)}"]
    _wait("experts", [_start(_command("pool", setting, folder, resume, extra))])


def assemble_pool(parts: Mapping[str, Path], folder: Path, names: Sequence[str]) -> None:
    """Make a pool folder of experts that were trained separately.

    Args:
        parts: Expert -> the folder it was trained into.
        folder: Of the pool.
        names: The experts in the order of the tasks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(parts[name] / name, folder / name)
    folders = list(dict.fromkeys(parts.values()))
    notes = [read_json(part / "training.json") for part in folders]
    tokens = {"training_tokens": sum(part["training_tokens"] for part in notes)}
    write_atomically(folder / "training.json", json.dumps(notes[0] | {"metrics": {}} | tokens, indent=2) + "\n")
    manifests = [read_json(part / MANIFEST_NAME) for part in folders]
    described = {row["name"]: row.get("description") for manifest in manifests for row in manifest["adapters"]}
    write_manifest(folder, names, manifests[0]["base_model"], descriptions=described)
