"""Select the tokens of a prompt that a router reads, and pool their features to one vector per row. Shapes: B rows, T tokens, D
features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def select_tokens(attention_mask: Tensor, max_tokens: int) -> Tensor:
    """Which real tokens are read: all, or the first and the last half of ``max_tokens`` of a longer row.

    Positions are counted over real tokens, so the answer depends neither on the side nor on the amount of padding.

    Args:
        attention_mask: (B, T), non-zero for real tokens.
        max_tokens: Most tokens kept in a row.

    Returns:
        Boolean mask (B, T).
    """
    real = attention_mask != 0
    if attention_mask.shape[1] <= max_tokens:
        return real
    position = real.long().cumsum(dim=1) - 1
    length = real.sum(dim=1, keepdim=True)
    head = (max_tokens + 1) // 2
    tail = max_tokens - head
    in_window = (length <= max_tokens) | (position < head) | (position >= length - tail)
    return real & in_window


def mean_of_rows(features: Tensor, lengths: Tensor, places: Tensor | None = None) -> Tensor:
    """Mean token feature of each row of a packed list.

    Padding is absent rather than multiplied by zero and every row is summed on its own, in token order, so neither the
    padding nor the other rows can change the last bit of the result.

    Args:
        features: Features of all real tokens of all rows, one after another, (sum of lengths, D).
        lengths: Number of tokens of each row, int64 (B,), all positive.
        places: Which of ``features`` each token has, int64 (sum of lengths,), if equal tokens share them; None: one each.

    Returns:
        (B, D).
    """
    places = torch.arange(features.shape[0], device=features.device) if places is None else places
    return F.embedding_bag(places, features, lengths.cumsum(0) - lengths, mode="mean")


def max_of_rows(features: Tensor, lengths: Tensor, places: Tensor | None = None) -> Tensor:
    """Largest value of each feature over the tokens of each row of a packed list; arguments and shape as ``mean_of_rows``."""
    if places is not None and features.device.type == "cpu" and not torch.is_grad_enabled():
        # One reduction per row takes less than half the time of a bag, which also records where each maximum was.
        return torch.stack([features.index_select(0, row).amax(dim=0) for row in places.split(lengths.tolist())])
    if places is not None:
        return F.embedding_bag(places, features, lengths.cumsum(0) - lengths, mode="max")
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=features.device), lengths)
    start = features.new_full((len(lengths), features.shape[1]), -torch.inf)
    return start.scatter_reduce(0, rows[:, None].expand_as(features), features, "amax")
