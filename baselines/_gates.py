"""The common part of methods with a gate on every fused layer. Shapes: B rows, T tokens, I inputs, E experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlplora.errors import MethodError
from dlplora.methods.base import FusedModel, FusionMethod, MethodContext, Need
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.per_thread import PerThread, nothing
from dlplora.modules.seeds import derive_seed


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
        raise MethodError(f"method '{method}': '{key}' must be between 1 and the number of experts ({num_experts}), got {k}.")


def kept_of(k: int, num_experts: int, method: str, key: str = "top_k") -> int:
    """How many experts a method that keeps the ``k`` best keeps of a pool: all of them if it holds fewer.

    Raises:
        MethodError: If ``k`` is less than 1.
    """
    if k < 1:
        raise MethodError(f"method '{method}': '{key}' must be at least 1, got {k}.")
    return min(k, num_experts)


class TokenGated(FusionMethod):
    """A method that computes the weights of every token from a layer's own input."""

    def gate(self, module: str, x: Tensor) -> Tensor:
        """Routing weights (B, T, E), float32, of one layer from its input (B, T, I).

        Args:
            module: Path of the layer in the base model.
            x: Its input.
        """
        raise NotImplementedError

    def attach(self, model: FusedModel) -> None:
        """Put the gate on every fused layer."""
        for module, layer in model.patched.layers.items():
            layer.gate = partial(self.gate, module)


TRAINED_NEEDS: tuple[Need, ...] = ("inputs", "labels", "trained")
"""What a method with trained gates must be given."""
FORWARD_ORDER = (
    "q_proj", "qkv_proj", "query_key_value", "c_attn", "k_proj", "v_proj", "o_proj", "gate_proj", "gate_up_proj", "up_proj", "c_fc", "fc1",
    "down_proj", "c_proj", "fc2",
)  # fmt: skip
"""Linear layers of a decoder layer in the order in which the forward pass calls them."""


def key_of(module: str) -> str:
    """A module path as the name of a parameter, which may not hold a dot."""
    return module.replace(".", "/")


def layer_of(module: str) -> str:
    """The decoder layer that a module belongs to: the path up to its first number; the whole path if it has none.

    >>> layer_of("model.layers.3.self_attn.q_proj")
    'model.layers.3'
    """
    match = re.match(r"(.*?\.\d+)(\.|$)", module)
    return match[1] if match else module


def first_modules(bank: AdapterBank, method: str) -> dict[str, str]:
    """Decoder layer -> the first of its adapted modules in the forward pass.

    Raises:
        MethodError: If the order of a module is not known.
    """
    first: dict[str, tuple[int, str]] = {}
    for module in bank.modules:
        name = module.rsplit(".", 1)[-1]
        if name not in FORWARD_ORDER:
            raise MethodError(
                f"method '{method}' shares weights inside a decoder layer and must know which module comes first; '{name}' is not among "
                f"{', '.join(FORWARD_ORDER)}."
            )
        place = (FORWARD_ORDER.index(name), module)
        first[layer_of(module)] = min(place, first.get(layer_of(module), place))
    return {layer: module for layer, (_, module) in first.items()}


def drawn(bank: AdapterBank, width: int, bound: float, *parts: object) -> Tensor:
    """Uniform numbers (E, width) within ``bound``; a row depends on its expert's name, not on the order of the experts."""
    rows = []
    for name in bank.names:
        generator = torch.Generator().manual_seed(derive_seed(*parts, name))
        rows.append((torch.rand(width, generator=generator) * 2 - 1) * bound)
    return torch.stack(rows)


def hidden_size(context: MethodContext) -> int:
    """Width of the residual stream, read from the embedding."""
    weight: Any = context.embedding.weight
    return int(weight.shape[-1])


def over_real_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T) values over the positions that ``mask`` (B, T) marks; padding on either side is left out."""
    real = mask.to(values.dtype)
    return (values * real).sum() / real.sum()


class TrainedGates(TokenGated):
    """Gates with parameters; they record their outputs while a loss is computed."""

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Make the parameters at the first call; keep those that are there."""
        if not list(self.parameters()):
            self.build(bank, context.seed)
            self.to(context.device)
        self._recording = PerThread(values=nothing)
        return super().prepare(bank, context)

    def build(self, bank: AdapterBank, seed: int) -> None:
        """Register the gates' parameters, float32 on the CPU."""
        raise NotImplementedError

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The answers alone, under the gates."""
        return batch["answer_loss"](None)  # type: ignore[no-any-return]

    def record(self, name: str, value: Tensor) -> None:
        """Keep a tensor for the loss of the running step; outside of training nothing is kept."""
        values = self._recording.values
        if values is not None:
            values[name] = value

    def answer_and_records(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The answers' cross-entropy under the gates, and what the gates recorded on the way."""
        recorded: dict[str, Tensor] = {}
        self._recording.values = recorded
        try:
            return batch["answer_loss"](None), recorded
        finally:
            self._recording.values = None
