"""``dlplora doctor``: what a bug report needs."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sysconfig
from pathlib import Path
from urllib.parse import urlparse

HUB_TIMEOUT_S = 3.0


def hub_state() -> str:
    """Whether the model hub answers, within three seconds; not asked when offline mode is set."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in {"1", "TRUE", "YES", "ON"}:
            return f"not asked ({name} is set)"
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    host, port = address.hostname or "huggingface.co", address.port or (443 if address.scheme != "http" else 80)
    import threading

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
    from dlplora.evaluation.assets import CONFIGS, RECIPE, recipe_hash
    from dlplora.inference.loading import nano_asset
    from dlplora.modules.adapter_files import file_sha256

    states: dict[str, str] = {}
    weights, recipe = nano_asset("backbone") / "model.safetensors", nano_asset("backbone") / RECIPE
    if not weights.is_file() or not recipe.is_file():
        states["backbone"] = "missing"
        return states
    right = json.loads(recipe.read_text())["sha256"] == file_sha256(weights)
    states["backbone"] = "ok" if right else "checksum differs from its recipe"
    for role in CONFIGS:
        path = nano_asset(role) / RECIPE
        if not path.is_file():
            states[role] = "missing; `dlplora reproduce nano` trains it"
        else:
            states[role] = (
                "ok"
                if json.loads(path.read_text())["recipe_hash"] == recipe_hash(role)
                else "recipe changed; reproduce will train it again"
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


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print one block to paste into a bug report; always exits 0."""
    from dlplora.config import configs_root
    from dlplora.lm_eval import console_command_is_ours
    from dlplora.provenance import git_state, hardware, versions
    from dlplora.tasks.local import ENV_ROOT

    for name, version in versions().items():
        print(f"{name}: {version or 'not installed'}")
    import torch

    for name, value in {**hardware(), **git_state()}.items():
        print(f"{name}: {value}")
    print(f"cuda: {torch.version.cuda or 'not built in'}")
    ours, reason = console_command_is_ours()
    print(f"lm_eval command: {'ours' if ours else 'NOT ours'} ({reason})")
    print(f"lightning command: {lightning_command_state()}")
    for role, state in asset_states().items():
        print(f"nano {role}: {state}")
    print(f"configs: {configs_root()}")
    root = os.environ.get(ENV_ROOT)
    print(f"data root: {root or 'not set'}{'' if not root or Path(root).is_dir() else ' (not found)'}")
    print(f"hub: {hub_state()}")
    return 0
