"""The list of wheels for a GPU machine, without an index: a stub stands for pip."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gather_wheels.sh"
STUB = """#!/bin/sh
while [ "$1" != -d ]; do shift; done
touch "$2/$WHEEL"
"""


@pytest.mark.parametrize("line", ["{}", "{}==1.0", "{} @ file:///somewhere", "  {}  "])
def test_what_the_machine_has_is_not_gathered(line: str, tmp_path: Path) -> None:
    stub = tmp_path / "pip"
    stub.write_text(STUB)
    stub.chmod(0o755)
    has = tmp_path / "has.txt"
    has.write_text("".join(line.format(name) + "\n" for name in ("torch", "NumPy", "lm_eval")))
    environment = {**os.environ, "HAVE": str(has), "PIP": str(stub), "WHEEL": "one-1.0-py3-none-any.whl"}
    subprocess.run(["bash", str(SCRIPT), str(tmp_path / "wheels")], env=environment, check=True, capture_output=True)
    wanted = {row.partition("==")[0] for row in (tmp_path / "wheels" / "wanted.txt").read_text().split()}
    assert {"omegaconf", "peft", "gguf"} - wanted in (set(), {"gguf"})  # gguf only where it is installed
    assert not wanted & {"torch", "numpy", "lm-eval", "dlplora"}


@pytest.mark.parametrize(("wheel", "code"), [("one-1.0-cp312-cp312-linux_x86_64.whl", 0), ("one-1.0-cp311-cp311-linux_x86_64.whl", 1)])
def test_a_wheel_of_another_python_is_named(wheel: str, code: int, tmp_path: Path) -> None:
    stub = tmp_path / "pip"
    stub.write_text(STUB)
    stub.chmod(0o755)
    (tmp_path / "has.txt").write_text("")
    environment = {**os.environ, "HAVE": str(tmp_path / "has.txt"), "PIP": str(stub), "WHEEL": wheel}
    done = subprocess.run(["bash", str(SCRIPT), str(tmp_path / "wheels")], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == code
    assert (f"{wheel} (not for cp312)" in done.stderr) is bool(code)
