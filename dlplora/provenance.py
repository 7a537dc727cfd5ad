"""Origin of a number: code, versions, machine. No deep-learning package is imported."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from dlplora.config import PACKAGE_ROOT

PACKAGES = ("torch", "transformers", "peft", "lightning", "lm-eval", "datasets", "torchmetrics", "sacrebleu", "rouge-score", "numpy")
RESULT_PATHS = ("dlplora", "baselines", "configs")
"""Uncommitted changes under these can change a result; changes to docs, tests or results cannot."""


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE_ROOT.parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_state() -> dict[str, Any]:
    """Commit and whether files that can change a result differ from it; both None outside a git clone of this project."""
    if not (PACKAGE_ROOT.parent / ".git").exists():
        return {"commit": None, "dirty": None}
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", *RESULT_PATHS)
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of those that can change a result; None for one that is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("dlplora", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_model() -> str:
    """Name of the processor, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Installed memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and, if torch is already loaded, threads and GPU."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "num_cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "gpu": None,
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["num_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name()
    return facts


def provenance() -> dict[str, Any]:
    """Everything above in one mapping, as records keep it."""
    return {"git": git_state(), "versions": versions(), "hardware": hardware()}
