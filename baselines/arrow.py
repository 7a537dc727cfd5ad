"""Training-free token routers that read the experts' own weights: Arrow, SpectR and LAG. Shapes: E experts, R rank, I inputs, O outputs.

* Arrow (Ostapenko et al., arXiv:2405.11157): the prototype of an expert at a layer is the top right-singular vector ``v_e`` of its
  ``B_e A_e``; the score of a token is ``|v_e . x|`` (the sign of ``v_e`` is arbitrary); softmax over the ``top_k`` scores. ``arrow_out``
  sums deltas, as PEFT's ``create_arrow_model`` does; ``arrow_factor`` sums A and B separately, as the authors' code
  (``lora_merge_after=False``).
* SpectR (arXiv:2504.03454): the score is ``|V_e^T x|`` with ``B_e A_e = U_e S_e V_e^T``, the length of the token's projection on the
  expert's row space (equation 7 of the next paper, by the same authors).
* LAG (arXiv:2507.05346): Arrow makes a shortlist, SpectR ranks it, and only the best expert is used, with weight one.

Deviations, with reasons: prototypes and V come from an exact singular value decomposition (PEFT iterates 15 times); directions with
singular value zero (of an expert with a lower rank than others, for instance) do not count. ``score: response`` is ours: the length of the
expert's output, ``|s_e B_e A_e x|``, which depends on singular values and scaling. How many experts SpectR keeps, and LAG's
shortlist (printed: by memory and time), are ours. LAG's two libraries, tasks and knowledge, are one pool. Scores are not divided by the
length of x, so the effective temperature differs from layer to layer, as in the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dlplora.errors import ConfigError
from dlplora.methods.base import Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank, BankEntry

from ._gates import TokenGated, kept_of, require_at_most, top_k_softmax

ARROW_PAPER = "https://arxiv.org/abs/2405.11157"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """How scores become weights."""

    top_k: int = 3
    """Experts kept at a token, all of them if the pool holds fewer; 3 is PEFT's default."""
    temperature: float = 1.0
    """Divides the scores before the softmax."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"'temperature' must be positive, got {self.temperature}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectrConfig(ScoreConfig):
    """What is taken of the whole spectrum."""

    score: Literal["projection", "response"] = "projection"
    """``projection``: the length of x within the row space of an expert, as printed; ``response``: of the expert's answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LagConfig(SpectrConfig):
    """The same with a shortlist before it."""

    top_k: int = 1
    shortlist: int = 3
    """Experts that Arrow hands on, all of them if the pool holds fewer."""


def directions(entry: BankEntry) -> Tensor:
    """Right-singular vectors of ``B_e A_e``, largest first, float32 (E, R, I); zero where there is no singular value.

    With ``A^T = Q L``, the singular vectors of the small ``B L^T`` turned by Q are those of ``B A``.
    """
    q, small = torch.linalg.qr(entry.lora_a.double().mT)
    _, values, vt = torch.linalg.svd(entry.lora_b.double() @ small.mT, full_matrices=False)
    # A is stored in 32 bits or fewer: what is smaller than that, relative to the largest, is nothing.
    real = values > values[:, :1] * torch.finfo(torch.float32).eps
    return ((q @ vt.mT).mT * real[..., None]).float()


def prototypes(entry: BankEntry) -> Tensor:
    """Top right-singular vectors of ``B_e A_e``, unit length, float32 (E, I); zero for an expert that does not adapt the layer."""
    return directions(entry)[:, 0].contiguous()


def projection_norms(x: Tensor, vectors: Tensor) -> Tensor:
    """``|V_e^T x|`` for every token, float32 (B, T, E).

    Args:
        x: (B, T, I).
        vectors: ``V_e^T``, float32 (E, R, I).
    """
    return (x.float() @ vectors.flatten(0, 1).mT).unflatten(-1, vectors.shape[:2]).norm(dim=-1)


class Arrow(TokenGated):
    """Prototypes against the layer's input; deltas are summed."""

    name = "arrow_out"
    metadata = Metadata(title="Arrow (deltas)", paper=ARROW_PAPER, granularity="token", depth="module")
    Config = ScoreConfig

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Compute the prototypes of every layer."""
        self._kept = kept_of(self.config.top_k, bank.num_experts, self.name)
        self._prototypes = {module: prototypes(entry) for module, entry in bank.modules.items()}
        return super().prepare(bank, context)

    def gate(self, module: str, x: Tensor) -> Tensor:
        """Softmax over the largest ``|v_e . x|``."""
        scores = (x.float() @ self._prototypes[module].mT).abs()
        return top_k_softmax(scores, self._kept, self.config.temperature)


class ArrowFactor(Arrow):
    """The same weights on A and B separately."""

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
    """Routing to the experts with the largest part of a token in their row spaces."""

    name = "spectr"
    metadata = Metadata(title="SpectR", paper="https://arxiv.org/abs/2504.03454", granularity="token", depth="module")
    Config = SpectrConfig

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Compute the singular vectors of every expert, or the Gram matrix of every B."""
        self._kept = kept_of(self.config.top_k, bank.num_experts, self.name)
        self._entries = dict(bank.modules)
        if self.config.score == "projection":
            self._spectra = {module: directions(entry) for module, entry in bank.modules.items()}
        else:
            self._spectra = {module: entry.lora_b.float().mT @ entry.lora_b.float() for module, entry in bank.modules.items()}
        return super().prepare(bank, context)

    def scores(self, module: str, x: Tensor) -> Tensor:
        """Score of every expert at every token, float32 (B, T, E)."""
        if self.config.score == "projection":
            return projection_norms(x, self._spectra[module])
        return response_norms(x, self._entries[module], self._spectra[module])

    def gate(self, module: str, x: Tensor) -> Tensor:
        """Softmax over the largest scores."""
        return top_k_softmax(self.scores(module, x), self._kept, self.config.temperature)


class Lag(SpectR):
    """Arrow's shortlist, ranked by SpectR."""

    name = "lag"
    metadata = Metadata(title="LAG", paper="https://arxiv.org/abs/2507.05346", granularity="token", depth="module")
    Config = LagConfig

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Prototypes as well."""
        self._listed = kept_of(self.config.shortlist, bank.num_experts, self.name, "shortlist")
        require_at_most(self.config.top_k, self.config.shortlist, self.name)
        prepared = super().prepare(bank, context)
        if self.config.score == "projection":  # a spectrum begins with its prototype
            self._prototypes = {module: spectrum[:, 0].contiguous() for module, spectrum in self._spectra.items()}
        else:
            self._prototypes = {module: prototypes(entry) for module, entry in bank.modules.items()}
        return prepared

    def gate(self, module: str, x: Tensor) -> Tensor:
        """SpectR's weights over the experts that Arrow likes best."""
        liked = (x.float() @ self._prototypes[module].mT).abs().topk(self._listed, dim=-1).indices
        scores = self.scores(module, x)
        listed = torch.full_like(scores, -torch.inf).scatter(-1, liked, scores.gather(-1, liked))
        return top_k_softmax(listed, self._kept, self.config.temperature)
