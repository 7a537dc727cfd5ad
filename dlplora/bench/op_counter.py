"""Count the operators of a forward pass instead of timing it; counts are the same on every machine.

A dispatch mode sees every operator that reaches a kernel and adds up four things:

* ``launches``: operators that do work. Views (``view``, ``transpose``, ``slice``, ...) do none.
* ``flops``: floating point operations of matrix products, two per multiply-add, by PyTorch's own formulas.
* ``bytes``: every tensor that an operator reads and every one that it writes, once each. An expanded tensor counts its stored size; a
  lookup (embedding, gathered experts) counts the entries read; ``empty`` writes nothing.
* ``host_reads``: operators that copy a value to the host and so wait for the device (``item``, ``bool``, ``tolist``, ``nonzero``).

Caches and operator fusion are not modelled: a compiled model launches fewer kernels and moves fewer bytes. Triton kernels bypass the
dispatcher and are not counted. Attention runs in ``eager`` mode, because the parts of fused attention depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_FREE = {"_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "alias", "_local_scalar_dense", "resize_", "set_"}
"""Operators that do no work though their schema does not say so; reads by the host are counted separately."""
_HOST_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal"}
_UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_LOOKUPS = {"embedding", "index", "index_select", "gather", "take_along_dim"}
"""The first argument is a table of which only some entries are read: as many as come out."""
_OVERWRITTEN = {"copy_", "fill_", "zero_", "index_put_", "scatter_"}
"""The first argument is written, in part for the last two, and not read."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Amounts of one phase."""

    launches: int = 0
    flops: int = 0
    bytes: int = 0
    host_reads: int = 0


def stored_bytes(tensor: Tensor) -> int:
    """Bytes a tensor has in memory; a dimension that is expanded (stride 0) is stored once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride != 0 or size == 0 else 1
    return count * tensor.itemsize


class CountingMode(TorchDispatchMode):
    """Adds up what happens inside the block; ``counts`` has the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        reads = int(name in _HOST_READS)
        if name in _FREE or _is_view(func):
            self._add(Counts(host_reads=reads))
            return out
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out) if func.overloadpacket in flop_registry else 0
        self._add(Counts(1, int(flops), _moved(name, args, kwargs, out), reads))
        return out

    def _add(self, more: Counts) -> None:
        now = self.counts
        self.counts = Counts(now.launches + more.launches, now.flops + more.flops, now.bytes + more.bytes, now.host_reads + more.host_reads)


class _Lists(TorchFunctionMode):
    """Counts values that reach the host past the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and count it."""
        self.num += func in (torch.Tensor.tolist, torch.Tensor.numpy)
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    """Whether an operator returns its argument's memory and writes nothing."""
    returns = func._schema.returns
    return bool(returns) and all(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def _moved(name: str, args: Any, kwargs: Any, out: Any) -> int:
    written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    if name in _UNWRITTEN:
        return 0
    read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if name in _LOOKUPS and read:
        return sum(map(stored_bytes, read[1:])) + 2 * sum(map(stored_bytes, written))
    if name in _OVERWRITTEN and read:
        rest = read[1:]
        # A scattered write touches as many entries as there are values.
        target = max(map(stored_bytes, rest), default=0) if name in {"index_put_", "scatter_"} else stored_bytes(read[0])
        return target + sum(map(stored_bytes, rest))
    seen: dict[tuple[Any, ...], int] = {}
    for tensor in read:  # an argument given twice is read once
        seen[(tensor.data_ptr(), tuple(tensor.shape), tensor.stride())] = stored_bytes(tensor)
    return sum(seen.values()) + sum(map(stored_bytes, written))


def count(call: Callable[[], Any]) -> tuple[Counts, Any]:
    """The counts of a call, and its result."""
    with torch.no_grad(), _Lists() as lists, CountingMode() as mode:
        out = call()
    return replace(mode.counts, host_reads=mode.counts.host_reads + lists.num), out
