"""Factor fusion: A and B are summed separately, ``(sum_e w_e s_e B_e) (sum_e w_e A_e) x``, which is quadratic in the weights."""

from __future__ import annotations

from torch import Tensor

from dlplora.kernels.reference import per_token


def fused_delta(x: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor, scaling: Tensor) -> Tensor:
    """Delta of the fused factors; the summed A and B are never built, so weights may differ at every token.

    An expert's scaling multiplies its B, so one expert at weight one is exactly that expert, independent of the others' alpha.

    Args:
        x: Layer input (B, T, I); cast to the dtype of ``lora_a`` for the computation.
        lora_a: (E, R, I). lora_b: (E, O, R). All experts have the same rank.
        weights: Routing weights without scaling: (E,), (B, E) or (B, T, E).
        scaling: (E,).

    Returns:
        The delta (B, T, O) in the dtype of ``x``.

    Source: the state-dict arithmetic of LoRAHub, and Arrow with ``lora_merge_after=False``.
    """
    experts, rank, _ = lora_a.shape
    low = (x.to(lora_a.dtype) @ lora_a.reshape(experts * rank, -1).T).unflatten(-1, (experts, rank))
    shares = per_token(weights)
    mixed = (low * shares.to(low.dtype).unsqueeze(-1)).sum(-2, keepdim=True)
    spread = (mixed * (shares * scaling).to(low.dtype).unsqueeze(-1)).flatten(-2)
    return (spread @ lora_b.mT.reshape(experts * rank, -1)).to(x.dtype)
