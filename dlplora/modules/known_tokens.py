"""Cached features of single tokens: the output of a router's first layer for a token does not depend on its neighbours.

Shapes: N tokens, V vocabulary, D features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST_ROWS = 16
"""Fewest tokens computed at a time: with fewer rows, the last bit of a matrix product may depend on their number."""
MOST_TOKENS = 1 << 15
"""Tokens that are kept; one more, and the table begins again. 32 MB at 256 features."""


@dataclass(frozen=True, slots=True)
class _Table:
    """Features of the tokens seen so far; entries that a reader may use never change.

    Args:
        made_from: The weights that they were computed with, the addresses and the numbers of changes in place at that time.
        slots: Where a token's features are, int64 (V,); -1 for tokens not met.
        features: (M, D), of which the first ``size`` are in use.
    """

    made_from: tuple[tuple[Tensor, int, int], ...]
    slots: Tensor
    features: Tensor
    size: int

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Whether the weights are still the same."""
        return len(self.made_from) == len(weights) and all(
            one is weight and address == weight.data_ptr() and version == weight._version
            for (one, address, version), weight in zip(self.made_from, weights, strict=True)
        )


class KnownTokens:
    """A table of token features that grows as tokens are met. Threads may share it; a copy starts empty."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._table: _Table | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Features belong to one model."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start()

    def look_up(self, ids: Tensor, size: int, weights: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Where each token's features are; what is missing is computed.

        Args:
            ids: Token ids, int64 (N,), on the device of the features.
            size: V.
            weights: All that the features depend on. Another tensor, another address or a change in place empties the table.
            compute: Token ids (N,) -> features (N, D), each row by itself.

        Returns:
            Places (N,), and a table (M, D) with the features of the i-th token at ``places[i]``.
        """
        if any(weight.is_inference() for weight in weights):  # changes in place of these are not counted
            distinct, places = torch.unique(ids, return_inverse=True)
            return places, compute(distinct)
        table = self._table
        if table is not None and table.fits(weights):
            places = table.slots[ids]
            if not bool((places < 0).any()):
                return places, table.features
        with self._lock, torch.inference_mode(False), torch.no_grad():
            table = self._table = self._with(ids.clone(), size, weights, compute)
        return table.slots[ids], table.features

    def _with(self, ids: Tensor, size: int, weights: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> _Table:
        """The table with these tokens in it."""
        table = self._table
        if table is not None and not table.fits(weights):
            table = None
        slots = torch.full((size,), -1, device=ids.device) if table is None else table.slots.clone()
        new = torch.unique(ids[slots[ids] < 0])
        if table is not None and table.size + len(new) > MOST_TOKENS:
            table, new = None, torch.unique(ids)
            slots.fill_(-1)
        if table is not None and not len(new):
            return table  # another thread has added them meanwhile
        begin = 0 if table is None else table.size
        end = begin + len(new)
        found = compute(new if len(new) >= LEAST_ROWS else new.repeat(LEAST_ROWS))
        features = found.new_zeros(end, found.shape[1]) if table is None else table.features
        if end > len(features):
            features = torch.cat([features[:begin], found.new_zeros(end, found.shape[1])])  # room for as many again
        features[begin:end] = found[: len(new)]
        slots[new] = torch.arange(begin, end, device=ids.device)
        return _Table(tuple((weight, weight.data_ptr(), weight._version) for weight in weights), slots, features, end)
