"""MeteoRA: a linear gate on every adapted layer, trained to predict the task at every token (Xu et al., arXiv:2405.13053).

``w = softmax(top_k(x G^T) / temperature)`` with ``G`` (E, I) per layer. Loss = answers + ``gate_loss`` * mean, over gates and real
tokens, prompt included, of the cross-entropy of the gate's logits with the row's own expert: supervised classification, not load
balancing.

Deviations, with reasons: ``meteora_gate`` keeps the LoRAs frozen, which is the fair comparison; ``meteora_full`` trains copies of them
along with the gates, as the released script does. The language-model loss is on answers only, as for every method here; the released
code takes the prompt too. The temperature acts in training as well (the released code ignores it in one of its two paths). Gates belong
to experts by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlplora.errors import ConfigError
from dlplora.methods.base import FusedModel, Metadata
from dlplora.modules.lora_bank import AdapterBank

from ._gates import TRAINED_NEEDS, TrainedGates, drawn, key_of, over_real_tokens, require_at_most, top_k_softmax


@dataclass(frozen=True, kw_only=True, slots=True)
class MeteoRAConfig:
    """MeteoRA's settings."""

    top_k: int = 2
    """Experts kept at a token."""
    temperature: float = 1.0
    """Divides the logits; 1 is the fair row. The authors set 15 to 30 by hand for their composite tasks."""
    gate_loss: float = 50.0
    """Weight of the gates' cross-entropy on the task (beta); 50 in the released code."""
    train_adapters: bool = False
    """Whether copies of the LoRAs are trained along with the gates; the pool itself never changes."""

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.gate_loss < 0:
            raise ConfigError(f"'temperature' must be positive and 'gate_loss' not negative, got {self.temperature}, {self.gate_loss}.")


class MeteoRA(TrainedGates):
    """Gates per layer, top-k, task loss."""

    name = "meteora"
    metadata = Metadata(
        title="MeteoRA",
        paper="https://arxiv.org/abs/2405.13053",
        granularity="token",
        depth="module",
        needs=TRAINED_NEEDS,
        trainable=True,
    )
    Config = MeteoRAConfig
    evaluation_params = ("temperature",)

    def build(self, bank: AdapterBank, seed: int) -> None:
        """One (E, I) matrix per layer, within the bounds of ``nn.Linear``; copies of A and B if they are trained."""
        require_at_most(self.config.top_k, bank.num_experts, self.name)
        self.gates, self.lora_a, self.lora_b = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for module, entry in bank.modules.items():
            width = entry.lora_a.shape[-1]
            self.gates[key_of(module)] = nn.Parameter(drawn(bank, width, width**-0.5, self.name, seed, module))
            if self.config.train_adapters:
                self.lora_a[key_of(module)] = nn.Parameter(entry.lora_a.detach().clone())
                self.lora_b[key_of(module)] = nn.Parameter(entry.lora_b.detach().clone())

    def attach(self, model: FusedModel) -> None:
        """Gates on every layer; trained copies take the place of the bank's adapters in the layers."""
        super().attach(model)
        if self.config.train_adapters:
            for module, layer in model.patched.layers.items():
                layer.lora_a, layer.lora_b = self.lora_a[key_of(module)], self.lora_b[key_of(module)]

    def gate(self, module: str, x: Tensor) -> Tensor:
        """Softmax over the largest logits."""
        scores = x.float() @ self.gates[key_of(module)].T
        self.record(module, scores)
        return top_k_softmax(scores, self.config.top_k, self.config.temperature)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Answers plus the gates' task loss."""
        answers, recorded = self.answer_and_records(batch)
        mask = batch["attention_mask"]
        target = batch["expert_idx"][:, None].expand_as(mask)
        losses = [over_real_tokens(F.cross_entropy(scores.mT, target, reduction="none"), mask) for scores in recorded.values()]
        return answers + self.config.gate_loss * batch.get("token_share", 1.0) * torch.stack(losses).mean()
