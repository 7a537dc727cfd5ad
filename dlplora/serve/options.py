"""Bounds of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from dlplora.errors import ConfigError

MAX_ROWS = 1 << 16
"""Largest batch or queue; the cache of a batch is made when the engine starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Bounds of the engine."""

    max_batch: int = 16
    """Requests that run at once."""
    max_queue: int = 64
    """Requests that may wait; one more is refused."""
    max_model_len: int | None = None
    """Tokens of one request, prompt included; None takes the context of the base model, at most 4096."""
    prefill_chunk: int = 256
    """Prompt tokens, of one or several prompts and padding included, processed between two decode steps."""
    min_confidence: float | None = None
    """See ``Decider``."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "prefill_chunk"):
            if not 1 <= getattr(self, name) <= MAX_ROWS:
                raise ConfigError(f"'{name}' must be from 1 to {MAX_ROWS}, got {getattr(self, name)}.")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"'max_model_len' must be at least 2, a token of the prompt and one of the answer, got {self.max_model_len}.")
        if self.min_confidence is not None and not 0.0 <= self.min_confidence <= 1.0:
            raise ConfigError(f"'min_confidence' must be between 0 and 1, got {self.min_confidence}.")
