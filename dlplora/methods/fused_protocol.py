"""The part of the fused model that methods may use; methods do not know the model class itself."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dlplora.modules.lora_bank import AdapterBank


class FusedModel(Protocol):
    """What a method sees of the model it is attached to; ``inference.FusedCausalLM`` is one."""

    model: Any
    """The patched Hugging Face model."""
    tokenizer: Any
    bank: AdapterBank
    slot: Any
    """Where the layers find the routing weights of a request."""
    patched: Any
    """``patched.layers``: fused layers by module path; ``patched.hooks``: hooks that go when the layers go."""

    @property
    def device(self) -> torch.device:
        """Device of the base model."""
        ...

    @property
    def max_length(self) -> int:
        """Positions the base model supports, in tokens."""
        ...

    def routing(self, weights: Tensor) -> AbstractContextManager[Any]:
        """Bind routing weights for the calls inside the block."""
        ...
