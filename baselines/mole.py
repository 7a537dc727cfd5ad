"""MoLE: gates that read the output of every expert (Wu et al., arXiv:2404.13628), computed causally.

At the first adapted module of a decoder layer, token by token: ``e_i = s_i B_i A_i x``, ``u = RMSNorm(e_1, ..., e_N)``, ``w = softmax(u
E / tau)``; the weights serve all adapted modules of the layer. ``E`` (N O, N) starts at zero, so the weights start uniform; ``tau`` is
learned as exp(log tau). Loss = answers + ``balance`` * ``-sum_i log q_i`` with q the mean weight of expert i over real tokens and
layers.

Deviations, with reasons: the printed gate flattens over the whole sequence, which lets a token see later tokens and fixes the
length; ours decides per token. The printed expert adds a second residual, so that one expert at weight one would not be that expert; ours
is the LoRA's delta. ``mole_lr`` shares one projection (O, p) over the experts, since E has N^2 O numbers. No official code exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlplora.errors import ConfigError
from dlplora.methods.base import Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.per_thread import PerThread
from dlplora.modules.seeds import derive_seed

from ._gates import TRAINED_NEEDS, TrainedGates, first_modules, key_of, layer_of


@dataclass(frozen=True, kw_only=True, slots=True)
class MoLEConfig:
    """MoLE's settings."""

    balance: float = 0.5
    """Weight of the balancing loss (alpha)."""
    projection: int | None = None
    """Width that every expert's output is projected to before the gate; null takes the outputs as they are."""

    def __post_init__(self) -> None:
        if self.balance < 0 or (self.projection is not None and self.projection < 1):
            raise ConfigError(f"'balance' must not be negative and 'projection' positive, got {self.balance}, {self.projection}.")


class MoLE(TrainedGates):
    """One gate a decoder layer over the experts' own outputs."""

    name = "mole"
    metadata = Metadata(
        title="MoLE (causal)",
        paper="https://arxiv.org/abs/2404.13628",
        granularity="token",
        depth="layer",
        needs=TRAINED_NEEDS,
        trainable=True,
    )
    Config = MoLEConfig

    def build(self, bank: AdapterBank, seed: int) -> None:
        """Zero gates, tau 1, and the shared projections where they are wanted."""
        self.gates, self.log_tau, self.projections = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for layer, module in first_modules(bank, self.name).items():
            width = bank.modules[module].lora_b.shape[1]
            if self.config.projection is not None:
                generator = torch.Generator().manual_seed(derive_seed(self.name, seed, layer))
                self.projections[key_of(layer)] = nn.Parameter(torch.randn(width, self.config.projection, generator=generator) / width**0.5)
                width = self.config.projection
            self.gates[key_of(layer)] = nn.Parameter(torch.zeros(bank.num_experts * width, bank.num_experts))
            self.log_tau[key_of(layer)] = nn.Parameter(torch.zeros(()))

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Keep the experts that the gates look at."""
        self._entries = {module: bank.modules[module] for module in first_modules(bank, self.name).values()}
        self._pass = PerThread(weights=dict)
        self._folded: dict[str, tuple[object, tuple[Tensor, Tensor]]] = {}
        return super().prepare(bank, context)

    def gate(self, module: str, x: Tensor) -> Tensor:
        """The layer's weights; computed at its first module, used by the others in the same forward pass."""
        layer = layer_of(module)
        if module in self._entries:
            weights = self.scores(layer, module, x).softmax(dim=-1)
            self.record(layer, weights)
            self._pass.weights[layer] = weights
        return self._pass.weights[layer]  # type: ignore[no-any-return]

    def scores(self, layer: str, module: str, x: Tensor) -> Tensor:
        """``RMSNorm(e) E / tau`` (B, T, N), computed without ``e`` (B, T, N O), which would need gigabytes in training.

        With ``e_i = C_i l_i``, ``l_i = A_i x`` of size R: ``e E = sum_i l_i (C_i^T E_i)`` and ``|e|^2 = sum_i l_i^T (C_i^T C_i) l_i``.
        """
        low = torch.einsum("bti,eri->bter", x.float(), self._entries[module].lora_a.float())
        gates, grams, width = *self.folded(layer, module), self.gates[key_of(layer)].shape[0]
        squares = torch.einsum("bter,ers,btes->bt", low, grams, low)
        norm = torch.rsqrt(squares / width + 1e-6)
        return (low.flatten(-2) @ gates) * norm[..., None] / self.log_tau[key_of(layer)].exp()

    def folded(self, layer: str, module: str) -> tuple[Tensor, Tensor]:
        """``C_i^T E_i`` of all experts (N R, N) and ``C_i^T C_i`` (N, R, R); kept from call to call where nothing trains."""
        parts = [table[key_of(layer)] for table in (self.gates, self.projections) if key_of(layer) in table]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(part.is_inference() for part in parts):
            return self._fold(module, parts)
        state = [(part.data_ptr(), part._version) for part in parts]
        known = self._folded.get(layer)
        if known is None or known[0] != state:
            known = self._folded[layer] = (state, self._fold(module, parts))
        return known[1]

    def _fold(self, module: str, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        entry, (gates, *projections) = self._entries[module], parts
        up = torch.einsum("eor,e->eor", entry.lora_b.float(), entry.scaling)
        for projection in projections:
            up = torch.einsum("eor,op->epr", up, projection)
        experts, width, _ = up.shape
        by_rank = torch.einsum("epr,epn->ern", up, gates.view(experts, width, experts))
        return by_rank.flatten(0, 1), torch.einsum("epr,eps->ers", up, up)

    def step_statistics(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The experts' shares (N,): the balancing loss is a function of those of the whole step."""
        if self.config.balance == 0.0:
            return None
        _, recorded = self.answer_and_records(batch)
        return batch["token_share"] * mean_shares(list(recorded.values()), batch["attention_mask"])  # type: ignore[no-any-return]

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Answers plus the balancing loss."""
        answers, recorded = self.answer_and_records(batch)
        shares = mean_shares(list(recorded.values()), batch["attention_mask"])
        whole = batch.get("step_statistics")
        if whole is not None:  # its value, and this batch's part of its gradient
            shares = whole + batch["token_share"] * (shares - shares.detach())
        return answers + self.config.balance * balance_of(shares)


def balancing_loss(weights: list[Tensor], mask: Tensor) -> Tensor:
    """``-sum_i log q_i``, smallest (N log N) when all experts share equally.

    Args:
        weights: Routing weights (B, T, N) of every gate.
        mask: Real tokens (B, T).
    """
    return balance_of(mean_shares(weights, mask))


def mean_shares(weights: list[Tensor], mask: Tensor) -> Tensor:
    """Mean weight (N,) of every expert over gates and real tokens; arguments as for ``balancing_loss``."""
    real = mask[..., None].float()
    return torch.stack([(one * real).sum((0, 1)) / real.sum() for one in weights]).mean(dim=0)


def balance_of(shares: Tensor) -> Tensor:
    """The balancing loss of shares (N,)."""
    return -shares.clamp_min(1e-12).log().sum()
