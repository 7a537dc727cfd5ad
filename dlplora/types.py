"""Values that are passed between packages.

Shapes: B rows of a batch, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dlplora.encoding import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """What a router may read: the contexts, without what follows them.

    Args:
        input_ids: Token ids of the contexts, padded on either side, int64 (B, T).
        attention_mask: 1 for real tokens, 0 for padding, (B, T).
        texts: The same contexts as text, one per row.
        task_names: The task of each row as the evaluation protocol names it. Only methods that declare
            ``needs = ("task_id", ...)`` receive it; for all others the fused model removes it.
        questions: The part of each context that is routed, where the caller knows it (from messages, or from the evaluated document).
            None: the fused model finds it in the text (``inference.question``).
        weights: Routing weights (B, E) of the contexts, if they are known already; the method is then not called again.
    """

    input_ids: Tensor
    attention_mask: Tensor
    texts: tuple[str, ...]
    task_names: tuple[str | None, ...] | None = None
    questions: tuple[str, ...] | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.input_ids.shape != self.attention_mask.shape or self.input_ids.ndim != 2:
            raise ValueError(
                f"input_ids {tuple(self.input_ids.shape)} and attention_mask {tuple(self.attention_mask.shape)} must be equal and 2-D"
            )
        if len(self.texts) != self.input_ids.shape[0]:
            raise ValueError(f"{len(self.texts)} texts for {self.input_ids.shape[0]} rows")
        if self.task_names is not None and len(self.task_names) != len(self.texts):
            raise ValueError(f"{len(self.task_names)} task names for {len(self.texts)} rows")
        if self.questions is not None and len(self.questions) != len(self.texts):
            raise ValueError(f"{len(self.questions)} questions for {len(self.texts)} rows")
        if self.weights is not None and len(self.weights) != len(self.texts):
            raise ValueError(f"{len(self.weights)} rows of routing weights for {len(self.texts)} rows")

    def __len__(self) -> int:
        return len(self.texts)

    def without_task_names(self) -> PromptBatch:
        """The same prompts with the protocol's task names removed."""
        return PromptBatch(self.input_ids, self.attention_mask, self.texts, None, self.questions)

    @classmethod
    def from_ids(
        cls,
        rows: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device | str = "cpu",
        task_names: Sequence[str | None] | None = None,
        texts: Sequence[str] | None = None,
        questions: Sequence[str] | None = None,
    ) -> PromptBatch:
        """Right-pad rows of token ids; the texts are decoded unless given."""
        width = max(1, max((len(row) for row in rows), default=1))
        pad = tokenizer.pad_token_id  # read once, because every access looks it up again
        ids = np.full((len(rows), width), 0 if pad is None else int(pad), dtype=np.int64)  # small tensors are slower to fill
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        if texts is None:
            texts = [str(tokenizer.decode(list(row), skip_special_tokens=True)) for row in rows]
        names = None if task_names is None else tuple(task_names)
        known = None if questions is None else tuple(questions)
        return cls(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device), tuple(texts), names, known)

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        tokenizer: Any,
        *,
        device: torch.device | str = "cpu",
        task_names: Sequence[str | None] | None = None,
        questions: Sequence[str] | None = None,
    ) -> PromptBatch:
        """Tokenise each text on its own (the tokenizer's default special tokens) and right-pad; a string is one text."""
        texts = [texts] if isinstance(texts, str) else texts
        return cls.from_ids(
            encode_texts(tokenizer, texts), tokenizer, device=device, task_names=task_names, texts=texts, questions=questions
        )
