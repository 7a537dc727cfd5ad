"""Modules that keep their dtype when the surrounding model is cast, by ``half()``, ``to(dtype)`` or the trainer's precision.

Routers and gates compute in float32 whatever the base model's dtype; trained adapters are kept in at least that precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]
"""What ``nn.Module._apply`` does to every parameter and buffer."""


def dtype_name(dtype: torch.dtype) -> str:
    """As users write it: ``float16``."""
    return str(dtype).removeprefix("torch.")


def keeping_dtype(change: Change) -> Change:
    """The same change (another device, shared memory) without another floating point type."""

    def apply(tensor: Tensor) -> Tensor:
        changed = change(tensor)
        cast = tensor.is_floating_point() and changed.dtype != tensor.dtype
        return tensor.to(changed.device) if cast else changed

    return apply


def keeping_trained_precision(change: Change) -> Change:
    """The same change, but tensors that require gradients are never cast to a type of fewer bits."""

    def apply(tensor: Tensor) -> Tensor:
        changed = change(tensor)
        fewer = tensor.requires_grad and changed.dtype.itemsize < tensor.dtype.itemsize
        return tensor.to(changed.device) if fewer else changed

    return apply


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Tensors made inside without a dtype are float32, also where the trainer's precision has set another default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
