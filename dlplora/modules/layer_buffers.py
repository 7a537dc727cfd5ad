"""Buffers that the fused layers read instead of routing weights, and the pool that lends them to requests.

A request owns its buffers from its first forward pass until its routing state is released or dropped. Successive requests of the same size
get the same buffers, so the addresses in compiled graphs stay valid. The pool never keeps more sets of buffers than were in use at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dlplora.kernels.folded import FoldedBuffers, kept_first


@dataclass(frozen=True, slots=True)
class BufferKind:
    """What buffers must have in common to serve the same requests.

    Args:
        backend: ``folded``, ``merged`` or ``triton``.
        rows: Rows.
        width: Experts a row can keep.
        placement: Dtype and device of every layer's factors.
    """

    backend: str
    rows: int
    width: int
    placement: frozenset[tuple[torch.dtype, torch.device]]

    def serves(self, other: BufferKind) -> bool:
        """Whether buffers of this kind can stand in for another: wider folded ones on a CPU, which reads only what is kept."""
        if self.width == other.width:
            return self == other
        alike = (self.backend, self.rows, self.placement) == (other.backend, other.rows, other.placement) and self.backend == "folded"
        return alike and self.width > other.width and all(device.type == "cpu" for _, device in self.placement)


class BufferedLayer(Protocol):
    """What buffers need of a fused layer."""

    key: str
    scaling: Tensor
    lora_a: Tensor
    lora_b: Tensor

    def new_buffers(self, kind: BufferKind) -> Any:
        """Empty buffers of one layer; None for a layer that reads none."""
        ...

    def scaled(self, weights: Tensor) -> Tensor:
        """Routing weights (N, E) times the layer's scaling, on the layer's device."""
        ...

    def write_buffers(self, buffers: Any, choice: Choice, rows: Tensor | None, kept: int) -> None:
        """Write the routing weights of some rows, or of all."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """The experts of some rows, for all layers of one scaling.

    Args:
        weights: Routing weights times scaling (N, E).
        kept: Of ``kernels.folded.kept_first``, indices and weights (N, K).
    """

    weights: Tensor
    kept: tuple[Tensor, Tensor]


class LayerBuffers:
    """The buffers of all layers of a model, by the layers' keys.

    Raises:
        AllocationError: If they do not fit into memory.
    """

    def __init__(self, kind: BufferKind, layers: Iterable[BufferedLayer]) -> None:
        self.kind = kind
        self._layers = list(layers)
        self.by_layer = {layer.key: layer.new_buffers(kind) for layer in self._layers}
        self._groups: list[list[BufferedLayer]] = []
        self._grouped_by: list[tuple[int, int]] = []

    def write(self, weights: Tensor, rows: Tensor | None, kept: int) -> None:
        """Write routing weights in place.

        Layers of equal scaling keep the same experts in the same order, which is found once for all of them.

        Args:
            weights: Routing weights (N, E) without scaling.
            rows: Row indices (N,); None for all rows.
            kept: Experts that the fullest row keeps.
        """
        if rows is None:
            self._group()
        for layers in self._groups:
            scaled = layers[0].scaled(weights)
            choice = Choice(scaled, kept_first(scaled, min(self.kind.width, scaled.shape[-1])))
            if rows is None and self.kind.backend == "folded" and not (scaled.requires_grad and torch.is_grad_enabled()):
                self._write_folded(layers, choice, kept)
                continue
            for layer in layers:
                layer.write_buffers(self.by_layer[layer.key], choice, rows, kept)

    def _write_folded(self, layers: Sequence[BufferedLayer], choice: Choice, kept: int) -> None:
        """Write all rows of some layers with few operations."""
        read = [(self.by_layer[layer.key], (layer.lora_a, layer.lora_b)) for layer in layers if self.by_layer[layer.key] is not None]
        for buffers, _ in read:
            buffers.use(kept)
        FoldedBuffers.write_all([buffers for buffers, _ in read], [factors for _, factors in read], choice.kept)

    def _group(self) -> None:
        """Put layers of equal scaling together; values are compared only where a tensor is another one, or changed, since the last time."""
        seen = [(id(layer.scaling), 0 if layer.scaling.is_inference() else layer.scaling._version) for layer in self._layers]
        if seen == self._grouped_by and self._groups:
            return
        groups: list[list[BufferedLayer]] = []
        for layer in self._layers:
            for group in groups:
                one = group[0].scaling
                if one is layer.scaling or (one.device == layer.scaling.device and torch.equal(one, layer.scaling)):
                    group.append(layer)
                    break
            else:
                groups.append([layer])
        self._groups, self._grouped_by = groups, seen


class Lease:
    """The right of one request to its buffers; they go back to the pool when the lease is dropped."""

    def __init__(self, buffers: LayerBuffers, returned: deque[LayerBuffers]) -> None:
        self.buffers, self._returned = buffers, returned

    def __del__(self) -> None:
        # Appending is atomic and takes no lock: the garbage collector may call this while the pool's lock is held.
        self._returned.append(self.buffers)


class BufferPool:
    """Buffers that no request uses, oldest first."""

    def __init__(self) -> None:
        self._free: deque[LayerBuffers] = deque()
        self._lock = threading.Lock()
        self._num_made = 0
        self._most_leased = 0

    @property
    def num_leased(self) -> int:
        """Sets of buffers in use."""
        return self._num_made - len(self._free)

    @property
    def num_made(self) -> int:
        """Sets of buffers in memory."""
        return self._num_made

    def lease(self, kind: BufferKind, make: Callable[[], LayerBuffers]) -> Lease:
        """Buffers of a kind: the ones returned last, else the narrowest that can stand in for it, else new ones.

        Raises:
            AllocationError: If new ones do not fit into memory.
        """
        with self._lock:
            fitting = [buffers for buffers in reversed(list(self._free)) if buffers.kind.serves(kind)]
            if fitting:
                buffers = min(fitting, key=lambda one: one.kind.width)
                self._free.remove(buffers)
                self._most_leased = max(self._most_leased, self.num_leased)
                return Lease(buffers, self._free)
            while self._free and self._num_made >= max(self._most_leased, self.num_leased + 1):
                self._free.popleft()
                self._num_made -= 1
        made = make()
        with self._lock:
            self._num_made += 1
            self._most_leased = max(self._most_leased, self.num_leased)
        return Lease(made, self._free)
