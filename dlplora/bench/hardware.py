"""Facts that timings depend on: memory bandwidth, the bytes a decode step must read, and other load on the machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlplora.bench.timing import synchronize, time_call
from dlplora.errors import ConfigError

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Size of the copied block by kind of device: far beyond every cache, and on a GPU also so large that starting the copy takes no time."""
OTHERS_LIMIT = 0.05
"""Share of all cores that other processes may use before a measurement counts as disturbed."""
FOREIGN_GPU_BYTES = 2 << 30
"""Memory on a GPU that this process did not allocate; its own context takes less."""


def measure_bandwidth(device: torch.device, *, nbytes: int | None = None, repeats: int = 5) -> float:
    """Bytes per second that the memory moves in a large copy, reading and writing counted; the fastest of a few.

    Args:
        device: Whose memory.
        nbytes: Size of the block; None is ``COPY_BYTES``.
        repeats: Copies.
    """
    nbytes = nbytes or COPY_BYTES.get(device.type, COPY_BYTES["cpu"])
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()  # some devices move zeros faster
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * nbytes / min(time_call(lambda: target.copy_(source), device) for _ in range(repeats))


def step_bytes(model: Any, batch_size: int, context_tokens: int) -> int:
    """Bytes that one decode step of the bare base model cannot avoid reading: weights once, and the cached keys and values.

    An input embedding is looked up, not read whole; one that is also the output head is read as the head.

    Args:
        model: The base model.
        batch_size: Rows.
        context_tokens: Tokens in the cache of every row.
    """
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(parameter.nbytes for parameter in model.parameters()) - (0 if embedding is head else embedding.nbytes)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * head.element_size()
    return int(weights + cached * batch_size * context_tokens)


def resident_bytes(*modules: nn.Module) -> int:
    """Memory of all parameters and buffers; a tensor that several modules share counts once, a view by its own size."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def transient_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that a call needed on top of what was there before it.

    On a GPU that is what torch's allocator counts, exact. On a CPU it is the growth of the process's peak resident set,
    which Linux can reset: memory that an earlier call left in the allocator is not counted again, so take it as a lower bound.
    None where neither exists.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        call()
        return None
    start = _status_bytes("VmRSS")
    call()
    peak = _status_bytes("VmHWM")
    return None if start is None or peak is None else max(0, peak - start)


def _status_bytes(field: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.is_file():
        return None
    return next((int(line.split()[1]) * 1024 for line in info.read_text().splitlines() if line.startswith("MemAvailable:")), None)


def require_memory(parts: dict[str, int], device: torch.device, advice: str) -> None:
    """Refuse what cannot fit before anything is allocated.

    Args:
        parts: What needs memory -> bytes.
        device: Where.
        advice: The settings that shrink it.

    Raises:
        ConfigError: Naming every part with its size, and what is free.
    """
    free = available_bytes(device)
    if free is None or sum(parts.values()) <= free:
        return
    listed = ", ".join(f"{what} {size / 1e9:.1f} GB" for what, size in parts.items())
    raise ConfigError(f"does not fit into {free / 1e9:.1f} GB free on {device}: {listed}. {advice}")


class ContentionMonitor:
    """Whether other processes disturb a measurement: load at the start, then the processor time that was not ours.

    Args:
        device: Measured on.
        others_wait: Other benchmark processes hold memory on the device, but wait for their turn: their memory is no disturbance.
    """

    def __init__(self, device: torch.device, *, others_wait: bool = False) -> None:
        self.device, self.others_wait = device, others_wait
        self.cores = os.cpu_count() or 1
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self._start = self._times()

    def _times(self) -> tuple[float, float, float] | None:
        """Wall time, busy time of the machine and own processor time, s."""
        stat = Path("/proc/stat")
        if not stat.is_file():
            return None
        user, nice, system, _, _, irq, softirq, steal = (int(text) for text in stat.read_text().split("\n", 1)[0].split()[1:9])
        own = os.times()
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, own.user + own.system + own.children_user + own.children_system

    def warnings(self) -> list[str]:
        """What disturbed the measurement since the start, in words; empty if nothing did, as far as known."""
        found = []
        if self.load is not None and self.load >= self.cores:
            found.append(f"load average {self.load:.1f} on {self.cores} cores at the start")
        end = self._times()
        if self._start is not None and end is not None:
            wall, busy, own = (after - before for before, after in zip(self._start, end, strict=True))
            others = (busy - own) / max(wall * self.cores, 1e-9)
            if others > OTHERS_LIMIT:
                found.append(f"other processes used {100 * others:.0f} % of {self.cores} cores during the measurement")
        if self.device.type == "cuda" and not self.others_wait:
            free, total = torch.cuda.mem_get_info(self.device)
            foreign = total - free - torch.cuda.memory_reserved(self.device)
            if foreign > FOREIGN_GPU_BYTES:
                found.append(f"another process holds {foreign / 1e9:.1f} GB on the GPU")
        return found
