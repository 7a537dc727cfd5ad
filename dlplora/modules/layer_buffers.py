"""Buffers that the fused layers read instead of routing weights, and the pool that lends them to requests.

A request owns its buffers from its first forward pass until its routing state is released or dropped. Successive requests of the same size
get the same buffers, so the addresses in compiled graphs stay valid. The pool never keeps more sets of buffers than were in use at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dlplora.kernels.allocation import as_stack, is_stackable
from dlplora.kernels.folded import FoldedStack, kept_first
from dlplora.kernels.merged import MergedBuffers


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
    base: nn.Module
    scaling: Tensor
    lora_a: Tensor
    lora_b: Tensor

    @property
    def reads_buffers(self) -> bool:
        """Whether the layer reads buffers, and not the routing weights themselves."""
        ...

    def scaled(self, weights: Tensor) -> Tensor:
        """Routing weights (N, E) times the layer's scaling, on the layer's device."""
        ...


Writer = Callable[[tuple[Tensor, Tensor], "Tensor | None", int], None]
"""Takes ``kept_first`` of routing weights times scaling, the rows (N,) (None for all) and how many experts the fullest row keeps."""


class LayerBuffers:
    """The buffers of all layers of a model, by the layers' keys.

    Layers of equal scaling keep the same experts in the same order, which is found once for all of them. Folded buffers are written
    together where the factors of layers of equal sizes lie one behind another; buffers for Triton hold no factors and are shared.

    Raises:
        RoutingError: If a base weight cannot be merged into.
        AllocationError: If they do not fit into memory.
    """

    def __init__(self, kind: BufferKind, layers: Iterable[BufferedLayer]) -> None:
        self.kind = kind
        self._layers = [layer for layer in layers if layer.reads_buffers]
        self._stacks: list[tuple[list[BufferedLayer], FoldedStack]] = []
        self.by_layer: dict[str, Any] = {}
        self._writers: list[tuple[BufferedLayer, list[Writer]]] = []
        self._written_for: list[tuple[Tensor, int, Tensor]] = []
        if kind.backend == "folded":
            for alike in _of_equal_sizes(self._layers, kind):
                stack = FoldedStack.allocate(kind.rows, kind.width, [(layer.lora_a, layer.lora_b) for layer in alike])
                self._stacks.append((alike, stack))
                self.by_layer.update((layer.key, buffers) for layer, buffers in zip(alike, stack.layers, strict=True))
        elif kind.backend == "merged":
            self.by_layer = {layer.key: MergedBuffers(layer.base, kind.width) for layer in self._layers}
        self._group()

    def write(self, weights: Tensor, rows: Tensor | None, kept: int) -> None:
        """Write routing weights in place.

        Args:
            weights: Routing weights (N, E) without scaling.
            rows: Row indices (N,); None for all rows.
            kept: Experts that the fullest row keeps.
        """
        if rows is None:
            self._group()
        for layer, writers in self._writers:
            scaled = layer.scaled(weights)
            chosen = kept_first(scaled, min(self.kind.width, scaled.shape[-1]))
            for write in writers:
                write(chosen, rows, kept)

    def _group(self) -> None:
        """Find out what is written together; again only where a layer has another scaling, or other factors, than the last time."""
        now = [(one.scaling, 0 if one.scaling.is_inference() else one.scaling._version, one.lora_a) for one in self._layers]
        before = self._written_for
        same = (
            scaling is old[0] and version == old[1] and lora_a is old[2]
            for (scaling, version, lora_a), old in zip(now, before, strict=False)  # nothing before the first time
        )
        if before and all(same):
            return
        writers = {"folded": self._folded, "merged": self._merged, "triton": self._triton}[self.kind.backend]
        self._writers = [(layers[0], writers(layers)) for layers in _of_equal_scaling(self._layers)]
        self._written_for = now

    def _folded(self, layers: Sequence[BufferedLayer]) -> list[Writer]:
        keys = {layer.key for layer in layers}
        found: list[Writer] = []
        for alike, stack in self._stacks:
            lora_a, lora_b = as_stack([layer.lora_a for layer in alike]), as_stack([layer.lora_b.mT for layer in alike])
            if lora_a is not None and lora_b is not None and all(layer.key in keys for layer in alike):
                found.append(partial(stack.write, lora_a, lora_b.mT))
                continue
            for layer, one in zip(alike, stack.split(), strict=True):
                if layer.key in keys:
                    found.append(partial(one.write, layer.lora_a.detach()[None], layer.lora_b.detach()[None]))
        return found

    def _merged(self, layers: Sequence[BufferedLayer]) -> list[Writer]:
        return [partial(self.by_layer[layer.key].write, layer.lora_a, layer.lora_b) for layer in layers]

    def _triton(self, layers: Sequence[BufferedLayer]) -> list[Writer]:
        from dlplora.kernels.grouped import GroupedBuffers

        keys = {layer.key for layer in layers}
        shared = self.by_layer.get(layers[0].key)
        if shared is None or keys != {key for key, buffers in self.by_layer.items() if buffers is shared}:
            shared = GroupedBuffers(self.kind.rows, self.kind.width, layers[0].lora_a)
            self.by_layer.update(dict.fromkeys(keys, shared))
        return [shared.write]


def _of_equal_scaling(layers: Sequence[BufferedLayer]) -> list[list[BufferedLayer]]:
    groups: list[list[BufferedLayer]] = []
    for layer in layers:
        for group in groups:
            one = group[0].scaling
            if one is layer.scaling or (one.device == layer.scaling.device and torch.equal(one, layer.scaling)):
                group.append(layer)
                break
        else:
            groups.append([layer])
    return groups


def _of_equal_sizes(layers: Sequence[BufferedLayer], kind: BufferKind) -> list[list[BufferedLayer]]:
    """Layers of equal scaling and sizes, in the order of their factors in memory; by itself a layer whose buffers cannot be stacked."""
    found: list[list[BufferedLayer]] = []
    for group in _of_equal_scaling(layers):
        alike: dict[Any, list[BufferedLayer]] = {}
        for layer in sorted(group, key=lambda layer: layer.lora_a.data_ptr()):
            experts, rank, inputs = layer.lora_a.shape
            outputs, dtype = layer.lora_b.shape[1], layer.lora_a.dtype
            inner = kind.rows * min(kind.width, experts) * rank
            stackable = is_stackable((inner, inputs), dtype) and is_stackable((inner, outputs), dtype)
            alike.setdefault((experts, rank, inputs, outputs, dtype) if stackable else layer.key, []).append(layer)
        found += alike.values()
    return found


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
