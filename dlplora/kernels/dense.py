"""All experts at once: two matrix products, for routing weights of any granularity."""

from __future__ import annotations

from torch import Tensor

from dlplora.kernels.reference import per_token


def fused_delta(x: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor) -> Tensor:
    """Same operation as ``reference.fused_delta``; weights are applied in rank space, so no (B, T, E, O) tensor is built.

    Args:
        x: Layer input (B, T, I); cast to the dtype of ``lora_a`` for the computation.
        lora_a: (E, R, I). lora_b: (E, O, R).
        weights: Routing weight times scaling: (E,), (B, E) or (B, T, E); of single ranks (B, T, E, R).

    Returns:
        The delta (B, T, O) in the dtype of ``x``.
    """
    experts, rank, _ = lora_a.shape
    low = x.to(lora_a.dtype) @ lora_a.reshape(experts * rank, -1).T
    by_rank = weights if weights.ndim == 4 else per_token(weights).unsqueeze(-1)
    low = low.unflatten(-1, (experts, rank)) * by_rank.to(low.dtype)
    # A view, not a copy, if B is stored by rank as the bank stores it.
    up = lora_b.mT.reshape(experts * rank, -1)
    return (low.flatten(-2) @ up).to(x.dtype)
