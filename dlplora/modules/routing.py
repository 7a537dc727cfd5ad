"""From probabilities to routing weights: pure functions in float32, shape (..., E)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dlplora.errors import RoutingError

Renormalize = Literal["softmax", "sum", "logits", "none", "uniform"]


def _ranked(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Values and indices in descending order; ties keep the order of experts."""
    return torch.sort(probs, dim=-1, descending=True, stable=True)


def _keep_at_least(mask: Tensor, order: Tensor, min_keep: int) -> Tensor:
    """The mask with the ``min_keep`` best experts added."""
    keep = min(max(1, min_keep), mask.shape[-1])
    return mask.scatter(-1, order[..., :keep], True)


def nucleus_mask(probs: Tensor, top_p: float, min_keep: int = 1) -> Tensor:
    """Experts of the nucleus: the first, and each whose better-ranked experts together hold at most ``top_p``.

    The expert that crosses ``top_p`` is kept, and equality keeps one more, as in the released DLP-LoRA code. ``top_p >= 1`` keeps all.

    Args:
        probs: Probabilities (..., E).
        top_p: Bound on the mass ranked before a kept expert.
        min_keep: Experts kept in any case.

    Returns:
        Boolean mask (..., E).
    """
    values, order = _ranked(probs)
    if top_p >= 1.0:
        return torch.ones_like(probs, dtype=torch.bool)
    before = values.cumsum(dim=-1) - values
    mask = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, before <= top_p)
    return _keep_at_least(mask, order, min_keep)


def threshold_mask(probs: Tensor, threshold: float, min_keep: int = 1) -> Tensor:
    """Experts with probability at least ``threshold``, and the ``min_keep`` best in any case; boolean (..., E)."""
    if min_keep <= 1:  # of equal experts the first one counts as the best, as in a stable sort
        return (probs >= threshold).scatter(-1, probs.argmax(dim=-1, keepdim=True), True)
    _, order = _ranked(probs)
    return _keep_at_least(probs >= threshold, order, min_keep)


def top_k_mask(probs: Tensor, top_k: int) -> Tensor:
    """The ``top_k`` best experts; ties go to the smaller index; boolean (..., E)."""
    if not 1 <= top_k <= probs.shape[-1]:
        raise RoutingError(f"top_k must be between 1 and the number of experts ({probs.shape[-1]}), got {top_k}.")
    _, order = _ranked(probs)
    return torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order[..., :top_k], True)


def renormalize(probs: Tensor, mask: Tensor, how: Renormalize, logits: Tensor | None = None) -> Tensor:
    """Routing weights of the kept experts; zero elsewhere.

    Args:
        probs: Probabilities (..., E).
        mask: Kept experts (..., E).
        how: ``softmax`` of the kept probabilities (paper and released code of DLP-LoRA), ``sum`` divides by the kept mass,
            ``logits`` is the softmax of the kept logits, ``none`` keeps the probabilities, ``uniform`` shares equally.
        logits: Needed for ``logits``.

    Returns:
        Weights (..., E), float32.

    Raises:
        RoutingError: If ``how`` is unknown, or ``logits`` are missing.
    """
    probs = probs.float()
    if how == "softmax":
        return probs.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    if how == "sum":
        kept = probs * mask
        return kept / kept.sum(dim=-1, keepdim=True)
    if how == "logits":
        if logits is None:
            raise RoutingError("renormalize='logits' needs the router's logits.")
        return logits.float().masked_fill(~mask, -torch.inf).softmax(dim=-1)
    if how == "none":
        return probs * mask
    if how == "uniform":
        return mask.float() / mask.sum(dim=-1, keepdim=True)
    raise RoutingError(f"renormalize must be softmax, sum, logits, none or uniform, got '{how}'.")


def num_kept(weights: Tensor) -> Tensor:
    """Experts with a non-zero weight, int64 (...)."""
    return (weights != 0).sum(dim=-1)


def entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of non-negative weights, normalised to sum 1 first; zero weights count as zero; (...)."""
    share = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    return -(share * share.clamp_min(1e-30).log()).sum(dim=-1)
