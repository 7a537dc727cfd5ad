"""Processes of ``torchrun`` or ``accelerate launch``, and the device that lm-eval names."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from dlplora.inference.devices import parse_device

logger = logging.getLogger(__name__)


def accelerator_if_launched(device: str | None) -> Any:
    """The process group that ``torchrun`` or ``accelerate launch`` started, or None in a single process.

    Args:
        device: What ``--device`` says. Each process takes the accelerator's device of its rank, or the CPU if that was asked
            for or there is nothing else.
    """
    if not _launched():
        return None
    from accelerate import Accelerator, InitProcessGroupKwargs

    # ranks wait for each other once per evaluation, without a time limit
    patience = InitProcessGroupKwargs(timeout=timedelta(weeks=52))
    return Accelerator(cpu=device == "cpu" or not torch.accelerator.is_available(), kwargs_handlers=[patience])


def _launched() -> bool:
    """Whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def shutdown_process_group() -> Iterator[None]:
    """End the process group at the end of the block, if one was begun by then: gloo's threads must not outlive the interpreter.

    After success all processes wait for each other, since a peer may still be in the last collective. After an error no process waits: the
    others may never arrive, and the launcher ends them. A launched process that succeeded exits without finalising the interpreter,
    since a native thread that requests the interpreter's lock during finalisation aborts the process and the whole launch.
    """
    succeeded = done = False

    def leave() -> None:
        if done:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    if _launched():
        atexit.register(leave)  # what is registered after it runs before it
    try:
        yield
        succeeded = True
    finally:
        _end_process_group(wait=succeeded)
    done = True


def _end_process_group(*, wait: bool) -> None:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return
    if wait:
        dist.barrier()
    dist.destroy_process_group()
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # it would hand the ended group to the next accelerator


def usable_device(name: str | None) -> torch.device:
    """The named device, or the one that is there: lm-eval says ``cuda:0`` on every machine.

    Raises:
        ConfigError: If the name is not a torch device.
    """
    device = parse_device(name or "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        logger.info("no CUDA device here; using the CPU")
        return torch.device("cpu")
    return device


@contextmanager
def without_messages(beginnings: Sequence[str], logger_name: str) -> Iterator[None]:
    """Drop log messages that begin in one of these ways, while open."""
    target = logging.getLogger(logger_name)

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(tuple(beginnings))

    target.addFilter(keep)
    try:
        yield
    finally:
        target.removeFilter(keep)
