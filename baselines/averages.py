"""Two reference rows: the average of the factors, and a random expert.

``avg_factor`` is ``(sum_e s_e B_e / N) (sum_e A_e / N)``: checkpoints averaged tensor by tensor, with cross terms ``B_i A_j``; each
expert's scaling is multiplied into its B. It is not PEFT's ``linear``, which takes square roots of the weights
(and is N times larger at uniform ones). ``random_route`` is the baseline of every router: one random expert per prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dlplora.methods.base import FusionMethod, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.seeds import derive_seed
from dlplora.types import PromptBatch


class AvgFactor(FusionMethod):
    """Separate uniform averages of A and of B; one merged adapter of one expert's rank."""

    name = "avg_factor"
    metadata = Metadata(title="Uniform average of factors", granularity="none", combine="factor")

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """The bank of the one merged expert.

        Raises:
            IncompatibleAdapterError: If the adapters differ in rank or in target modules.
        """
        super().prepare(bank, context)
        return self.merge(bank, torch.full((bank.num_experts,), 1.0 / bank.num_experts))

    @property
    def reported(self) -> Mapping[str, int]:
        """``num_merged``: experts in the merged adapter."""
        return {"num_merged": len(self.expert_names)}

    def merge(self, bank: AdapterBank, weights: Tensor) -> AdapterBank:
        """One expert with ``A = sum w_e A_e`` and ``B = sum w_e s_e B_e``."""
        bank.require_equal_ranks(self.name)
        merged: dict[str, list[Any]] = {}
        for module, entry in bank.modules.items():
            shares = weights.to(entry.scaling)
            lora_a = torch.einsum("e,eri->ri", shares, entry.lora_a.float())
            lora_b = torch.einsum("e,eor->or", shares * entry.scaling, entry.lora_b.float())
            merged[module] = [(lora_a, lora_b, 1.0)]
            dtype, device = entry.lora_a.dtype, entry.lora_a.device
        return AdapterBank.from_tensors(("merged",), merged, dtype=dtype, device=device)

    def route(self, prompts: PromptBatch) -> Tensor:
        """Ones (B, 1)."""
        return torch.ones(len(prompts), 1, device=prompts.input_ids.device)


class RandomRoute(FusionMethod):
    """One expert per prompt, drawn from seed and token ids alone: options of one question and batches of any shape agree."""

    name = "random_route"
    metadata = Metadata(title="Random expert", granularity="prompt")
    max_kept = 1

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Keep the seed."""
        self._seed = context.seed
        return super().prepare(bank, context)

    def route(self, prompts: PromptBatch) -> Tensor:
        """One-hot rows (B, E)."""
        by_name = sorted(range(len(self.expert_names)), key=lambda index: self.expert_names[index])
        weights = torch.zeros(len(prompts), len(by_name))
        for row, (ids, mask) in enumerate(zip(prompts.input_ids, prompts.attention_mask, strict=True)):
            tokens = ids[mask.bool()].tolist()
            weights[row, by_name[derive_seed("random_route", self._seed, *tokens) % len(by_name)]] = 1.0
        return weights.to(prompts.input_ids.device)
