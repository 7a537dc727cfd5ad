"""The process group ends with the command, whether it succeeded or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from dlplora.lm_eval.distributed import shutdown_process_group


def begin(folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)


def test_the_group_is_gone_after_success(tmp_path: Path) -> None:
    with shutdown_process_group():
        begin(tmp_path)
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_the_group_is_gone_after_an_error_and_nobody_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "barrier", lambda: pytest.fail("an error must not wait for the other processes"))

    @shutdown_process_group()
    def failing() -> None:
        begin(tmp_path)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert not dist.is_initialized()


def test_without_a_group_nothing_happens() -> None:
    with shutdown_process_group():
        pass
    assert not dist.is_initialized()


PROGRAM = """
import atexit
from dlplora.lm_eval.distributed import shutdown_process_group

class Teardown:
    def __del__(self):
        print("taken apart")

kept = Teardown()
with shutdown_process_group():
    atexit.register(print, "said good-bye")
    print("worked", end=" ")
    {last}
"""


@pytest.mark.parametrize(
    ("processes", "last", "code", "expected"),
    [
        ("2", "pass", 0, "worked said good-bye\n"),
        ("1", "pass", 0, "worked said good-bye\ntaken apart\n"),
        ("2", "raise SystemExit(3)", 3, "worked said good-bye\ntaken apart\n"),
    ],
)
def test_a_launched_process_that_succeeded_is_not_taken_apart(processes: str, last: str, code: int, expected: str) -> None:
    """Native threads can abort an interpreter that ends; its exit handlers still run, and its output arrives."""
    environment = os.environ | {"WORLD_SIZE": processes, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", PROGRAM.format(last=last)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (code, expected), done.stderr
