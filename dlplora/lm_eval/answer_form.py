"""Generation for composite prompts: the evaluation writes the beginning of each answer, and answers are not cut.

An adapter trained on single questions ends its text after one answer. ``AnswerForm`` treats an end of text, or a line break, as the end of
one *answer*: while answers are missing, the probability of the end token is added to the line break, which is followed by the tokens of
the next answer's form (``Answer:``, ``2.``). The rule is the same for every method and sees neither questions nor targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from dlplora.errors import GenerationError

Form = tuple[str, ...] | None
"""The text before each answer of a row; None for prompts of one answer."""


def form_of(doc: Any) -> Form:
    """The answer form of a document, None if it has none."""
    form = doc.get("answer_form") if isinstance(doc, Mapping) else None
    return tuple(form) if form else None


def require_whole(doc: Any, length: int, room: int, new_tokens: int) -> None:
    """Refuse to cut a prompt that is meaningless without its beginning.

    Raises:
        GenerationError: If the document asks for its whole prompt and it does not fit; the lengths are named.
    """
    if isinstance(doc, Mapping) and doc.get("whole_prompt") and length > room:
        n = len(doc.get("parts") or ())
        raise GenerationError(
            f"a {doc.get('reading', 'composite')} prompt of {n} questions has {length} tokens and asks for {new_tokens} more, but the "
            f"context is {room + new_tokens}. These prompts are not cut; use a smaller n, another form, or a longer context."
        )


class AnswerForm(LogitsProcessor):
    """Writes the form of each answer, one row at a time; see the module docstring.

    Args:
        forms: For each row the text before each answer, from the second on beginning with a line break; None leaves a row unchanged.
        tokenizer: Encodes the forms.
        prompt_width: Tokens of the padded prompt.

    Raises:
        GenerationError: If a form does not begin with a line break, or the tokenizer has no token for one.
    """

    def __init__(self, forms: Sequence[Form], tokenizer: Any, prompt_width: int) -> None:
        self.width = prompt_width
        self.end = int(tokenizer.eos_token_id)
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        if len(newline) != 1:
            raise GenerationError("answer forms need a tokenizer with one token for a line break; use form=free.")
        self.newline = newline[0]
        self._forms = [None if form is None else [self._encode(text, tokenizer) for text in form] for form in forms]
        self._breaks = torch.tensor(["\n" in str(tokenizer.decode([index])) for index in range(len(tokenizer))])
        self._answer = [0] * len(forms)
        self._pending: list[list[int]] = [list(form[0]) if form else [] for form in self._forms]

    def _encode(self, text: str, tokenizer: Any) -> list[int]:
        if not text:
            return []
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids[0] != self.newline:
            raise GenerationError(f"the form of an answer must begin with a line break, got {text!r}.")
        return list(ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with one token left where the form is due, and the end token's share moved to the line break."""
        scores = scores.clone()
        for row, form in enumerate(self._forms):
            if form is None:
                continue
            last = int(input_ids[row, -1])
            pending = self._pending[row]
            written = input_ids.shape[1] > self.width
            if not pending and written and last < len(self._breaks) and bool(self._breaks[last]) and not self._just_wrote(row, input_ids):
                self._answer[row] += 1
                if self._answer[row] < len(form):
                    pending = self._pending[row] = list(form[self._answer[row]][1:])
                else:
                    pending = self._pending[row] = [self.end]
            if pending:
                _force(scores, row, pending.pop(0))
            elif self._answer[row] < len(form) - 1:
                scores[row, self.newline] = torch.logaddexp(scores[row, self.newline], scores[row, self.end])
                scores[row, self.end] = -torch.inf
        return scores

    def _just_wrote(self, row: int, input_ids: Tensor) -> bool:
        """Whether the newest token is the form of the first answer, which may be a line break alone."""
        form = self._forms[row]
        assert form is not None
        return self._answer[row] == 0 and 0 < input_ids.shape[1] - self.width <= len(form[0])


def _force(scores: Tensor, row: int, token: int) -> None:
    scores[row] = -torch.inf
    scores[row, token] = 0.0
