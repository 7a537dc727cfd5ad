"""DLP-LoRA with a sparse softmax in place of a selector: no threshold, no top-k, no second softmax. Shapes: B rows, E experts.

The routing weights are the alpha-entmax of the router's calibrated logits z, ``argmax_w w.z + H_alpha(w)`` over the simplex:
``w_e = [(alpha - 1) z_e - tau]_+ ^ (1 / (alpha - 1))`` with tau chosen so that they sum to one. Experts with much smaller logits get
exactly zero. ``alpha`` 1.5 is the usual choice, 2 is sparsemax, and 1 would be the softmax, which keeps all experts. ``sparsity`` is the
lambda of sparsegen: z is divided by ``1 - lambda``, so a larger value keeps fewer experts.

Sources: alpha-entmax, Peters et al., arXiv:1905.05702; sparsemax, Martins and Astudillo, arXiv:1602.02068; sparsegen, Laha et al.,
arXiv:1810.11975; router and re-routing: DLP-LoRA, arXiv:2410.01497. tau is found by bisection in float64: the weights are a
decreasing function of it, and after 60 halvings the interval is at the resolution of float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dlplora.errors import ConfigError
from dlplora.methods.base import WeightSum
from dlplora.methods.dlp import DLP

HALVINGS = 60


def entmax(logits: Tensor, alpha: float) -> Tensor:
    """alpha-entmax over the last dimension, float32 (..., E); exact zeros.

    Args:
        logits: (..., E), finite.
        alpha: Larger than 1.
    """
    scores = logits.double() * (alpha - 1.0)
    best = scores.amax(dim=-1, keepdim=True)
    # At best - 1 the largest entry alone has weight one; at best - E^(1 - alpha) no entry has more than 1 / E.
    low, high = best - 1.0, best - scores.shape[-1] ** (1.0 - alpha)
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        enough = _powered(scores - middle, alpha).sum(dim=-1, keepdim=True) >= 1.0
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    weights = _powered(scores - low, alpha)
    return (weights / weights.sum(dim=-1, keepdim=True)).float()


def _powered(excess: Tensor, alpha: float) -> Tensor:
    return excess.clamp_min(0.0) ** (1.0 / (alpha - 1.0))


class DLPEntmax(DLP):
    """The router's logits become sparse weights in one step."""

    name = "dlp_entmax"
    metadata = replace(DLP.metadata, title="DLP-LoRA, entmax")

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        """What is left to choose; when and what the router reads is as in ``dlp``."""

        alpha: float = 1.5
        """Exponent of the entmax; 2 is sparsemax."""
        sparsity: float = 0.0
        """Lambda of sparsegen, less than 1; 0 leaves the logits as they are."""
        reroute: Literal["prompt", "sentence"] = "sentence"
        """When to route: once for the prompt, or again after every generated sentence."""
        view: Literal["tail", "window", "whole", "segment"] = "tail"
        """What the router reads at a sentence end."""
        prompt_routing: Literal["whole", "question", "sentence"] = "whole"
        """With ``reroute: sentence``: one set of routing weights for the prompt, or one for each of its questions or sentences."""
        kv_policy: Literal["stale", "recompute", "prompt_frozen"] = "stale"
        """With ``reroute: sentence``: what happens to cached keys and values after a re-route."""
        router: str | None = None
        """Folder of a trained router; None takes the one that came with the pool (the artifact ``router``)."""

        def __post_init__(self) -> None:
            if not self.alpha > 1.0:
                raise ConfigError(f"'alpha' must be larger than 1, got {self.alpha}; 1 would be the softmax, which drops no adapter.")
            if not self.sparsity < 1.0:
                raise ConfigError(f"'sparsity' must be less than 1, got {self.sparsity}.")

    config: Config  # type: ignore[assignment]
    scope_mode = "off"  # type: ignore[assignment]

    @property
    def weight_sum(self) -> WeightSum:
        """One."""
        return "one"

    @property
    def max_kept(self) -> None:  # type: ignore[override]
        """All experts, where the router has no favourite."""
        return None

    @classmethod
    def upgrade_params(cls, params: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
        """No parameter was renamed."""
        return dict(params)

    @classmethod
    def hashed_params(cls, config: Any) -> dict[str, Any]:
        """As they are."""
        return cls.recorded_params(config)

    def select(self, probs: Tensor) -> Tensor:
        """Experts with a weight, (B, E); the logarithm of calibrated probabilities serves as logits."""
        return self.weigh(probs, probs.clamp_min(torch.finfo(torch.float32).tiny).log()) > 0

    def weigh(self, probs: Tensor, logits: Tensor) -> Tensor:
        """Sparse weights (B, E) of the logits (B, E), float32."""
        return entmax(logits / (1.0 - self.config.sparsity), self.config.alpha)
