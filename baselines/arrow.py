"""Training-free token routers that read the experts' own weights: Arrow, SpectR and LAG. Shapes: E experts, R rank, I inputs, O outputs.

* Arrow (Ostapenko et al., arXiv:2405.11157): the prototype of an expert at a layer is the top right-singular vector ``v_e`` of its
  ``B_e A_e``; the score of a token is ``|v_e . x|``, its sign being arbitrary; softmax over the ``top_k`` scores. ``arrow_out`` sums
  deltas, as PEFT's ``create_arrow_model`` does; ``arrow_factor`` sums A and B apart, as the authors' code (``lora_merge_after=False``).
* SpectR (arXiv:2504.03454): the score is the length of the expert's answer, ``|s_e B_e A_e x|``.
* LAG (arXiv:2507.05346): Arrow makes a shortlist, SpectR ranks it again.

Deviations, with reasons: the prototypes come from an exact singular value decomposition (PEFT iterates 15 times). SpectR's score
includes the adapter's scaling: what the layer would add, not what it would add without its alpha. ``shortlist`` and ``top_k`` of LAG
are ours; only the abstract was at hand. Scores are
not divided by the length of x, so the effective temperature differs from layer to layer, as in the original.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines._gates import TokenGated, require_at_most, top_k_softmax
from dlplora.errors import ConfigError
from dlplora.methods.base import Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank, BankEntry

ARROW_PAPER = "https://arxiv.org/abs/2405.11157"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """How scores become weights."""

    top_k: int = 3
    """Experts kept at a token; 3 is PEFT's default."""
    temperature: float = 1.0
    """Divides the scores before the softmax."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"'temperature' must be positive, got {self.temperature}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LagConfig(ScoreConfig):
    """The same with a shortlist before it."""

    top_k: int = 2
    shortlist: int = 3
    """Experts that Arrow hands on."""


def prototypes(entry: BankEntry) -> Tensor:
    """Top right-singular vectors of ``B_e A_e``, unit length, float32 (E, I); zero for an expert that does not adapt the layer.

    With ``A^T = Q L``, the singular vectors of the small ``B L^T`` turned by Q are those of ``B A``.
    """
    q, small = torch.linalg.qr(entry.lora_a.double().mT)
    _, _, vt = torch.linalg.svd(entry.lora_b.double() @ small.mT, full_matrices=False)
    found = (q @ vt[:, 0, :, None])[..., 0]
    adapted = torch.tensor([rank > 0 for rank in entry.ranks], device=found.device)
    return (found * adapted[:, None]).float()


class Arrow(TokenGated):
    """Prototypes against the layer's input; deltas are summed."""

    name = "arrow_out"
    metadata = Metadata(title="Arrow (deltas)", paper=ARROW_PAPER, granularity="token", depth="module")
    Config = ScoreConfig

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Compute the prototypes of every layer."""
        require_at_most(self.config.top_k, bank.num_experts, self.name)
        self._prototypes = {module: prototypes(entry) for module, entry in bank.modules.items()}
        return super().prepare(bank, context)

    def gate(self, module: str, x: Tensor) -> Tensor:
        """Softmax over the largest ``|v_e . x|``."""
        scores = (x.float() @ self._prototypes[module].mT).abs()
        return top_k_softmax(scores, self.config.top_k, self.config.temperature)


class ArrowFactor(Arrow):
    """The same weights on A and B apart."""

    name = "arrow_factor"
    metadata = Metadata(title="Arrow (factors)", paper=ARROW_PAPER, granularity="token", depth="module", combine="factor")

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Check that the factors can be summed."""
        bank.require_equal_ranks(self.name)
        return super().prepare(bank, context)


def response_norms(x: Tensor, entry: BankEntry, gram: Tensor) -> Tensor:
    """``|s_e B_e A_e x|`` for every token without building ``B_e A_e x``; float32 (B, T, E).

    Args:
        x: (B, T, I).
        entry: The experts of the layer.
        gram: ``B_e^T B_e``, float32 (E, R, R).
    """
    low = torch.einsum("bti,eri->bter", x.float(), entry.lora_a.float())
    squared = torch.einsum("bter,ers,btes->bte", low, gram, low).clamp_min(0.0)
    return squared.sqrt() * entry.scaling


class SpectR(TokenGated):
    """The expert that answers loudest speaks."""

    name = "spectr"
    metadata = Metadata(title="SpectR", paper="https://arxiv.org/abs/2504.03454", granularity="token", depth="module")
    Config = ScoreConfig

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Compute the Gram matrix of every B."""
        require_at_most(self.config.top_k, bank.num_experts, self.name)
        self._entries = dict(bank.modules)
        self._grams = {module: entry.lora_b.float().mT @ entry.lora_b.float() for module, entry in bank.modules.items()}
        return super().prepare(bank, context)

    def gate(self, module: str, x: Tensor) -> Tensor:
        """Softmax over the largest answers."""
        scores = response_norms(x, self._entries[module], self._grams[module])
        return top_k_softmax(scores, self.config.top_k, self.config.temperature)


class Lag(SpectR):
    """Arrow's shortlist, ranked by SpectR."""

    name = "lag"
    metadata = Metadata(title="LAG", paper="https://arxiv.org/abs/2507.05346", granularity="token", depth="module")
    Config = LagConfig

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Prototypes as well."""
        require_at_most(self.config.shortlist, bank.num_experts, self.name, "shortlist")
        require_at_most(self.config.top_k, self.config.shortlist, self.name)
        self._prototypes = {module: prototypes(entry) for module, entry in bank.modules.items()}
        return super().prepare(bank, context)

    def gate(self, module: str, x: Tensor) -> Tensor:
        """SpectR's weights over the experts that Arrow likes best."""
        liked = (x.float() @ self._prototypes[module].mT).abs().topk(self.config.shortlist, dim=-1).indices
        norms = response_norms(x, self._entries[module], self._grams[module])
        listed = torch.full_like(norms, -torch.inf).scatter(-1, liked, norms.gather(-1, liked))
        return top_k_softmax(listed, self.config.top_k, self.config.temperature)
