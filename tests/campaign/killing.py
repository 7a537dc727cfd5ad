"""Work in a child process that is killed (SIGKILL) before a chosen change on disk."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = {"open", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.chmod", "shutil.copyfile", "shutil.rmtree"}
"""Audit events of changes on disk; of ``open`` only those for writing."""


def run(work: Callable[[], Any], folder: Path, log: Path, *, kill_before: int | None = None) -> int:
    """Do the work in a fork of this process.

    Args:
        work: What is done. Its result must be 0 or None.
        folder: Changes below it are counted.
        log: Receives what the work prints.
        kill_before: The change before which the child is killed; None lets it finish.

    Returns:
        The number of changes of finished work; -1 if it was killed.
    """
    count_file = log.with_suffix(".count")
    child = os.fork()
    if child == 0:
        _work_and_exit(work, str(folder), log, count_file, kill_before)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in {0, -signal.SIGKILL}, log.read_text()
    return int(count_file.read_text()) if code == 0 else -1


def _work_and_exit(work: Callable[[], Any], folder: str, log: Path, count_file: Path, kill_before: int | None) -> None:
    done = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event not in STEPS or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if any(folder in str(one) for one in arguments):
            if done == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1

    code = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.addaudithook(count)
        code = int(work() or 0)
        count_file.write_text(str(done))
    except BaseException:  # noqa: BLE001 - the parent shows it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
