"""Timestamps of generated tokens and of calls, taken after the device has finished.

The first token gives the time to first token (TTFT, with routing and prefill), the others the time per output token (TPOT). Only ratios
measured within one process can be compared across machines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from dlplora.errors import GenerationError


class TokenClock(StoppingCriteria):
    """Records the time of each token; never stops."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stamps: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        synchronize(self.device)
        self.stamps.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def time_generation(generate: Callable[..., Tensor], expected_width: int, device: torch.device) -> tuple[float, float]:
    """(TTFT, TPOT) of one call, s.

    Args:
        generate: Takes ``stopping_criteria`` and returns the prompt with exactly the tokens asked for.
        expected_width: Tokens of both together.
        device: Where it runs.

    Raises:
        GenerationError: If another number of tokens came, so that times would not compare.
    """
    clock = TokenClock(device)
    synchronize(device)
    start = time.perf_counter()
    output = generate(stopping_criteria=StoppingCriteriaList([clock]))
    if output.shape[1] != expected_width:
        raise GenerationError(f"expected {expected_width} tokens with the prompt, got {output.shape[1]}; nothing was measured.")
    return clock.stamps[0] - start, (clock.stamps[-1] - clock.stamps[0]) / (len(clock.stamps) - 1)


class DeviceClock(StoppingCriteria):
    """Time that the kernels of all tokens after the first took on a GPU, from torch's profiler; never stops.

    The profiler slows the host down, not the kernels, so this says what a step costs when the host does not keep the device waiting.

    Args:
        new_tokens: Tokens that will be generated, the first included.
    """

    def __init__(self, new_tokens: int) -> None:
        self.new_tokens, self._seen = new_tokens, 0
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self._seen += 1
        if self._seen in {1, self.new_tokens}:
            torch.cuda.synchronize(input_ids.device)
            self._profiler.start() if self._seen == 1 else self._profiler.stop()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def seconds(self) -> float:
        """Per token, s."""
        busy_us = sum(event.self_device_time_total for event in self._profiler.key_averages())
        return float(busy_us) / 1e6 / (self.new_tokens - 1)


def time_call(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all submitted work; returns at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def dtype_of(model: Any) -> torch.dtype:
    """Dtype of a model's first floating-point parameter."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
