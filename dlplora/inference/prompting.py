"""Inputs of ``generate`` as tensors: texts, token ids or prompts become ids that end with a token, and the text that a router reads.

Token ids have the form that transformers expects: a tensor (B, T) as the first argument or as ``input_ids``. Mappings and lists of ids are
refused. Columns stay where the caller put them, however wide the padding is: lengths, criteria and processors count them. Only rows that
are padded on the right are moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dlplora.errors import GenerationError
from dlplora.inference.chat_formats import TurnMarkers, learn_markers
from dlplora.inference.question import question_text
from dlplora.types import PromptBatch


def texts_or_ids(given: Any) -> tuple[list[str] | None, Tensor | None]:
    """The first argument of ``generate`` as texts or as token ids (B, T).

    Raises:
        GenerationError: If it is neither.
    """
    if isinstance(given, Tensor):
        return None, given
    if isinstance(given, str):
        return [given], None
    if isinstance(given, Mapping) or hasattr(given, "input_ids"):  # BatchEncoding is a UserDict
        raise GenerationError(f"{type(given).__name__} is a mapping; pass its entries by name: generate(**inputs).")
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise GenerationError(f"generate() takes texts, or token ids as a tensor (B, T); got {type(given).__name__}.")
    texts = list(given)
    if not texts:
        raise GenerationError("generate() needs at least one prompt, got an empty list.")
    wrong = sorted({type(text).__name__ for text in texts if not isinstance(text, str)})
    if wrong:
        hint = (
            "render messages with tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"
            if any(isinstance(text, Mapping) for text in texts)
            else "pass token ids as a tensor (B, T)"
        )
        raise GenerationError(f"generate() takes texts, got a list of {', '.join(wrong)}; {hint}.")
    return texts, None


def require_text(texts: Sequence[str]) -> None:
    """Refuse text that no tokenizer takes.

    Raises:
        GenerationError: If one holds half of a surrogate pair.
    """
    for index, text in enumerate(texts):
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise GenerationError(f"prompt {index} holds half of a surrogate pair, which is not valid text; decode it as UTF-8.")


def prompt_tensors(
    tokenizer: Any,
    device: torch.device,
    given: Any,
    input_ids: Tensor | None,
    mask: Tensor | None,
    prompts: PromptBatch | None,
    infer_mask: Callable[[Tensor], Tensor] = torch.ones_like,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, PromptBatch]:
    """Ids (B, T) and mask, every row ending with a token, and the prompts a router reads.

    The arguments are those of ``FusedCausalLM.generate``.

    Args:
        infer_mask: The mask of ``input_ids`` that come without one.
        vocab_size: Tokens that the model knows; None does not ask.

    Raises:
        GenerationError: If nothing or several things are given, they do not fit together, a prompt is empty, or a token is not one of the
            model's.
    """
    if given is not None:
        if prompts is not None or input_ids is not None:
            raise GenerationError("give texts, or input_ids, or prompts; not several of them.")
        texts, input_ids = texts_or_ids(given)
        if texts is not None:
            require_text(texts)
            prompts = PromptBatch.from_texts(texts, tokenizer, device=device)
    if input_ids is None:
        if prompts is None:
            raise GenerationError("generate() needs a prompt: texts, input_ids or prompts.")
        if mask is not None:
            raise GenerationError("attention_mask belongs to input_ids; texts and prompts have their own.")
        input_ids, mask = prompts.input_ids, prompts.attention_mask
    input_ids, mask = _checked(input_ids, mask, device, infer_mask)
    if prompts is not None and len(prompts) != input_ids.shape[0]:
        raise GenerationError(f"input_ids have {input_ids.shape[0]} rows, prompts {len(prompts)}.")
    rows = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
    special = set(tokenizer.all_special_ids)
    for i, row in enumerate(rows):
        if not any(token not in special for token in row):
            raise GenerationError(f"prompt {i} is empty: it holds no token besides special ones.")
        if vocab_size is not None and (min(row) < 0 or max(row) >= vocab_size):
            raise GenerationError(f"prompt {i} holds a token that the model does not know: ids are from 0 to {vocab_size - 1}.")
    if prompts is None:
        prompts = PromptBatch.from_ids(rows, tokenizer, device=device)
        markers = learn_markers(tokenizer)
        asked = (_question_of_ids(row, text, tokenizer, markers) for row, text in zip(rows, prompts.texts, strict=True))
        prompts = replace(prompts, questions=tuple(asked))
    ids, mask = _ending_with_tokens(input_ids, mask)
    if vocab_size is not None:  # labels' -100 and the like under the mask; embeddings look them up all the same
        ids = ids.where(mask.bool() | ((ids >= 0) & (ids < vocab_size)), int(tokenizer.pad_token_id or 0))
    return ids, mask, prompts


def context_length(config: Any, tokenizer: Any) -> int:
    """Tokens that a base model can read at once; the tokenizer's limit where the model has none."""
    config = config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "n_ctx"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return int(min(tokenizer.model_max_length, 1 << 20))


