"""AdaFuse: one token router before the first adapted layer decides for all layers (arXiv:2603.11873). Shapes: B rows, T tokens, E experts.

``w = softmax(top_2(x G^T))`` with x the input of the first adapted module of the forward pass and one ``G`` (E, I) for the whole model;
every layer uses these weights. MeteoRA runs a gate in every layer; here a token costs one product. The paper's further speed-up is a kernel
that switches all layers at once, which is not part of the method.

No code is public, and only the abstract and a note were available. Our choices: softmax over the kept two, no bias, loss on answers only.
Experts that tie with the second are kept too. The LoRAs stay frozen, as for every gate here (paper: trained together with the gate).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlplora.errors import MethodError
from dlplora.methods.base import Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.per_thread import PerThread, nothing

from ._gates import TRAINED_NEEDS, TrainedGates, drawn, first_modules, require_at_most


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaFuseConfig:
    """AdaFuse's setting."""

    top_k: int = 2
    """Experts kept at a token."""


class AdaFuse(TrainedGates):
    """One gate for the model."""

    name = "adafuse"
    metadata = Metadata(
        title="AdaFuse",
        paper="https://arxiv.org/abs/2603.11873",
        granularity="token",
        depth="model",
        needs=TRAINED_NEEDS,
        trainable=True,
    )
    Config = AdaFuseConfig

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Find the module that the forward pass meets first."""
        require_at_most(self.config.top_k, bank.num_experts, self.name)
        firsts = first_modules(bank, self.name)
        self._first = firsts[min(firsts, key=_place)]
        self._pass = PerThread(weights=nothing)
        return super().prepare(bank, context)

    def build(self, bank: AdapterBank, seed: int) -> None:
        """One (E, I) matrix, within the bounds of ``nn.Linear``."""
        width = bank.modules[self._first].lora_a.shape[-1]
        self.weight = nn.Parameter(drawn(bank, width, width**-0.5, self.name, seed))

    def gate(self, module: str, x: Tensor) -> Tensor:
        """Decide at the first module; repeat the decision at the others."""
        if module == self._first:
            scores = x.float() @ self.weight.T
            # Ties are kept: an embedding of zeros, that of padding for instance, must not favour the first experts of the pool.
            least = scores.topk(self.config.top_k, dim=-1).values[..., -1:]
            self._pass.weights = scores.masked_fill(scores < least, -torch.inf).softmax(dim=-1)
        weights: Tensor | None = self._pass.weights
        if weights is None:
            raise MethodError(f"method '{self.name}': '{module}' ran before '{self._first}', which decides for it.")
        return weights


def _place(layer: str) -> tuple[int, str]:
    """Decoder layers in the order of their numbers."""
    number = layer.rsplit(".", 1)[-1]
    return (int(number) if number.isdigit() else -1, layer)
