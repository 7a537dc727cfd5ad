"""CAT: one trained scalar for every adapter and adapted module (LoRA Soups, arXiv:2410.13025).

``dW_l = sum_e alpha_el s_e B_el A_el``. The weights do not depend on the input, so this is the control for every gate that does. Trained on
the mixture of all tasks, on the same rows as the gates; starts at ``1 / E``, the average of the deltas. Weights may be negative or larger
than one.

Deviations: the paper joins two adapters, each trained on one skill, on a mixture of the two skills; here all adapters of the pool. The
initial value is our choice. It runs as a gate with constant outputs, so that it is trained and measured like the gates; in a deployment the
fixed weights could be folded into one adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlplora.methods.base import Metadata
from dlplora.modules.lora_bank import AdapterBank

from ._gates import TRAINED_NEEDS, TrainedGates, key_of


class Cat(TrainedGates):
    """Constant weights per module."""

    name = "cat"
    metadata = Metadata(
        title="CAT (LoRA Soups)",
        paper="https://arxiv.org/abs/2410.13025",
        granularity="none",
        depth="module",
        needs=TRAINED_NEEDS,
        trainable=True,
        weight_sum="any",
    )

    def build(self, bank: AdapterBank, seed: int) -> None:
        """``1 / E`` everywhere."""
        share = 1.0 / bank.num_experts
        self.weights = nn.ParameterDict({key_of(module): nn.Parameter(torch.full((bank.num_experts,), share)) for module in bank.modules})

    def gate(self, module: str, x: Tensor) -> Tensor:
        """The module's weights for every token (B, T, E)."""
        return self.weights[key_of(module)].expand(*x.shape[:2], -1)
