"""qa-FLoRA: weights of every layer from how far each adapter moves the model on the prompt (arXiv:2512.11366). Shapes: E experts, L blocks.

The prompt is run with the base model and with each adapter alone. At block l, ``w_i = KL(p_base || p_i) / sum_j KL(p_base || p_j)``,
where p is the distribution over the vocabulary from the last token's hidden state after the block, through the final normalisation and the
output head. All adapted modules of a block use its weights; deltas are summed. No training and no data.

The cost is E + 1 rows of the prompt before the answer: one batch with the base model (a row of zero weights) and E one-hot rows. Their
memory is predicted from the model's sizes (``row_bytes``), and a batch that would need more than ``memory_mb`` is split.

From the abstract. Reading the distributions from the hidden states of the last token through the model's own head, and weights proportional
to the divergence, are our interpretation. If no adapter changes anything, all weights are equal. No code is public.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlplora.errors import ConfigError, MethodError
from dlplora.methods.base import FusedModel, FusionMethod, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch

from ._gates import layer_of

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
"""Names of the normalisation before the output head, in the decoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QaFloraConfig:
    """What a prompt may cost."""

    memory_mb: int = 1024
    """Predicted memory, in MiB, above which the rows of a prompt are split into several passes."""

    def __post_init__(self) -> None:
        if self.memory_mb < 1:
            raise ConfigError(f"'memory_mb' must be at least 1, got {self.memory_mb}.")


def row_bytes(config: Any, tokens: int, itemsize: int, ranks: int) -> int:
    """Predicted memory, in bytes, of one row of a prompt while it is run: the kept hidden states, one block at work, the output head.

    Args:
        config: Of the base model.
        tokens: Of the prompt.
        itemsize: Bytes of a number.
        ranks: Ranks of all adapters together.
    """
    hidden, blocks = int(config.hidden_size), int(config.num_hidden_layers)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    heads = int(getattr(config, "num_attention_heads", 1))
    per_token = hidden * (blocks + 1) + 6 * hidden + 3 * inner + 2 * ranks
    return tokens * per_token * itemsize + heads * tokens**2 * itemsize + 3 * int(config.vocab_size) * 8


class QaFlora(FusionMethod):
    """Weights of a prompt, block by block."""

    name = "qa_flora"
    metadata = Metadata(title="qa-FLoRA", paper="https://arxiv.org/abs/2512.11366", granularity="prompt", depth="layer")
    Config = QaFloraConfig

    @property
    def reported(self) -> Mapping[str, int]:
        """Rows of the prompt that are run before it is answered."""
        return {"routing_rows_per_prompt": len(self.expert_names) + 1}

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Find the blocks that are adapted.

        Raises:
            MethodError: If a module is outside of the numbered blocks.
        """
        numbers = {}
        for module in bank.modules:
            block = layer_of(module)
            number = block.rsplit(".", 1)[-1]
            if block == module or not number.isdigit():
                raise MethodError(f"method '{self.name}' weights decoder layers; module '{module}' is outside of them.")
            numbers[block] = int(number)
        self._blocks = sorted(numbers, key=lambda block: numbers[block])
        self._numbers = [numbers[block] for block in self._blocks]
        self._ranks = bank.rank * bank.num_experts
        return super().prepare(bank, context)

    def attach(self, model: FusedModel) -> None:
        """Give every layer its block's part of a row's weights; keep a way to the model."""
        experts = len(self.expert_names)
        for module, layer in model.patched.layers.items():
            place = self._blocks.index(layer_of(module))
            layer.block = slice(place * experts, (place + 1) * experts)
        self._model = (model,)  # inside a tuple, so that nn.Module does not register it
        decoder = model.model.base_model
        norm = next((module for name in FINAL_NORMS if (module := getattr(decoder, name, None)) is not None), None)
        if norm is None:
            raise MethodError(
                f"method '{self.name}' reads hidden states through the final normalisation, and {type(decoder).__name__} has none."
            )
        self._norm = (norm,)

    def rows_at_once(self, tokens: int) -> int:
        """Number of rows that run together, for a prompt with this number of tokens."""
        (model,) = self._model
        weight: Any = next(iter(model.bank.modules.values())).lora_a
        config = model.model.config.get_text_config()
        return max(1, (self.config.memory_mb << 20) // row_bytes(config, tokens, weight.element_size(), self._ranks))

    @torch.no_grad()
    def route(self, prompts: PromptBatch) -> Tensor:
        """Weights (B, L E), block after block. Every prompt is read without the others, so that batches cannot change a bit."""
        rows = []
        for ids, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True):
            rows.append(self._shares(self.divergences(ids[mask.bool()])).flatten())
        return torch.stack(rows).float().to(prompts.input_ids.device)

    def divergences(self, ids: Tensor) -> Tensor:
        """``KL(base || adapter)`` at every adapted block (L, E), float64, for the tokens (T,) of one prompt."""
        (model,) = self._model
        experts, device = len(self.expert_names), model.device
        weights = torch.cat([torch.zeros(1, experts), torch.eye(experts)]).to(device)
        base, found = None, []
        for chunk in weights.split(self.rows_at_once(len(ids))):
            logs = self._log_shares(model, ids.to(device).expand(len(chunk), -1), chunk)
            base = logs[:, :1].clone() if base is None else base
            found.append((base.exp() * (base - logs)).sum(dim=-1))
        return torch.cat(found, dim=1)[:, 1:].clamp_min(0.0)

    def _log_shares(self, model: FusedModel, ids: Tensor, weights: Tensor) -> Tensor:
        """Log distributions (L, n, V), float64, after every adapted block under routing weights (n, E)."""
        (norm,) = self._norm
        head = model.model.get_output_embeddings()
        with model.routing(weights):
            states = model.model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        logs = []
        for number in self._numbers:
            last = states[number + 1][:, -1]
            normal = last if number + 2 == len(states) else norm(last)  # the last state has been normalised
            logs.append(head(normal).double().log_softmax(dim=-1))
        return torch.stack(logs)

    @staticmethod
    def _shares(divergences: Tensor) -> Tensor:
        """Rows (L, E) that sum to one."""
        total = divergences.sum(dim=-1, keepdim=True)
        equal = torch.full_like(divergences, 1.0 / divergences.shape[-1])
        return torch.where(total > 0, divergences / total.clamp_min(torch.finfo(torch.float64).tiny), equal)
