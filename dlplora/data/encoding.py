"""Text to token ids and labels, split exactly where lm-eval splits context and continuation.

An expert is trained on ``prompt + " " + answer + </s>``. lm-eval later encodes the whole string and takes the length of the encoded
context as the border. Training uses the same border, so the positions with loss are the positions that are scored.
Shapes: B rows, T tokens, S supervised tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dlplora.errors import TaskError
from dlplora.tasks.types import Item

IGNORED = -100
TARGET_DELIMITER = " "


@dataclass(frozen=True, slots=True)
class EncodedItem:
    """One item as the model sees it.

    Args:
        ids: Prompt, answer and end token, int64 (T,).
        num_prompt: How many of them are context, at least 1; all the rest is supervised.
        task: Name of its task.
        prompt: The text of the prompt, for routers that read text.
    """

    ids: np.ndarray[Any, np.dtype[np.int64]]
    num_prompt: int
    task: str
    prompt: str

    def __len__(self) -> int:
        return int(self.ids.shape[0])


@dataclass(frozen=True, slots=True)
class EncodedSet:
    """Encoded items and how many prompts had to be shortened."""

    items: tuple[EncodedItem, ...]
    num_truncated: int

    def __len__(self) -> int:
        return len(self.items)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each item."""
        return tuple(len(item) for item in self.items)


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, special tokens as lm-eval adds them.

    This is the tokenizer's default, except that no bos token is added to a text that already begins with one.
    """
    bos = tokenizer.bos_token
    plain = [i for i, text in enumerate(texts) if not (bos and text.startswith(bos))]
    marked = [i for i, text in enumerate(texts) if bos and text.startswith(bos)]
    rows: list[list[int]] = [[] for _ in texts]
    for indices, options in ((plain, {}), (marked, {"add_special_tokens": False})):
        if indices:
            encoded = tokenizer([texts[i] for i in indices], return_attention_mask=False, **options)["input_ids"]
            for i, ids in zip(indices, encoded, strict=True):
                rows[i] = list(ids)
    return rows


def encode_pairs(tokenizer: Any, contexts: Sequence[str], continuations: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """``(context ids, continuation ids)`` of each pair, as lm-eval's causal models split them.

    Spaces at the end of a context move to its continuation; then the whole string is encoded, and the tokens beyond the
    length of the context's own encoding are the continuation.

    Source: lm-eval 0.4.13, ``TemplateLM._encode_pair`` and ``HFLM.tok_encode``.
    """
    heads = [context.rstrip() for context in contexts]
    wholes = [context + continuation for context, continuation in zip(contexts, continuations, strict=True)]
    context_ids = encode_texts(tokenizer, heads)
    whole_ids = encode_texts(tokenizer, wholes)
    return [(head, whole[len(head) :]) for head, whole in zip(context_ids, whole_ids, strict=True)]


def encode_items(tokenizer: Any, items: Sequence[Item], max_length: int) -> EncodedSet:
    """Encode items for training.

    A sequence longer than ``max_length`` loses tokens at the beginning of its prompt, as in lm-eval; the answer is never cut.

    Args:
        tokenizer: Of the base model; needs an eos token.
        items: What to encode.
        max_length: Longest sequence in tokens, end token included.

    Returns:
        The encoded items in the same order, and the number of shortened prompts.

    Raises:
        TaskError: If an answer leaves no room for one token of its prompt.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise TaskError("the tokenizer has no eos token, so an answer could never end; choose a tokenizer with one.")
    pairs = encode_pairs(tokenizer, [item.prompt for item in items], [TARGET_DELIMITER + item.answer for item in items])
    encoded: list[EncodedItem] = []
    num_truncated = 0
    for item, (prompt, answer) in zip(items, pairs, strict=True):
        if not answer or answer[-1] != eos:
            answer = [*answer, eos]
        room = max_length - len(answer)
        if room < 1:
            raise TaskError(
                f"an answer of task '{item.task}' has {len(answer)} tokens, max_length is {max_length}: no prompt fits before it "
                f"({item.answer[:40]!r}). Raise max_length or drop the row."
            )
        if len(prompt) > room:
            prompt = prompt[-room:]
            num_truncated += 1
        ids = np.array([*prompt, *answer], dtype=np.int64)
        encoded.append(EncodedItem(ids, len(prompt), item.task, item.prompt))
    return EncodedSet(tuple(encoded), num_truncated)


def collate(items: Sequence[EncodedItem], pad_id: int, weights: Sequence[float] | None = None) -> dict[str, Any]:
    """Right-padded tensors of one batch.

    With padding on the right, causal attention never lets a real token see it, so training needs no mask.

    Args:
        items: Rows of the batch.
        pad_id: Any valid id; its embedding influences nothing.
        weights: Loss weight of every supervised token of a row, one number per row. None gives the mean over the supervised
            tokens of the batch.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, T); ``labels`` (B, T), -100 on prompt and padding; and the supervised
        positions in packed form: ``hidden_index`` (S,), the index in the flattened (B * T) hidden states that
        predicts each token of ``targets`` (S,), and its ``weights`` (S,) float32.
    """
    width = max(len(item) for item in items)
    ids = np.full((len(items), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(items), width), dtype=np.int64)
    labels = np.full((len(items), width), IGNORED, dtype=np.int64)
    positions: list[np.ndarray[Any, Any]] = []
    for row, item in enumerate(items):
        length, start = len(item), item.num_prompt
        ids[row, :length] = item.ids
        mask[row, :length] = 1
        labels[row, start:length] = item.ids[start:]
        # token t is predicted by the hidden state of t - 1
        positions.append(np.arange(row * width + start - 1, row * width + length - 1))
    counts = [len(item) - item.num_prompt for item in items]
    per_row = [1.0 / sum(counts)] * len(items) if weights is None else weights
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
        "hidden_index": torch.from_numpy(np.concatenate(positions)),
        "targets": torch.from_numpy(np.concatenate([item.ids[item.num_prompt :] for item in items])),
        "weights": torch.from_numpy(np.repeat(np.asarray(per_row, dtype=np.float32), counts)),
    }
