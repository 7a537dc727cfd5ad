"""The fusion of the authors' released code, for timing only: a Python loop over the kept adapters in every adapted layer.

Re-implemented from MeCuping/DLP-LoRA@d68fd38: a classifier reads the prompt once, and the kept adapters and weights stay fixed for the
whole generation. Every adapted layer calls each kept adapter and adds its output, times weight and scaling, to the base output. One prompt
at a time. The result equals that of our backends; only the computation differs.

Deviations: every adapter keeps its own scaling (the code uses the first one's for all), every layer is fused (the code counts to 28), and
the call of ``torch.cuda.empty_cache()`` in every layer is omitted, which makes the loop faster on a GPU.
Shapes: T tokens, E experts, R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dlplora.errors import GenerationError
from dlplora.methods.base import FusionMethod, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch


@dataclass
class KeptExperts:
    """Indices and routing weights of the kept adapters; shared by all layers of a model."""

    pairs: list[tuple[int, float]] = field(default_factory=list)

    def take(self, weights: Tensor) -> None:
        """Keep the non-zero entries of the routing weights (E,) of the only row.

        Raises:
            GenerationError: For several rows: the loop serves one prompt at a time.
        """
        if weights.ndim == 2 and weights.shape[0] != 1:
            raise GenerationError(f"the released code's loop serves one prompt at a time, got {weights.shape[0]}; use batch 1.")
        values = weights.reshape(-1).tolist()
        self.pairs = [(index, value) for index, value in enumerate(values) if value != 0]


class LoopedLoRALinear(nn.Module):
    """A linear layer and its adapters as separate modules, called one after the other.

    Args:
        base: The layer.
        pairs: A (R, I) and B (O, R) of every expert.
        scaling: Of every expert.
        kept: The kept ones.
    """

    def __init__(self, base: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]], scaling: Sequence[float], kept: KeptExperts) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.ParameterList(nn.Parameter(a, requires_grad=False) for a, _ in pairs)
        self.lora_b = nn.ParameterList(nn.Parameter(b, requires_grad=False) for _, b in pairs)
        self.scaling = tuple(scaling)
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, I) -> (B, T, O)."""
        result = self.base(x)
        for index, weight in self.kept.pairs:
            result = result + self.scaling[index] * weight * F.linear(F.linear(x, self.lora_a[index]), self.lora_b[index])
        return result


class ReleasedLoop:
    """A model that fuses by the loop, and the method that decides once per prompt.

    Args:
        model: A causal LM; its adapted layers are replaced for good.
        bank: The experts.
        method: Prompt-level, not yet prepared.
        context: What the method may use.
    """

    def __init__(self, model: Any, bank: AdapterBank, method: FusionMethod, context: MethodContext) -> None:
        method.prepare(bank, context)
        self.model, self.method, self.kept = model, method, KeptExperts()
        for path, entry in bank.modules.items():
            parent, _, leaf = path.rpartition(".")
            pairs = [(a, b.contiguous()) for a, b in zip(entry.lora_a, entry.lora_b, strict=True)]  # each adapter has weights of its own
            layer = LoopedLoRALinear(model.get_submodule(path), pairs, entry.scaling.tolist(), self.kept)
            setattr(model.get_submodule(parent), leaf, layer)

    def route(self, prompts: PromptBatch) -> Tensor:
        """Route the only prompt and remember it; returns the routing weights (1, E)."""
        weights = self.method.route(prompts)
        assert weights is not None
        self.kept.take(weights)
        return weights

    def generate(self, prompts: PromptBatch, **options: Any) -> Tensor:
        """Route once, then generate; token ids (1, T)."""
        self.route(prompts)
        return self.model.generate(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, **options)  # type: ignore[no-any-return]
