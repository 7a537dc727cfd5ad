"""The list of wheels for a GPU machine, without an index: a stub stands for pip."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gather_wheels.sh"
STUB = """#!/bin/sh
while [ "$1" != -d ]; do shift; done
touch "$2/one.whl"
"""


@pytest.mark.parametrize("line", ["{}", "{}==1.0", "{} @ file:///somewhere", "  {}  "])
def test_what_the_machine_has_is_not_gathered(line: str, tmp_path: Path) -> None:
    stub = tmp_path / "pip"
    stub.write_text(STUB)
    stub.chmod(0o755)
    has = tmp_path / "has.txt"
    has.write_text("".join(line.format(name) + "\n" for name in ("torch", "NumPy", "lm_eval")))
    environment = {**os.environ, "HAVE": str(has), "PIP": str(stub)}
    subprocess.run(["bash", str(SCRIPT), str(tmp_path / "wheels")], env=environment, check=True, capture_output=True)
    wanted = {row.partition("==")[0] for row in (tmp_path / "wheels" / "wanted.txt").read_text().split()}
    assert {"omegaconf", "peft", "gguf"} - wanted in (set(), {"gguf"})  # gguf only where it is installed
    assert not wanted & {"torch", "numpy", "lm-eval", "dlplora"}
