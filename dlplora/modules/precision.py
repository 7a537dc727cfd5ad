"""Modules that keep their dtype when the surrounding model is cast, by ``half()``, ``to(dtype)`` or the trainer's precision.

Routers and gates compute in float32 regardless of the base model's dtype; trained adapters are kept in at least that precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

LARGEST_TRAINED = 1e18
"""Largest value of a trained router or gate: products of larger ones overflow float32. Real values are many orders of magnitude smaller."""
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


def unusable(stored: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> str | None:
    """Why trained tensors cannot be used for computation; None if they can.

    Args:
        stored: As in the file.
        loaded: The same tensors after the cast to the dtype of their module, where float64 may have become infinite.
    """
    for key, tensor in loaded.items():
        if not tensor.is_floating_point():
            continue
        if key in stored and not stored[key].is_floating_point():
            return f"'{key}' is stored as {dtype_name(stored[key].dtype)}, which is not a floating point type"
        if not bool((tensor.abs() <= LARGEST_TRAINED).all()):  # false for NaN too
            return f"'{key}' holds NaN or infinite values, or values beyond {LARGEST_TRAINED:.0e}"
    return None


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Tensors made inside without a dtype are float32, also where the trainer's precision has set another default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
