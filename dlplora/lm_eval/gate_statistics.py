"""Statistics of the gates inside the layers while prompts are read. One observer serves all methods; without one nothing is computed.

Inside a block the fused layers report the outputs of their gates in this thread, and they are added up. Only tokens of prompts count, not
padding, continuations or generated tokens. Shapes: B rows, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlplora.lm_eval.requests import Prompt
from dlplora.lm_eval.routing_statistics import RoutingStatistics
from dlplora.modules.fused_linear import GATE_OBSERVER, FusedLinear


@dataclass
class GateSums:
    """Sums over the counted tokens of each row and over the gates; every tensor is float32 and stays on the device.

    Args:
        mask: 1 for tokens that count (B, T).
        weights: Routing weights (B, E).
        sizes: Their absolute values (B, E).
        kept: Weights that are not zero (B,).
        several: Tokens with more than one of those (B,).
        entropy_nats: Entropy of |weights| / sum |weights| (B,).
        num_gates: Gates added up so far.
    """

    mask: Tensor
    weights: Tensor
    sizes: Tensor
    kept: Tensor
    several: Tensor
    entropy_nats: Tensor
    num_gates: int = 0

    @classmethod
    def zeros(cls, mask: Tensor, num_experts: int) -> GateSums:
        """Empty sums for rows with the tokens of ``mask`` (B, T)."""
        rows, device = mask.shape[0], mask.device
        wide, narrow = torch.zeros(rows, num_experts, device=device), torch.zeros(rows, device=device)
        return cls(mask.float(), wide, wide.clone(), narrow, narrow.clone(), narrow.clone())

    def add(self, weights: Tensor) -> None:
        """Add one gate's answer (B, T, E)."""
        size = weights.detach().float().abs()
        shares = size / size.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        kept = (size > 0).sum(dim=-1)
        self.weights += torch.einsum("bte,bt->be", weights.detach().float(), self.mask)
        self.sizes += torch.einsum("bte,bt->be", size, self.mask)
        self.kept += (kept * self.mask).sum(dim=1)
        self.several += ((kept > 1) * self.mask).sum(dim=1)
        self.entropy_nats += (torch.special.entr(shares).sum(dim=-1) * self.mask).sum(dim=1)
        self.num_gates += 1


@contextmanager
def observed(layers: Iterable[FusedLinear], mask: Tensor) -> Iterator[GateSums]:
    """Add up what the gates of the layers answer at the marked tokens in this thread, while open.

    Of each layer the first answer for all B x T tokens counts, so decode steps after a prompt do not. A gate that answers for another
    number of tokens, or with zeros for a single one, is switched off in a pass of the method's own (X-LoRA's first) and not counted.

    Args:
        layers: Fused layers, each with a gate.
        mask: 1 for tokens that count (B, T), in the layout of the forward pass to come.
    """
    layers = list(layers)
    sums = GateSums.zeros(mask, layers[0].lora_a.shape[0])
    to_come = {id(layer) for layer in layers}

    def note(layer: FusedLinear, weights: Tensor) -> None:
        if id(layer) not in to_come or weights.shape[:2] != sums.mask.shape:
            return
        if sums.mask.numel() > 1 or bool(weights.any()):
            sums.add(weights)
            to_come.remove(id(layer))

    token = GATE_OBSERVER.set(note)
    try:
        yield sums
    finally:
        GATE_OBSERVER.reset(token)


class GateWatch:
    """Counts every distinct prompt once, at the forward pass that reads it first.

    Args:
        layers: The model's fused layers; if none has a gate, nothing is ever watched.
        statistics: Where the figures of each prompt go.
    """

    def __init__(self, layers: Mapping[str, FusedLinear], statistics: RoutingStatistics) -> None:
        self._layers = [layer for layer in layers.values() if layer.gate is not None]
        self._statistics = statistics
        self._seen: set[Any] = set()

    @contextmanager
    def over(self, prompts: Sequence[Prompt], mask: Tensor) -> Iterator[None]:
        """Watch one forward pass.

        Args:
            prompts: The prompt of each row; prompts that were counted before, or twice in the batch, are left out.
            mask: 1 for tokens of the prompt (B, T), in the layout of the forward pass.
        """
        new = {prompt.key: row for row, prompt in reversed(list(enumerate(prompts))) if prompt.key not in self._seen}
        if not self._layers or not new:
            yield
            return
        with observed(self._layers, mask) as sums:
            yield
        if not sums.num_gates:
            return
        rows = list(new.values())
        count = (sums.mask[rows].sum(dim=1) * sums.num_gates).to("cpu", torch.float64)
        weights, sizes = (values[rows].to("cpu", torch.float64) / count[:, None] for values in (sums.weights, sums.sizes))
        kept, several, entropy = (values[rows].to("cpu", torch.float64) / count for values in (sums.kept, sums.several, sums.entropy_nats))
        for place, row in enumerate(rows):
            self._statistics.add_gates(
                weights[place],
                sizes[place],
                prompts[row].task,
                kept=float(kept[place]),
                several=float(several[place]),
                entropy_nats=float(entropy[place]),
            )
        self._seen.update(new)
