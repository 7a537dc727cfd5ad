"""How a base model passes the vectors of a batch to a linear layer. Shapes: B rows, T tokens, I inputs, N vectors."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from dlplora.modules.per_thread import PerThread

Layout = Literal["unknown", "rows", "flat", "other"]
"""What a layer receives: ``rows`` (B, ..., I); ``flat`` (B * T, I), row after row; ``other``: anything else, tokens picked by a router for
instance; ``unknown`` before a trial run (``inference.fit_trial``)."""


class InputGrid:
    """Rows and tokens of the running forward pass of this thread, for layers that receive them flattened."""

    def __init__(self) -> None:
        self._size = PerThread(rows=int, tokens=int)

    @property
    def rows(self) -> int:
        """Rows of the batch, B."""
        return int(self._size.rows)

    def note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of the input embedding: its argument is the token ids (B, T)."""
        if args and args[0].ndim == 2:
            self._size.rows, self._size.tokens = args[0].shape

    def fits(self, x: Tensor) -> bool:
        """Whether ``x`` (N, I) holds one vector for every token."""
        return x.ndim == 2 and x.shape[0] == self._size.rows * self._size.tokens