def fit_to_context(ids: Tensor, mask: Tensor, new_tokens: int, max_length: int) -> tuple[Tensor, Tensor, int]:
    """Keep the last tokens of prompts that leave no room for the answer. Padding takes no room, and stays where nothing has to be cut.

    Args:
        ids, mask: (B, T), every row ending with a token.
        new_tokens: Tokens of the answer.
        max_length: Tokens of the context.

    Returns:
        ids and mask with at most ``max_length - new_tokens`` tokens a row, and how many prompts were cut.

    Raises:
        GenerationError: If there is no room for any prompt.
    """
    room = max_length - new_tokens
    if room < 1:
        raise GenerationError(f"{new_tokens} new tokens leave no room for a prompt in a context of {max_length}; lower max_new_tokens.")
    if ids.shape[1] <= room:
        return ids, mask, 0
    from_the_end = mask.flip(1).cumsum(dim=1).amax(dim=0)  # tokens of the fullest row in the last 1, 2, ... columns
    width = int((from_the_end <= room).sum())
    cut = ids.shape[1] - width
    return ids[:, cut:], mask[:, cut:], int(mask[:, :cut].any(dim=1).sum())


def _checked(ids: Any, mask: Any, device: torch.device, infer_mask: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, both (B, T) on the device."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.dtype is torch.bool:
        what = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise GenerationError(f"token ids must be an integer tensor (B, T), got {what}.")
    if not ids.shape[0]:
        raise GenerationError("generate() and route() need at least one prompt, got none.")
    ids = ids.to(device, torch.long)
    if mask is None:
        return ids, infer_mask(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        what = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise GenerationError(f"attention_mask must be a tensor of the shape of input_ids {tuple(ids.shape)}, got {what}.")
    kept = mask.to(device).bool()
    if not bool((mask.to(device) == kept).all()):
        raise GenerationError("attention_mask must hold 1 for tokens and 0 for padding, and nothing else.")
    return ids, kept.long()


def _question_of_ids(ids: Sequence[int], text: str, tokenizer: Any, markers: TurnMarkers | None) -> str:
    """The question of a row of tokens; chat markers may be special tokens, which ``text`` does not show."""
    edge = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    inner = list(ids)
    while inner and inner[0] in edge:
        inner.pop(0)
    marked = str(tokenizer.decode(inner, skip_special_tokens=False))
    asked = question_text(marked, markers)
    return question_text(text, markers) if asked == marked else asked


def _ending_with_tokens(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) with the padding at the end of each row moved to its beginning; all else, the width included, as it is."""
    width = ids.shape[1]
    columns = torch.arange(width, device=ids.device)
    after = width - 1 - (columns * mask).amax(dim=1)  # columns after the last token
    if not bool(after.any()):
        return ids, mask
    places = (columns - after[:, None]) % width
    return ids.gather(1, places), mask.gather(1, places)
