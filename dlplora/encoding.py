"""Token ids of texts, as a tokenizer's own call returns them, but faster for a few short texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FEW_CHARACTERS = 1 << 14
"""Most characters of all texts together that are encoded in one thread; beyond it, the threads of the tokenizer's own call pay off."""


def is_plain(tokenizer: Any) -> bool:
    """Whether the fast tokenizer of a tokenizer can be asked directly.

    It is one of transformers' own classes, its calls are not overridden, and truncation and padding are off.
    """
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    for name in ("__call__", "_encode_plus"):
        if getattr(type(tokenizer), name, None) is not getattr(PreTrainedTokenizerFast, name, None):
            return False
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None or backend.padding is not None:
        return False
    return bool(backend.encode_special_tokens == tokenizer.split_special_tokens)


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text on its own, with the tokenizer's default special tokens, neither cut nor padded."""
    if not texts:
        return []
    if sum(map(len, texts)) <= FEW_CHARACTERS and is_plain(tokenizer):
        # In this thread: on a busy machine, waiting for another one takes longer than the work.
        return [list(tokenizer.backend_tokenizer.encode(text).ids) for text in texts]
    return [list(ids) for ids in tokenizer(list(texts))["input_ids"]]
