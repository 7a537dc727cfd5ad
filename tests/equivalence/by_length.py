"""A method whose routing changes with nearly every further sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from dlplora.methods.base import FusionMethod, Metadata
from dlplora.types import PromptBatch


class ByLength(FusionMethod):
    """Routes by the number of characters it reads."""

    name = "by_length"
    metadata = Metadata(title="By length", granularity="sentence")
    policy = "stale"
    pieces = "whole"

    def route(self, prompts: PromptBatch) -> Tensor:
        turns = torch.tensor([len(text) % 7 for text in prompts.texts]).float()[:, None]
        return torch.cat([turns / 10, 1 - turns / 10, (turns % 2) / 5], dim=1)

    @property
    def kv_policy(self) -> str:
        return self.policy

    @property
    def prompt_routing(self) -> str:
        return self.pieces


def by_length(policy: str = "stale", pieces: str = "whole", kind: type[ByLength] = ByLength) -> ByLength:
    """``ByLength``, or a subclass, with a ``kv_policy`` and a ``prompt_routing``."""
    method = kind()
    method.policy, method.pieces = policy, pieces
    return method
