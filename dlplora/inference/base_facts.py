"""Attributes that a fused model takes from its base model."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from dlplora.adapters.fingerprint import base_fingerprint
from dlplora.inference.chat_formats import TurnMarkers, learn_markers
from dlplora.inference.generation import VocabularyTable
from dlplora.inference.prompting import context_length
from dlplora.inference.row_tokens import PieceEncoder, piece_encoder


class BaseModelFacts:
    """Mixin of ``FusedCausalLM``: what users of a Hugging Face model expect to find on it."""

    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Device of the base model."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base model."""
        return self.model.dtype  # type: ignore[no-any-return]

    @property
    def config(self) -> Any:
        """Configuration of the base model."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """Generation configuration of the base model."""
        return self.model.generation_config

    @property
    def max_length(self) -> int:
        """Positions that the base model supports, in tokens."""
        return context_length(self.model.config, self.tokenizer)

    @cached_property
    def chat_markers(self) -> TurnMarkers | None:
        """What the tokenizer's chat template writes around the words of a user; None without one."""
        return learn_markers(self.tokenizer)

    @cached_property
    def vocabulary(self) -> VocabularyTable:
        """Which tokens can end a sentence; computed at first use."""
        return VocabularyTable(self.tokenizer, self.config.get_text_config().vocab_size).to(self.device)

    @cached_property
    def piece_encoder(self) -> PieceEncoder | None:
        """Encodes parts of texts, if the tokenizer allows it; made at first use."""
        return piece_encoder(self.tokenizer)

    def fingerprint(self) -> dict[str, Any]:
        """What distinguishes this base model from another; see ``base_fingerprint``."""
        return base_fingerprint(self.model)
