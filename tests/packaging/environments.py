"""Throw-away environments with real installations of dlplora and lm-eval; torch and the rest are shared with this environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(command: Sequence[str | Path], cwd: Path, *, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program; a wrong exit code fails the test with what it wrote.

    Args:
        code: The exit code expected, None for any.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DLPLORA_", "VIRTUAL_ENV"))}
    variables = {**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert code is None or done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and the installer that fills it."""

    folder: Path
    installer: str

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        """Where its distributions lie."""
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def script(self, name: str) -> Path:
        """A console script; it need not exist."""
        return self.folder / "bin" / name

    def install(self, *what: str | Path) -> None:
        """Install without dependencies."""
        if self.installer == "uv":
            run(["uv", "pip", "install", "--python", self.python, "--no-deps", *what], self.folder)
        else:
            run([sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", *what], self.folder)

    def uninstall(self, name: str) -> None:
        """Remove a distribution."""
        if self.installer == "uv":
            run(["uv", "pip", "uninstall", "--python", self.python, name], self.folder)
        else:
            run([sys.executable, "-m", "pip", "--python", self.python, "uninstall", "--yes", name], self.folder)
