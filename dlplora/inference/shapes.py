"""Sizes of public base models by name, for benchmarks and for estimates; nothing is downloaded.

The sizes are copied from the published configurations; a test compares the number of parameters with the published count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dlplora.errors import ConfigError, nearest

POSITIONS = 8192
"""Positions of every benchmarked base model; rotary positions have no table, so a longer context costs nothing until it is used."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder of the LLaMA or Qwen-2 family, in the names of transformers' configurations."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    pretrained: str | None = None
    """Name of the base model whose weights a benchmark loads; None takes random ones."""

    def config(self) -> Any:
        """The transformers configuration."""
        from transformers import LlamaConfig, Qwen2Config

        sizes = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in {"model_type", "pretrained"}}
        make = {"llama": LlamaConfig, "qwen2": Qwen2Config}[self.model_type]
        return make(**sizes, max_position_embeddings=POSITIONS, bos_token_id=1, eos_token_id=2, pad_token_id=0)


SHAPES: dict[str, ModelShape | None] = {
    "nano": None,
    "tiny": ModelShape(
        model_type="llama", vocab_size=3072, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    ),
    "smollm2-135m": ModelShape(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, pretrained="smollm2-135m",
    ),
    "qwen2-0.5b": ModelShape(
        model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "qwen2-1.5b": ModelShape(
        model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "qwen2-7b": ModelShape(
        model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "llama2-7b": ModelShape(
        model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, tie_word_embeddings=False,
    ),
    "llama3-8b": ModelShape(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""Name -> sizes. ``nano`` is the embedded base model with its own weights; ``tiny`` is for trying a command out."""


def find_shape(name: str) -> ModelShape | None:
    """The sizes behind a name; None for the embedded base model.

    Raises:
        ConfigError: If the name is unknown.
    """
    if name not in SHAPES:
        raise ConfigError(f"unknown shape '{name}'.{nearest(name, SHAPES)} Known: {', '.join(SHAPES)}.")
    return SHAPES[name]
