"""Parts of scoring and generation that need no model: requests, windows, padding, decoding options, stop texts.

Shapes: B rows, T tokens of the padded batch.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from lm_eval.models.huggingface import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import StoppingCriteria

from dlplora.errors import GenerationError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a router may read of a request.

    Args:
        ids: Token ids, at least one.
        task: Name of the task.
        text: The same as text; None if only the tokens are known.
        question: The part of it that is routed; None for all of it.
    """

    ids: tuple[int, ...]
    task: str | None
    text: str | None = None
    question: str | None = None

    @property
    def key(self) -> tuple[tuple[int, ...], str | None, str | None]:
        """Requests with equal keys share their routing weights."""
        return self.ids, self.task, self.question


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """One continuation to score.

    Args:
        context: Tokens conditioned on.
        continuation: Tokens scored, at least one.
        prompt: What is routed; equal to the context except for rolling windows.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    prompt: Prompt

    @property
    def forward_key(self) -> tuple[Any, ...]:
        """Requests of equal key differ in their last token only, so one forward pass scores them all."""
        return self.prompt.key, self.context, self.continuation[:-1]

    @property
    def sort_key(self) -> tuple[int, tuple[int, ...]]:
        """Longest first: padding is small, and a batch too large for the memory fails at once."""
        tokens = self.context + self.continuation
        return -len(tokens), tokens

    @property
    def context_sort_key(self) -> tuple[int, tuple[int, ...]]:
        """The same for contexts alone."""
        return -len(self.context), self.context

    @property
    def num_read(self) -> int:
        """Tokens that the model reads of it, if none is cut."""
        return len(self.context) + len(self.continuation) - 1

    @property
    def reads_prompt(self) -> bool:
        """Whether the prompt ends where the context ends; not so in windows of a rolling text."""
        return self.context[-len(self.prompt.ids) :] == self.prompt.ids

    def window(self, max_length: int) -> tuple[int, ...]:
        """The tokens the model reads: everything but the last, cut on the left to ``max_length``.

        ::

            tokens   c c c c|x y z        c context, x y z continuation
            window   c c c c|x y          at most max_length
            logits     c c c|x y z        the last three score x, y and z
        """
        return (self.context + self.continuation)[-(max_length + 1) : -1]


def consecutive(items: Sequence[Item], size: int, length: Callable[[Item], int] | None = None) -> Iterator[list[Item]]:
    """Consecutive batches of at most ``size``; with ``length``, of one length each: some models compute a padded row differently."""
    start = 0
    while start < len(items):
        batch = list(items[start : start + size])
        if length is not None:
            batch = list(next(itertools.groupby(batch, key=length))[1])
        yield batch
        start += len(batch)


SUITE_PREFIX = re.compile(r"^dlplora_[a-z0-9]+_")


def task_of(request: Instance, experts: Sequence[str]) -> str | None:
    """The name of a request's task: of its document's field ``task`` and lm-eval's name, the first that names an expert."""
    named = str(request.task_name) if request.task_name else None
    candidates = [request.doc.get("task") if isinstance(request.doc, Mapping) else None, named and SUITE_PREFIX.sub("", named), named]
    given = [name for name in candidates if isinstance(name, str)]
    return next((name for name in given if name in experts), given[0] if given else None)


def question_of(request: Instance) -> tuple[str, int]:
    """lm-eval's name of the request's task, and the index of its question."""
    return str(request.task_name), int(request.doc_id or 0)


Side = Literal["left", "right"]


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, side: Side, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of rows of unequal length, each int64 (B, T)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, where] = torch.tensor(list(row), dtype=torch.long)
        mask[index, where] = 1
    return ids.to(device), mask.to(device)


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """Decoding of one group of requests.

    Args:
        until: Texts that end an answer; they are not part of it.
        max_new_tokens: Most tokens to generate.
        options: Everything else, for Hugging Face ``generate``.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, gen_kwargs: Mapping[str, Any], *, default_max_new_tokens: int, eos: str | None) -> GenerationSettings:
        """lm-eval's generation options, with its own meaning of missing ones.

        Raises:
            GenerationError: If more than one answer per prompt is requested.
        """
        settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(gen_kwargs), default_max_new_tokens))
        until = handle_stop_sequences(settings.pop("until", None), eos=eos)
        max_new_tokens = int(settings.pop("max_gen_toks"))
        if settings.get("num_return_sequences", 1) != 1:
            raise GenerationError("num_return_sequences must be 1: lm-eval scores one answer per prompt. Set `repeats` in the task.")
        if not settings.get("do_sample"):
            settings.pop("temperature", None)
        settings.pop("max_length", None)
        return cls(tuple(text for text in until if text), max_new_tokens, settings)


def options_key(gen_kwargs: Mapping[str, Any]) -> str:
    """Requests of equal key are decoded alike and may share a batch."""
    return json.dumps(gen_kwargs, sort_keys=True, default=str)


def answer_text(tokens: Sequence[int], until: Sequence[str], marker: int | str | None, decode: Callable[[list[int]], str]) -> str:
    """The answer in generated tokens: after any thinking, before the first stop text.

    Args:
        tokens: Generated tokens of one row.
        until: Stop texts.
        marker: What ends the thinking, as a token or as text; None where there is none.
        decode: Tokens to text.
    """
    if not isinstance(marker, int):
        return str(postprocess_generated_text(decode(list(tokens)), list(until), marker))
    if marker in tokens:
        tokens = tokens[len(tokens) - list(tokens)[::-1].index(marker) :]
    return str(postprocess_generated_text(decode(list(tokens)).lstrip(), list(until), None))


class StopTexts(StoppingCriteria):
    """Ends a row once its generated text holds a stop text; every row on its own.

    Args:
        tokenizer: Decodes the last tokens of every row after each step.
        texts: Stop texts.
        prompt_width: Width of the padded prompts, T; the prompt is never searched.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], prompt_width: int) -> None:
        self.tokenizer = tokenizer
        self.texts = tuple(texts)
        self.prompt_width = prompt_width
        # a token holds at least one byte, so a stop text just completed is within as many last tokens as it has bytes
        self.lookback = max((len(text.encode()) for text in texts), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        if not self.texts:
            return done
        start = max(self.prompt_width, input_ids.shape[1] - self.lookback)
        tails = self.tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=False)
        for row, tail in enumerate(tails):
            done[row] = any(text in tail for text in self.texts)
        return done
