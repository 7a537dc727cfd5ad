"""HiLoRA: adapters are chosen per prompt by likelihood, single ranks per token (arXiv:2510.12266).

* Prompt: every adapter has a Gaussian over the encodings of a few training inputs. The most likely adapters, at least ``least``, share a
  budget of rank-one components (the fraction ``budget`` of all their components) by a multinomial draw with their posterior probabilities.
* Token: at every module an adapter with ``n`` components uses those with the largest ``|a_j . x| / |a_j|``, at weight one.

``route`` returns the fraction of its components that an adapter may use; ``FusedLinear.rank_gate`` chooses them. An adapter that may use
all of them is exactly that adapter at weight one, bit for bit. No training.

Abstract and reviews only (20 inputs, at least 3 adapters, 40 %, multinomial, normalised). Ours: spherical Gaussians; the posterior is the
softmax of the mean log-likelihood of a feature divided by ``temperature``, since the sum over hundreds of features makes the posterior
one-hot; ``mass``, the posterior mass up to which adapters are taken; the budget counts the components of the chosen adapters; what an
adapter cannot use is given to the next one; the draw is a function of seed and prompt, so that all options of one question get the
same draw; the encoder.

Shapes: B rows, T tokens, E experts, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dlplora.errors import ConfigError
from dlplora.methods.base import FusedModel, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.seeds import derive_seed
from dlplora.types import PromptBatch

from ._encoders import LearnsFromEncodings


@dataclass(frozen=True, kw_only=True, slots=True)
class HiLoRAConfig:
    """HiLoRA's settings."""

    encoder: str = "minilm"
    """``minilm``, ``features``, ``router``, or a sentence-transformers model (``_encoders.py``)."""
    num_samples: int = 20
    """Training inputs of an adapter."""
    least: int = 3
    """Adapters chosen at least; all of them if the pool holds fewer."""
    mass: float = 0.9
    """Posterior probability that the chosen adapters hold together, if more than ``least`` are needed for it."""
    budget: float = 0.4
    """Part of the chosen adapters' rank-one components that is used."""
    temperature: float = 0.1
    """Divides the mean log-likelihood of a feature."""

    def __post_init__(self) -> None:
        if self.num_samples < 2 or self.least < 1:
            raise ConfigError(f"'num_samples' must be at least 2 and 'least' at least 1, got {self.num_samples}, {self.least}.")
        if not 0 < self.budget <= 1 or not 0 <= self.mass <= 1 or not self.temperature > 0:
            raise ConfigError(
                f"'budget' and 'mass' must be between 0 and 1 and 'temperature' must be positive, got {self.budget}, {self.mass}, "
                f"{self.temperature}."
            )


class HiLoRA(LearnsFromEncodings):
    """Parts of adapters for a prompt, ranks for a token."""

    name = "hilora"
    metadata = Metadata(
        title="HiLoRA",
        paper="https://arxiv.org/abs/2510.12266",
        granularity="prompt",
        depth="module",
        needs=("inputs",),
        weight_sum="any",
        exempt=("T3", "T12"),  # a weight counts components, which are used or not
    )
    Config = HiLoRAConfig
    learned = ("means", "variances")
    means: Tensor
    variances: Tensor

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Note ranks and lengths of the components."""
        self._seed = context.seed
        self._ranks = {name: max(entry.ranks[index] for entry in bank.modules.values()) for index, name in enumerate(bank.names)}
        self._own_ranks = {module: torch.tensor(entry.ranks, device=entry.lora_a.device) for module, entry in bank.modules.items()}
        self._components = {module: entry.lora_a.float() for module, entry in bank.modules.items()}
        return super().prepare(bank, context)

    def learn(self, prompts: Mapping[str, list[str]], context: MethodContext) -> dict[str, Tensor]:
        """A spherical Gaussian of every adapter: mean (E, D), variance of a feature (E,)."""
        encoded = [self._encoder.texts(texts).double() for texts in prompts.values()]
        means = torch.stack([rows.mean(dim=0) for rows in encoded])
        spread = torch.stack([(rows - mean).square().mean() for rows, mean in zip(encoded, means, strict=True)])
        return {"means": means.float(), "variances": spread.clamp_min(1e-6).float()}

    def attach(self, model: FusedModel) -> None:
        """Choose ranks in every layer."""
        for module, layer in model.patched.layers.items():
            layer.rank_gate = partial(self.rank_weights, module)

    def posteriors(self, prompts: PromptBatch) -> Tensor:
        """Probabilities (B, E), float64, that a prompt belongs to each adapter's inputs."""
        distances = (self.encoded(prompts).double()[:, None] - self.means.double()).square().mean(dim=-1)
        variances = self.variances.double()
        return (-(variances.log() + distances / variances) / (2 * self.config.temperature)).softmax(dim=-1)

    def route(self, prompts: PromptBatch) -> Tensor:
        """Parts (B, E) of the adapters' components, between 0 and 1."""
        order = sorted(range(len(self.expert_names)), key=lambda index: self.expert_names[index])  # independent of the pool's order
        ranks = np.array([self._ranks[self.expert_names[index]] for index in order])
        rows = []
        for shares, ids, mask in zip(self.posteriors(prompts).cpu().numpy(), prompts.input_ids, prompts.attention_mask, strict=True):
            seed = derive_seed(self.name, self._seed, *ids[mask.bool()].tolist())
            counts = self.allocate(shares[order], ranks, np.random.default_rng(seed))
            row = np.zeros(len(order), dtype=np.float32)
            row[order] = counts / np.maximum(ranks, 1)
            rows.append(torch.from_numpy(row))
        return torch.stack(rows).to(prompts.input_ids.device)

    def allocate(self, shares: np.ndarray, ranks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Components of each adapter (E,), from posterior probabilities and ranks (E,)."""
        ranked = np.argsort(-shares, kind="stable")
        enough = int(np.searchsorted(np.cumsum(shares[ranked]), self.config.mass)) + 1
        chosen = ranked[: max(self.config.least, enough)]
        budget = max(1, round(self.config.budget * int(ranks[chosen].sum())))
        drawn = np.zeros_like(ranks)
        drawn[chosen] = generator.multinomial(budget, shares[chosen] / shares[chosen].sum())
        counts = np.minimum(drawn, ranks)
        for index in chosen:  # the most likely first
            counts[index] += min(ranks[index] - counts[index], budget - counts.sum())
        return counts

    def rank_weights(self, module: str, x: Tensor, weights: Tensor) -> Tensor:
        """One for the components that a token uses, zero for the others (B, T, E, R).

        Args:
            module: Path of the layer in the base model.
            x: Its input (B, T, I).
            weights: Parts, broadcastable to (B, T, E).
        """
        components = self._components[module]
        lengths = components.norm(dim=-1)
        scores = (x.float() @ components.flatten(0, 1).mT).unflatten(-1, lengths.shape).abs() / lengths.clamp_min(1e-12)
        scores = scores.masked_fill(lengths == 0, -1.0)  # padding up to the largest rank of the pool comes last
        counts = (weights * self._own_ranks[module]).round()
        places = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return (places < counts[..., None]).to(torch.float32)
