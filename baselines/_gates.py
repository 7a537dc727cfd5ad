"""What methods with a gate on every fused layer share. Shapes: B rows, T tokens, I inputs, E experts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlplora.errors import MethodError
from dlplora.methods.base import FusionMethod

if TYPE_CHECKING:
    from dlplora.inference.fused_model import FusedCausalLM


def top_k_softmax(scores: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Softmax over the ``k`` largest scores divided by the temperature, zero elsewhere; float32 (..., E)."""
    best, index = scores.float().topk(k, dim=-1)
    return torch.zeros_like(scores, dtype=torch.float32).scatter(-1, index, (best / temperature).softmax(dim=-1))


def require_at_most(k: int, num_experts: int, method: str, key: str = "top_k") -> None:
    """Refuse a ``k`` that no pool of this size can serve.

    Raises:
        MethodError: If it is less than 1 or more than the experts of the pool.
    """
    if not 1 <= k <= num_experts:
        raise MethodError(f"method '{method}': '{key}' must lie between 1 and the number of experts ({num_experts}), got {k}.")


class TokenGated(FusionMethod):
    """A method whose weights are a function of a layer's own input, computed for every token."""

    def gate(self, module: str, x: Tensor) -> Tensor:
        """Routing weights (B, T, E), float32, of one layer from its input (B, T, I).

        Args:
            module: Path of the layer in the backbone.
            x: Its input.
        """
        raise NotImplementedError

    def attach(self, model: FusedCausalLM) -> None:
        """Put the gate on every fused layer."""
        for module, layer in model.patched.layers.items():
            layer.gate = partial(self.gate, module)
