"""What ``generate`` is given, as tensors: texts, token ids or prompts become left-padded ids and what a router reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dlplora.errors import GenerationError
from dlplora.inference.chat_formats import TurnMarkers, learn_markers
from dlplora.inference.question import question_of_messages, question_text
from dlplora.types import PromptBatch


def prompt_tensors(
    tokenizer: Any, device: torch.device, texts: Any, input_ids: Tensor | None, mask: Tensor | None, prompts: PromptBatch | None
) -> tuple[Tensor, Tensor, PromptBatch]:
    """Left-padded ids (B, T) and mask, and the prompts a router reads; the arguments are those of ``FusedCausalLM.generate``.

    Raises:
        GenerationError: If nothing or several things are given, or a prompt is empty.
    """
    if texts is not None:
        if prompts is not None or input_ids is not None:
            raise GenerationError("give texts, or input_ids, or prompts; not several of them.")
        texts = [texts] if isinstance(texts, str) else list(texts)
        prompts = PromptBatch.from_texts(texts, tokenizer, device=device)
    if input_ids is None:
        if prompts is None:
            raise GenerationError("generate() needs a prompt: texts, input_ids or prompts.")
        input_ids, mask = prompts.input_ids, prompts.attention_mask
    input_ids = input_ids.to(device)
    mask = torch.ones_like(input_ids) if mask is None else mask.to(device)
    rows = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
    special = set(tokenizer.all_special_ids)
    for i, row in enumerate(rows):
        if not any(token not in special for token in row):
            raise GenerationError(f"prompt {i} is empty: it holds no token besides special ones.")
    if prompts is None:
        prompts = PromptBatch.from_ids(rows, tokenizer, device=device)
        markers = learn_markers(tokenizer)
        asked = (_question_of_ids(row, text, tokenizer, markers) for row, text in zip(rows, prompts.texts, strict=True))
        prompts = replace(prompts, questions=tuple(asked))
    ids, mask = _left_padded(rows, int(tokenizer.pad_token_id or 0))
    return ids.to(device), mask.to(device), prompts


def chat_prompts(
    conversations: Sequence[Sequence[Mapping[str, Any]]], tokenizer: Any, *, device: torch.device | str = "cpu", **template: Any
) -> PromptBatch:
    """Conversations as prompts: rendered by the tokenizer's chat template for the model, their questions for the router.

    Args:
        conversations: Messages (``role``, ``content``) of each row.
        template: Further arguments of ``apply_chat_template``, for example ``tools``.
    """
    texts = [
        str(tokenizer.apply_chat_template(list(messages), tokenize=False, **{"add_generation_prompt": True, **template}))
        for messages in conversations
    ]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]  # the template has written them
    asked = [question_of_messages(messages) for messages in conversations]
    return PromptBatch.from_ids(rows, tokenizer, device=device, texts=texts, questions=asked)


def _question_of_ids(ids: Sequence[int], text: str, tokenizer: Any, markers: TurnMarkers | None) -> str:
    """The question of a row of tokens; chat markers may be special tokens, which ``text`` does not show."""
    edge = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    inner = list(ids)
    while inner and inner[0] in edge:
        inner.pop(0)
    marked = str(tokenizer.decode(inner, skip_special_tokens=False))
    asked = question_text(marked, markers)
    return question_text(text, markers) if asked == marked else asked


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids, mask
