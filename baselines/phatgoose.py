"""PHATGOOSE: a gate vector per expert and layer, each trained on its own expert's data alone (Muqeeth et al., arXiv:2402.05859).

Training: ``y = W x + sigmoid(v_e . x) s_e B_e A_e x`` on the rows of expert e. Inference: x and v are standardised (zero mean, unit
variance), scores ``x . v_e / sqrt(I)``, softmax over the best two. No gate is trained on another task.

Deviations, with reasons: v starts within 1e-3 of zero rather than at it; standardised zeros would all have the same score, and an
untrained method would depend on the order of the experts. All gates train in one run, each on its own rows: their gradients are
independent. The softmax over the kept two follows MTTL; the authors' own code takes it over all experts first. So does the layer norm
with an epsilon of 1e-5: the variance of a short gate vector stays below one (nano's gates: standard deviation 0.55 to 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlplora.methods.base import Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.per_thread import PerThread, nothing

from ._gates import TRAINED_NEEDS, TrainedGates, drawn, key_of, require_at_most, top_k_softmax


@dataclass(frozen=True, kw_only=True, slots=True)
class PhatgooseConfig:
    """PHATGOOSE's settings."""

    top_k: int = 2
    """Experts kept at a token."""


class Phatgoose(TrainedGates):
    """Sigmoid gates in training, standardised scores afterwards."""

    name = "phatgoose"
    metadata = Metadata(
        title="PHATGOOSE",
        paper="https://arxiv.org/abs/2402.05859",
        granularity="token",
        depth="module",
        needs=TRAINED_NEEDS,
        trainable=True,
    )
    Config = PhatgooseConfig

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """No row is trained yet."""
        require_at_most(self.config.top_k, bank.num_experts, self.name)
        self._pass = PerThread(own=nothing)
        return super().prepare(bank, context)

    def build(self, bank: AdapterBank, seed: int) -> None:
        """One (E, I) matrix of gate vectors a layer."""
        self.gates = nn.ParameterDict()
        for module, entry in bank.modules.items():
            self.gates[key_of(module)] = nn.Parameter(drawn(bank, entry.lora_a.shape[-1], 1e-3, self.name, seed, module))

    def gate(self, module: str, x: Tensor) -> Tensor:
        """While training, the row's own expert through its sigmoid; else the best two."""
        vectors = self.gates[key_of(module)]
        own = self._pass.own
        if own is not None:
            strength = torch.einsum("bti,bi->bt", x.float(), vectors[own]).sigmoid()
            return F.one_hot(own, vectors.shape[0])[:, None, :] * strength[..., None]
        width = x.shape[-1]
        scores = F.layer_norm(x.float(), (width,)) @ F.layer_norm(vectors, (width,)).T / width**0.5
        return top_k_softmax(scores, self.config.top_k)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The answers of every row under its own expert's gate."""
        self._pass.own = batch["expert_idx"]
        try:
            return batch["answer_loss"](None)  # type: ignore[no-any-return]
        finally:
            self._pass.own = None
