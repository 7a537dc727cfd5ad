"""LoGo: experts are weighted by the strength of their output on the prompt (arXiv:2511.07129). Shapes: E experts, T tokens, D hidden, O
outputs.

One pass over the prompt with every adapter at weight one. At the query projection of the last block, for the last token of the prompt,
``o_i = s_i B_i A_i h``. The score of an expert is ``|o_i|`` (``logo_norm``) or ``1 / H(softmax(o_i))``, the inverse entropy
(``logo_entropy``); the ``top_k`` best share the weight in proportion. Deltas are summed. No training and no data.

``h`` is a switch. ``reads: input`` (default) takes the input of the projection, as in the equation; ``reads: residual`` takes the
hidden state that enters the block, before its normalisation, as the public code does (archon159/LoGo@ef46b04).

Deviations: the last block whose query projection is adapted, found by name, instead of a fixed number per model; an expert that does not
adapt that projection scores zero; the question of the prompt is read, as for every router here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dlplora.errors import ConfigError, MethodError
from dlplora.methods.base import FusedModel, FusionMethod, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.routing_state import RoutingState
from dlplora.types import PromptBatch

from ._gates import kept_of, layer_of

QUERIES = ("q_proj", "qkv_proj", "query_key_value", "c_attn")
"""Query projections, alone or with keys and values."""
SMALLEST = 1e-6
"""Added to an entropy before it is inverted, as in the public code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoGoConfig:
    """LoGo's settings."""

    score: Literal["norm", "entropy"] = "norm"
    """Length of an expert's answer, or the inverse entropy of its softmax."""
    reads: Literal["input", "residual"] = "input"
    """What the adapters are applied to: the projection's input, or the hidden state before the block's normalisation."""
    top_k: int = 20
    """Experts kept, all of them if the pool holds fewer; 20 in the public code."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"'top_k' must be at least 1, got {self.top_k}.")


def scores_of(outputs: Tensor, score: str) -> Tensor:
    """Scores (E,) of the experts' answers (E, O), float32.

    Args:
        outputs: ``s_i B_i A_i h``.
        score: ``norm`` or ``entropy``.
    """
    if score == "norm":
        return outputs.norm(dim=-1)
    log_shares = outputs.log_softmax(dim=-1)
    return 1.0 / (SMALLEST - (log_shares.exp() * log_shares).sum(dim=-1))


class LoGo(FusionMethod):
    """Weights of a prompt from one pass with all adapters."""

    name = "logo"
    metadata = Metadata(title="LoGo", paper="https://arxiv.org/abs/2511.07129", granularity="prompt")
    Config = LoGoConfig

    @property
    def max_kept(self) -> int:
        """``top_k``."""
        return int(self.config.top_k)

    @property
    def reported(self) -> Mapping[str, int]:
        """Rows of the prompt that are run before it is answered."""
        return {"routing_rows_per_prompt": 1}

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Find the projection that is read.

        Raises:
            MethodError: If no adapter has a query projection in a numbered block.
        """
        self._kept = kept_of(self.config.top_k, bank.num_experts, self.name)
        found = {module: layer_of(module).rsplit(".", 1)[-1] for module in bank.modules if module.rsplit(".", 1)[-1] in QUERIES}
        blocks = {module: int(number) for module, number in found.items() if number.isdigit()}
        if not blocks:
            raise MethodError(f"method '{self.name}' reads a query projection ({', '.join(QUERIES)}), and the pool adapts none.")
        self._module = max(blocks, key=lambda module: blocks[module])
        self._block = blocks[self._module]
        return super().prepare(bank, context)

    def attach(self, model: FusedModel) -> None:
        """Keep a way to the model."""
        self._model = (model,)  # inside a tuple, so that nn.Module does not register it

    @torch.no_grad()
    def route(self, prompts: PromptBatch) -> Tensor:
        """Weights (B, E). Every prompt is read alone and without padding, so that batches cannot change a bit."""
        (model,) = self._model
        entry = model.bank.modules[self._module]
        rows = []
        for ids, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True):
            hidden = self._read(model, ids[mask.bool()][None].to(model.device)).float()
            outputs = torch.einsum("eor,eri,i->eo", entry.lora_b.float(), entry.lora_a.float(), hidden) * entry.scaling[:, None]
            rows.append(self._shares(scores_of(outputs, self.config.score) * (entry.scaling != 0)))
        return torch.stack(rows).to(prompts.input_ids.device)

    def scope_scores(self, prompts: PromptBatch) -> dict[str, Tensor]:
        """``largest_share`` of an expert."""
        return {"largest_share": self.route(prompts).amax(dim=-1)}

    def _read(self, model: FusedModel, ids: Tensor) -> Tensor:
        """What the adapters are applied to at the last of the tokens (1, T), with every adapter at weight one; (D,)."""
        seen: dict[str, Tensor] = {}
        state = RoutingState(torch.ones(len(self.expert_names), device=model.device), "dense")
        state.observer = lambda path, x: seen.update({path: x[0, -1]}) if path == self._module else None
        residual = self.config.reads == "residual"
        with model.slot.bind(state):
            out = model.model.base_model(input_ids=ids, use_cache=False, output_hidden_states=residual)
        return out.hidden_states[self._block][0, -1] if residual else seen[self._module]

    def _shares(self, scores: Tensor) -> Tensor:
        """The best scores, normalised to sum one; equal shares if all are zero."""
        best, index = scores.topk(self._kept)
        total = best.sum()
        shares = best / total if float(total) > 0 else torch.full_like(best, 1.0 / self._kept)
        return torch.zeros_like(scores).scatter(-1, index, shares)
