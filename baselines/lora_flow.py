"""LoRA-Flow: weights per decoder layer and token from the residual stream (Wang et al., arXiv:2402.11455).

``w = softmax(W x / temperature) + b`` where x is the hidden state that enters the decoder layer, before normalisation; ``W`` (E, D),
``b`` (E,); the same w serves all adapted modules of the layer. Weights may be negative or larger than one.

Deviations: the original pairs one language LoRA with one task LoRA and starts at weights (0, 1). N experts have no such pair: W
and b start at zero and the weights uniform at 1 / N. Trained on the mixture of all tasks (``flow_all``), not on one composite
task.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dlplora.errors import ConfigError, MethodError
from dlplora.methods.base import FusedModel, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.per_thread import PerThread

from ._gates import TRAINED_NEEDS, TrainedGates, hidden_size, key_of, layer_of


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAFlowConfig:
    """LoRA-Flow's settings."""

    temperature: float = 1.0
    """Divides the scores. The authors evaluate two tasks at 1.1 and train at 1."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"'temperature' must be positive, got {self.temperature}.")


class LoRAFlow(TrainedGates):
    """One gate a decoder layer over its input."""

    name = "lora_flow"
    metadata = Metadata(
        title="LoRA-Flow",
        paper="https://arxiv.org/abs/2402.11455",
        granularity="token",
        depth="layer",
        needs=TRAINED_NEEDS,
        trainable=True,
        weight_sum="any",
    )
    Config = LoRAFlowConfig
    evaluation_params = ("temperature",)

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Note the width of the residual stream."""
        self._width = hidden_size(context)
        self._pass = PerThread(weights=dict)
        return super().prepare(bank, context)

    def build(self, bank: AdapterBank, seed: int) -> None:
        """Zeros: uniform weights."""
        self.scores, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for layer in dict.fromkeys(layer_of(module) for module in bank.modules):
            self.scores[key_of(layer)] = nn.Parameter(torch.zeros(bank.num_experts, self._width))
            self.biases[key_of(layer)] = nn.Parameter(torch.zeros(bank.num_experts))

    def attach(self, model: FusedModel) -> None:
        """Watch what enters each decoder layer, and gate its modules by it."""
        super().attach(model)
        for layer in dict.fromkeys(layer_of(module) for module in model.patched.layers):
            if model.patched.layers.get(layer) is not None:
                raise MethodError(f"method 'lora_flow' gates decoder layers; module '{layer}' is outside of them.")
            hook = model.model.get_submodule(layer).register_forward_pre_hook(partial(self._enter, layer), with_kwargs=True)
            model.patched.hooks.append(hook)

    def _enter(self, layer: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._pass.weights[layer] = self.weigh(layer, hidden)

    def weigh(self, layer: str, hidden: Tensor) -> Tensor:
        """Weights (B, T, E) from the residual stream (B, T, D)."""
        scores = hidden.float() @ self.scores[key_of(layer)].T
        return (scores / self.config.temperature).softmax(dim=-1) + self.biases[key_of(layer)]

    def gate(self, module: str, x: Tensor) -> Tensor:
        """The weights of the module's decoder layer in the running forward pass."""
        return self._pass.weights[layer_of(module)]  # type: ignore[no-any-return]
