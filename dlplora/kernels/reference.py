"""The definition of the fused delta: a loop over experts. Slow; all other backends are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor


def per_token(weights: Tensor) -> Tensor:
    """Routing weights (E,), (B, E) or (B, T, E) as a tensor that broadcasts to (B, T, E)."""
    if weights.ndim == 1:
        return weights[None, None, :]
    if weights.ndim == 2:
        return weights[:, None, :]
    return weights


def fused_delta(x: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor) -> Tensor:
    """Sum of the experts' deltas, ``sum_e w_e * B_e A_e x``.

    Args:
        x: Layer input (B, T, I).
        lora_a: Down projections (E, R, I).
        lora_b: Up projections (E, O, R).
        weights: Routing weight times scaling of each expert: (E,), (B, E) or (B, T, E); of its single ranks: (B, T, E, R).

    Returns:
        The delta (B, T, O) in the dtype of ``x``; accumulated in float32, or in float64 if the inputs are.

    Source: DLP-LoRA, arXiv:2410.01497, output fusion.
    """
    dtype = torch.float64 if torch.float64 in (x.dtype, lora_a.dtype) else torch.float32
    w = per_token(weights.to(dtype))
    total = torch.zeros((*x.shape[:-1], lora_b.shape[1]), dtype=dtype, device=x.device)
    for expert in range(lora_a.shape[0]):
        low = x.to(dtype) @ lora_a[expert].to(dtype).T
        if w.ndim == 4:
            total = total + (w[..., expert, :] * low) @ lora_b[expert].to(dtype).T
        else:
            total = total + w[..., expert : expert + 1] * (low @ lora_b[expert].to(dtype).T)
    return total.to(x.dtype)
