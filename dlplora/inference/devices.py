"""Default device (CUDA, then MPS, then CPU) and default dtype (the checkpoint's, if it is fast here)."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from dlplora.adapters.headers import read_tensor_headers
from dlplora.documents import read_text
from dlplora.errors import AdapterError, ConfigError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
AUTO = "auto"
_ROWS, _WIDTH, _REPEATS = 64, 1024, 7


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The named device, or the best one of this machine.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; None and ``auto`` take CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: If the name is not a device, or this machine does not have it.
    """
    if name is None or name == AUTO:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    return require_device(parse_device(name))


def parse_device(name: str | torch.device) -> torch.device:
    """The device of a name, whether this machine has it or not.

    Raises:
        ConfigError: If the name is no device.
    """
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"unknown device '{name}'. Use auto, cpu, cuda, cuda:N or mps.") from error


def require_device(device: torch.device) -> torch.device:
    """The device, if a model can run on it here.

    Raises:
        ConfigError: If this machine does not have the device.
    """
    if device.type == "cpu":
        return device
    here = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if here is not None and here.type == device.type else 0
    if (device.index or 0) >= count:
        raise ConfigError(
            f"device '{device}' does not exist: this machine has {count} of that kind. Use cpu, or one that `dlplora doctor` lists."
        )
    return device


def resolve_dtype(
    name: str | torch.dtype, device: torch.device | str, source: str | None = None, revision: str | None = None
) -> torch.dtype:
    """The dtype of that name, refused where it would be emulated; ``auto`` is the checkpoint's, or float32 where that is slow.

    Args:
        name: ``float32``, ``float16``, ``bfloat16`` or ``auto``.
        device: Where the model will run. A CPU computes in bfloat16 for ``auto`` if a timed product shows that it is faster, and
            never in float16.
        source: Model folder or hub id, for ``auto``; None is the embedded nano model. Nano's numbers are defined in float32; its file is
            float16 only to be small.
        revision: Of a hub id.

    Raises:
        ConfigError: If the name is unknown, or bfloat16 is requested on a CPU without instructions for it.
    """
    if name == AUTO:
        return _automatic(torch.device(device), source, revision)
    dtype = name if isinstance(name, torch.dtype) else DTYPES.get(str(name))
    if dtype is None:
        raise ConfigError(f"unknown dtype '{name}'. Known: {', '.join(DTYPES)}, {AUTO}.")
    if dtype == torch.bfloat16 and torch.device(device).type == "cpu" and not cpu_has_bfloat16():
        raise ConfigError("this CPU has no bfloat16 instructions, which makes bfloat16 about a hundred times slower; use dtype=float32.")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _automatic(device: torch.device, source: str | None, revision: str | None) -> torch.dtype:
    stored = torch.float32 if source is None else checkpoint_dtype(source, revision)
    if device.type != "cpu" or stored == torch.float32:
        return stored
    return torch.bfloat16 if stored == torch.bfloat16 and cpu_bfloat16_is_faster() else torch.float32


def checkpoint_dtype(source: str, revision: str | None = None) -> torch.dtype:
    """The dtype that a checkpoint's ``config.json`` names; without one, that of most of its weights; float32 if neither is known.

    Args:
        source: Model folder, or hub id, its ``config.json`` is downloaded into the cache if necessary. A model that cannot be found
            is reported when it is loaded.
        revision: Of a hub id.
    """
    from transformers.utils import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    found = cached_file(source, "config.json", revision=revision, **quiet)
    if found is None:
        return torch.float32
    try:
        config = json.loads(read_text(found))  # transformers' own file, which may contain infinities
    except (ValueError, RecursionError):  # load_backbone says what is wrong with the file
        return torch.float32
    if not isinstance(config, dict):
        return torch.float32
    named = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return DTYPES.get(named) or _weights_dtype(Path(found).parent)


def _weights_dtype(folder: Path) -> torch.dtype:
    """The dtype of the first safetensors file's floating-point weights, read from its header."""
    codes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        try:
            tensors = read_tensor_headers(path).values()
        except AdapterError:  # load_backbone says what is wrong with the file
            break
        kinds = [tensor.dtype for tensor in tensors if tensor.dtype in codes]
        if kinds:
            return codes[max(set(kinds), key=kinds.count)]
    return torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products; without them they are emulated."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported()) or torch.backends.cpu.get_cpu_capability() in {"SVE256"}


@functools.cache
def cpu_bfloat16_is_faster() -> bool:
    """Whether a product of a linear layer's size takes less time in bfloat16 than in float32 on this CPU, with the threads torch has now.

    Takes a few milliseconds; measured once in a process. The fastest of several interleaved repeats counts, so that other work on the
    machine does not decide.
    """
    if not cpu_has_bfloat16():
        return False
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    with torch.inference_mode():
        factors = {dtype: (torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)) for dtype in seconds}
        for _ in range(_REPEATS):
            for dtype, (left, right) in factors.items():
                seconds[dtype].append(_timed(left, right))
    return min(seconds[torch.bfloat16]) < min(seconds[torch.float32])


def _timed(left: Tensor, right: Tensor) -> float:
    started = time.perf_counter()
    torch.nn.functional.linear(left, right)
    return time.perf_counter() - started
