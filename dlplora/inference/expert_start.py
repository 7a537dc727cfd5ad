"""Routing weights that apply only from some token of the prompt on: the best result of a router that needs that much of the prompt.

The weights of token t may depend on tokens up to t only, so a token-level router cannot know the task before the prompt shows it. Here the
right weights are given, but not applied to the tokens before ``start``; those use the base model, or the mean of all experts.

The first forward pass of a request reads the prompt, later ones read the answer. The last token of a prompt predicts the first token of the
answer. Shapes: B rows, T tokens, I inputs, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dlplora.errors import ConfigError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.modules.per_thread import PerThread, nothing


@dataclass(frozen=True, kw_only=True)
class ExpertStart:
    """The token from which on the routing weights apply, and what applies before it."""

    start: float | Literal["last_token", "answer"] = 0.0
    """A share s: from token ``floor(s * n)`` of a prompt of n tokens on; ``last_token``: its last token and the answer; ``answer``: the
    answer's tokens alone, so that the first of them is predicted without the expert."""
    elsewhere: Literal["base", "mean"] = "base"
    """What other tokens are processed under: no expert, or the uniform average of all."""
    without_first_layer: bool = False
    """Whether the first decoder layer is never given the weights: a gate there reads a bare token."""

    def __post_init__(self) -> None:
        if not isinstance(self.start, str) and not 0.0 <= self.start < 1.0:
            raise ConfigError(f"'start' must be a share of at least 0 and below 1, last_token or answer, got {self.start}.")

    def holds(self, mask: Tensor) -> Tensor:
        """Where in a prompt the weights apply.

        Args:
            mask: True for real tokens, padding on either side, (B, T).

        Returns:
            Boolean (B, T).
        """
        counts = mask.sum(dim=1, keepdim=True)
        if self.start == "answer":
            first = counts
        elif self.start == "last_token":
            first = counts - 1
        else:
            first = (counts * float(self.start)).floor().long()
        return mask & (mask.long().cumsum(dim=1) - 1 >= first)


@contextmanager
def expert_start(fused: FusedCausalLM, setting: ExpertStart) -> Iterator[None]:
    """Apply all routing weights of a model according to ``setting`` inside the block, with the dense backend.

    Raises:
        ConfigError: If gates decide in the model's layers, or they weigh single ranks already.
    """
    layers = fused.patched.layers
    if fused.request_router.is_gated or any(layer.rank_gate is not None for layer in layers.values()):
        raise ConfigError(f"method '{fused.method.name}' has gates of its own; give a method that routes prompts.")
    running = PerThread(holds=nothing)
    weighed, fused.request_router.weighs_parts = fused.request_router.weighs_parts, True
    hook = fused.model.register_forward_pre_hook(partial(_note, setting, running), with_kwargs=True)
    first = next(iter(layers)).split(".layers.0.")[0] + ".layers.0."
    for path, layer in layers.items():
        never = setting.without_first_layer and path.startswith(first)
        layer.rank_gate = partial(_switched, setting, running, layer.lora_a.shape[1], never)
    try:
        yield
    finally:
        hook.remove()
        fused.request_router.weighs_parts = weighed
        for layer in layers.values():
            layer.rank_gate = None


def _note(setting: ExpertStart, running: PerThread, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Determine, before a forward pass, to which of its tokens the weights apply."""
    ids = args[0] if args else kwargs["input_ids"]
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    read = 0 if cache is None else int(cache.get_seq_length())
    if read:
        running.holds = torch.ones_like(ids, dtype=torch.bool)
        return
    running.holds = setting.holds(torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :] != 0)


def _switched(setting: ExpertStart, running: PerThread, ranks: int, never: bool, x: Tensor, weights: Tensor) -> Tensor:
    """Weights (B, T, E, R) of the layer's ranks, from weights (B or 1, T or 1, E)."""
    holds = torch.zeros_like(running.holds) if never else running.holds
    other = 1.0 / weights.shape[-1] if setting.elsewhere == "mean" else 0.0
    chosen = torch.where(holds[..., None], weights, torch.full_like(weights, other))
    return chosen[..., None].expand(*chosen.shape, ranks)
