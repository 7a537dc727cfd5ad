"""Origin of a number: code, versions, machine. No deep-learning package is imported."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlplora.config import PACKAGE_ROOT

PACKAGES = ("torch", "transformers", "peft", "lightning", "lm-eval", "datasets", "torchmetrics", "sacrebleu", "rouge-score", "numpy")
RESULT_PATHS = ("dlplora", "baselines", "configs")
"""Uncommitted changes under these can change a result; changes to docs, tests or results cannot."""


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE_ROOT.parent, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return os.fsdecode(done.stdout).strip()


def changed_files() -> list[Path] | None:
    """Files that can change a result and differ from the commit, or are in none; None outside a git clone of this project."""
    if not (PACKAGE_ROOT.parent / ".git").exists():
        return None
    # without a commit every file is a new one
    base = ("diff", "--name-only", "--no-renames", "-z", "HEAD") if _git("rev-parse", "HEAD") else ("ls-files", "-z", "--cached")
    listed = [_git(*base, "--", *RESULT_PATHS), _git("ls-files", "-z", "--others", "--exclude-standard", "--", *RESULT_PATHS)]
    if None in listed:
        return None
    names = {name for part in listed for name in str(part).split("\0") if name}
    return [PACKAGE_ROOT.parent.resolve() / name for name in sorted(names)]


def git_state() -> dict[str, Any]:
    """Commit, whether files that can change a result differ from it (None outside a git clone of this project), and hashes of these.

    In a copy without ``.git``, as batch systems make it, the environment variable ``DLPLORA_COMMIT`` names the commit. The library has a
    hash of its own: a record of one method does not depend on the files of other methods and their presets.
    """
    changed = changed_files()
    if changed is None:
        return {"commit": os.environ.get("DLPLORA_COMMIT") or None, "dirty": None}
    state = {"commit": _git("rev-parse", "HEAD"), "dirty": bool(changed)}
    library = [path for path in changed if path.is_relative_to(PACKAGE_ROOT.resolve())]
    return {**state, "changes": {"library": _content_hash(library), "all": _content_hash(changed)}} if changed else state


def _content_hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes() if path.is_file() else b"gone"
        digest.update(os.fsencode(path.relative_to(PACKAGE_ROOT.parent.resolve())) + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()[:12]


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
