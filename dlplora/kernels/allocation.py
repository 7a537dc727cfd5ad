"""Allocation of large tensors, in one place, so that out-of-memory errors say what would reduce memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from dlplora.errors import AllocationError

ALIGNMENT = 64
"""Bytes, of which the sizes of tensors in one storage are multiples."""
# The CPU allocator raises a bare RuntimeError, and torch.OutOfMemoryError is a RuntimeError too: the text tells.
_SYMPTOMS = ("allocate memory", "out of memory", "overflow")


def zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device | str, what: str, shrink: str) -> Tensor:
    """A tensor of zeros that never becomes an inference tensor, so that it can be written again later.

    Args:
        shape, dtype, device: As for ``torch.zeros``.
        what: What the tensor is, for the error.
        shrink: Which settings make it smaller, a sentence.

    Raises:
        AllocationError: If it does not fit; names the tensor, its size and ``shrink``.
    """
    try:
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=dtype, device=device)
    except RuntimeError as error:
        if not any(symptom in str(error) for symptom in _SYMPTOMS):
            raise
        size = prod(shape) * dtype.itemsize
        raise AllocationError(
            f"out of memory on {device}: {what}, {'x'.join(map(str, shape))} in {str(dtype).removeprefix('torch.')}, "
            f"needs {size / 2**30:.3g} GiB. {shrink}"
        ) from error


def is_stackable(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether tensors of these sizes can lie one behind another: each begins where compiled code needs no copy of it."""
    return prod(shape) * dtype.itemsize % ALIGNMENT == 0


def as_stack(tensors: Sequence[Tensor]) -> Tensor | None:
    """Contiguous tensors (...) that lie one behind another in one storage, as one tensor (L, ...); None if they do not."""
    first = tensors[0]
    begin, size = first.storage_offset(), first.numel()
    for place, tensor in enumerate(tensors):
        if (
            not tensor.is_contiguous()
            or tensor.shape != first.shape
            or tensor.storage_offset() != begin + place * size
            or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
    return first.detach().as_strided((len(tensors), *first.shape), (size, *first.stride()), begin)
