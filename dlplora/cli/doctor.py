"""``dlplora doctor``: facts for a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import socket
import sysconfig
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

HUB_TIMEOUT_S = 3.0
OPTIONAL_PACKAGES = ("bitsandbytes", "torchao", "optimum-quanto", "gptqmodel", "triton", "nevergrad")
"""Quantisation, kernels and the optional search; a missing one is no fault."""


def hub_state() -> str:
    """Whether the model hub answers, within three seconds; not asked when offline mode is set."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in {"1", "TRUE", "YES", "ON"}:
            return f"not asked ({name} is set)"
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    host, port = address.hostname or "huggingface.co", address.port or (443 if address.scheme != "http" else 80)
    answer: list[str] = []

    def ask() -> None:
        try:
            with socket.create_connection((host, port), timeout=HUB_TIMEOUT_S):
                answer.append(f"{host} answers")
        except OSError as error:
            answer.append(f"{host} does not answer ({error})")

    # Name resolution has a timeout of its own that cannot be set, so the question is asked in a thread that may be left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S + 0.2)
    return answer[0] if answer else f"{host} does not answer within {HUB_TIMEOUT_S:.0f} s"


def asset_states() -> dict[str, str]:
    """Embedded assets: present, and whether their recipe still matches."""
    from dlplora.adapters.files import file_sha256
    from dlplora.documents import read_json
    from dlplora.inference.loading import nano_asset
    from dlplora.reproduce.artifacts import CONFIGS, RECIPE, recipe_hash

    states: dict[str, str] = {}
    weights, recipe = nano_asset("backbone") / "model.safetensors", nano_asset("backbone") / RECIPE
    if not weights.is_file() or not recipe.is_file():
        states["backbone"] = "missing"
        return states
    right = read_json(recipe).get("sha256") == file_sha256(weights)
    states["backbone"] = "ok" if right else "checksum differs from its recipe"
    for role in CONFIGS:
        path = nano_asset(role) / RECIPE
        if not path.is_file():
            states[role] = "missing; `dlplora reproduce nano` trains it"
        else:
            states[role] = (
                "ok" if read_json(path).get("recipe_hash") == recipe_hash(role) else "recipe changed; reproduce will train it again"
            )
    return states


def lightning_command_state() -> str:
    """Whether the ``lightning`` command of this environment is the one that starts our training."""
    found = shutil.which("lightning", path=sysconfig.get_path("scripts")) or shutil.which("lightning")
    if found is None:
        return "not found; use `dlplora fit --config FILE`"
    if b"dlplora.cli.lightning_run" in Path(found).read_bytes():
        return f"ours ({found})"
    return f"NOT ours ({found} belongs to another package); use `dlplora fit --config FILE`"


def optional_packages() -> dict[str, str | None]:
    """Versions of the optional packages, None for one that is absent."""
    found: dict[str, str | None] = {}
    for name in OPTIONAL_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def gpu_states() -> list[dict[str, Any]]:
    """Each CUDA device: name, memory in all and free, in bytes."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append({"name": torch.cuda.get_device_name(index), "memory_bytes": total, "free_bytes": free})
    return found


def data_state() -> dict[str, Any]:
    """The folder of local rows, and the tasks in it."""
    from dlplora.errors import TaskError
    from dlplora.tasks.local import ENV_ROOT, readable_tasks

    root = os.environ.get(ENV_ROOT)
    state: dict[str, Any] = {"root": root, "tasks": [], "problem": None}
    if root is None:
        state["problem"] = f"not set; {ENV_ROOT} or --data-root names the folder of your rows"
    elif not Path(root).is_dir():
        state["problem"] = "not found"
    else:
        try:
            state["tasks"] = readable_tasks(root)
        except TaskError as error:
            state["problem"] = str(error)
    return state


def collect() -> dict[str, Any]:
    """Everything ``doctor`` says, as one mapping."""
    from dlplora.adapters.hub import pools_root
    from dlplora.cli.pool import known_pools
    from dlplora.config import configs_root
    from dlplora.lm_eval.command import hook_state
    from dlplora.lm_eval.versions import untested_version
    from dlplora.provenance import git_state, hardware, versions

    import torch  # isort: skip  # hardware() tells of threads and devices once torch is there

    ready, sentence = hook_state()
    lm_eval_state = " ".join(filter(None, ("ok:" if ready else "NOT ok:", sentence, untested_version())))
    return {
        "versions": versions(),
        "optional": optional_packages(),
        "hardware": {**hardware(), "cuda": torch.version.cuda, "gpus": gpu_states()},
        "git": git_state(),
        "commands": {"lm_eval": lm_eval_state, "lightning": lightning_command_state()},
        "nano": asset_states(),
        "configs": str(configs_root()),
        "data": data_state(),
        "pools": {"root": str(pools_root()), "found": known_pools()},
        "hub": {"state": hub_state(), "cache": _hub_cache()},
    }


def _hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print one block to paste into a bug report; always exits 0."""
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in _lines(facts):
        print(f"{name}: {value}")
    return 0


def _lines(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    from dlplora.cli.pool import counted, size

    lines: list[tuple[str, Any]] = [(name, version or "not installed") for name, version in facts["versions"].items()]
    lines += [(f"{name} (optional)", version or "not installed") for name, version in facts["optional"].items()]
    machine = dict(facts["hardware"])
    gpus = machine.pop("gpus")
    machine["memory"], machine["cuda"] = size(machine.pop("memory_bytes")), machine["cuda"] or "not built in"
    machine["gpu"] = "; ".join(f"{gpu['name']}, {size(gpu['free_bytes'])} of {size(gpu['memory_bytes'])} free" for gpu in gpus) or "none"
    lines += [*machine.items(), *facts["git"].items()]
    lines += [(f"{name} command", state) for name, state in facts["commands"].items()]
    lines += [(f"nano {role}", state) for role, state in facts["nano"].items()]
    lines.append(("configs", facts["configs"]))
    data = facts["data"]
    tasks = f"{data['root']}, {counted(len(data['tasks']), 'task')}{': ' if data['tasks'] else ''}{', '.join(data['tasks'][:12])}"
    tasks += ", …" if len(data["tasks"]) > 12 else ""
    lines.append(("data root", tasks if data["problem"] is None else " ".join(filter(None, (data["root"], f"({data['problem']})")))))
    pools = facts["pools"]["found"]
    named = ", ".join(f"{name} ({'damaged' if count is None else count})" for name, count in pools.items())
    lines.append(("pools", f"{facts['pools']['root']}, {named or 'none yet'}"))
    lines.append(("hub", f"{facts['hub']['state']}; cache {facts['hub']['cache']}"))
    return lines
