"""Sentence-level re-routing inside Hugging Face ``generate``.

``SentenceRerouter`` is a stopping criterion that never stops anything: it is called when a token has been appended and before the
next forward, so the first token of a new sentence is already processed under the new routing weights. A stop is known to end a
sentence once the character behind it is known, and with BPE that comes with the next token, the first one of the new sentence.
What becomes of keys and values already cached is ``kv_policy``'s business.

The host must know that a sentence has ended before the next forward starts, and must not wait for the device to learn that none has.
So the rows that may have ended one are found on the device, from a table over the vocabulary, and copied to the host without
waiting; ``generate`` then waits for the device itself, to see whether all rows are finished; and the copy is read right after
that, before the next forward. Only where the table says "perhaps" are tokens fetched and decoded, and the rule
of ``sentences`` decides on the text. From a token with a stop on, a row stays a candidate until the rule has decided, so rows are
re-routed exactly where the rule sees an end in the text so far, whatever the tokenizer.

A line break is known to end a sentence as it is generated, so the first token of the next sentence is already predicted under the new
weights; behind other stops that token is what decides, and it is the first to be processed under them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from dlplora.errors import GenerationError
from dlplora.inference.prompt_routing import answer_index, answers_by_line, asked_questions, segment_task, segment_text
from dlplora.inference.question import routed_tail
from dlplora.inference.sentences import decides_sentence, known_sentence_ends, may_end_sentence
from dlplora.modules.routing_state import RoutingState

VIEWS = ("tail", "window", "whole", "segment")
WINDOW_TOKENS = 64


def view_text(view: str, prompt: str, generated: str, num_sentences: int, tokenizer: Any, tail: Callable[[str], str] = routed_tail) -> str:
    """What the router reads at a sentence end.

    Args:
        view: ``tail``: the prompt's last question and everything generated since; ``window``: the last 64 tokens of prompt and
            text; ``whole``: all of it; ``segment``: the i-th question of the prompt for the i-th answer (``prompt_routing``).
        prompt: What is routed of the row's prompt (``question_text``).
        generated: Text generated so far.
        num_sentences: Sentences finished so far.
        tokenizer: Counts the tokens of ``window``.
        tail: Prompt -> its last question; pass a cached one if the same prompts are read again.

    Raises:
        GenerationError: If the view is unknown.
    """
    if view == "tail":
        return tail(prompt) + generated
    if view == "whole":
        return prompt + generated
    if view == "window":
        ids = tokenizer(prompt + generated, add_special_tokens=False)["input_ids"]
        return str(tokenizer.decode(ids[-WINDOW_TOKENS:]))
    if view == "segment":
        return segment_text(prompt, generated, num_sentences)
    raise GenerationError(f"unknown view '{view}'; known: {', '.join(VIEWS)}.")


def ended_sentences(prompt: str, generated: str) -> tuple[int, bool]:
    """How many sentences have ended in a text that is still being generated, and whether a stop in it is undecided.

    Args:
        prompt: What is routed of the row's prompt.
        generated: Text generated so far.
    """
    count, undecided = known_sentence_ends(generated)
    blank = generated[: len(generated) - len(generated.lstrip())]
    if "\n" in blank and answers_by_line(prompt):
        count += 1  # the first answer was left empty: the line that ends it is an end all the same
    return count, undecided


class VocabularyTable:
    """Which tokens hold a character that can end a sentence; computed once per tokenizer.

    Attributes:
        stop: Tokens behind which the text is looked at with every further token until the sentence rule has decided.
        inner: Tokens that may decide an end themselves: with a line break, with a stop that is not their last character, or with part
            of a character that is spelt byte by byte (``。`` often is), of which only the text can tell what it is.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        pieces = [str(tokenizer.decode([index])) for index in range(min(size, len(tokenizer)))]
        pad = [False] * (size - len(pieces))
        self.stop = torch.tensor([may_end_sentence(piece) for piece in pieces] + pad)
        self.inner = torch.tensor(["\ufffd" in piece or decides_sentence(piece) for piece in pieces] + pad)
        self._stop, self._inner = (frozenset(flags.nonzero().flatten().tolist()) for flags in (self.stop, self.inner))

    def holds_stop(self, token: int) -> bool:
        """``stop`` of a token that the host knows."""
        return token in self._stop

    def may_decide(self, token: int) -> bool:
        """``inner`` of a token that the host knows."""
        return token in self._inner

    def to(self, device: torch.device) -> VocabularyTable:
        """Move the tables to a device in place."""
        self.stop, self.inner = self.stop.to(device), self.inner.to(device)
        return self


class _Look:
    """Rows that may have ended a sentence, on their way to the host.

    Args:
        input_ids: Prompt and tokens generated so far.
        width: Tokens of the padded prompt.
        flags: Boolean (B,), on the device.
    """

    def __init__(self, input_ids: Tensor, width: int, flags: Tensor) -> None:
        self.input_ids, self.generated = input_ids, input_ids[:, width:]
        self._arrived: Any = None
        self._flags = flags
        if flags.device.type == "cuda":
            self._flags = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def rows(self) -> list[int]:
        """Indices of the rows; waits only if the device has not got that far."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [row for row, flag in enumerate(self._flags.tolist()) if flag]


class RoutedCriterion(StoppingCriteria):
    """A stopping criterion that ``FusedCausalLM.generate`` tells the routing state of its request."""

    state: RoutingState | None = None


class SentenceRerouter(StoppingCriteria):
    """Re-routes each row on its own when its generated text has ended a sentence. Greedy decoding and sampling only.

    Args:
        state: The routing state of this generation; updated in place.
        route: Texts -> routing weights (N, E); it is called with a task name for each text as well, or None, and with the ids of ``encode``.
        prompts: What is routed of each row's prompt (``question_text``).
        tokenizer: Decodes generated tokens.
        table: Vocabulary table of the tokenizer.
        prompt_width: Tokens of the padded prompt.
        view: What the router reads.
        trace: If a list, receives one dict per re-route.
        names: Expert names, for the trace.
        task_names: The protocol's name of each row's task, one a question for composite prompts; None where it has none.
        refresh: Called with rows, weights and tokens before the plans change, to bring the cache in line.
        encode: Rows and their texts -> token ids; None leaves it to ``route``.
    """

    def __init__(
        self,
        state: RoutingState,
        route: Callable[..., Tensor],
        prompts: Sequence[str],
        tokenizer: Any,
        table: VocabularyTable,
        prompt_width: int,
        view: str = "tail",
        trace: list[dict[str, Any]] | None = None,
        names: Sequence[str] = (),
        *,
        task_names: Sequence[str | None] | None = None,
        refresh: Callable[[Sequence[int], Tensor, Tensor], None] | None = None,
        encode: Callable[[Sequence[int], Sequence[str]], list[list[int]]] | None = None,
    ) -> None:
        self.state, self.route, self.prompts, self.tokenizer, self.table = state, route, list(prompts), tokenizer, table
        self.width, self.view, self.trace, self.names = prompt_width, view, trace, tuple(names)
        self._finished = [0] * len(self.prompts)
        self._tail = functools.cache(routed_tail)
        self.task_names, self.refresh, self.encode = task_names, refresh, encode
        self.num_reroutes = 0
        self.deferred = False
        """Whether the caller promises to call ``reroute_before_forward`` before the next forward."""
        self._look: _Look | None = None
        self._go_on: Tensor | None = None
        self._undecided: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        """Look at the newest token of each row; always returns False (B,).

        Raises:
            GenerationError: If the decoding loop went on without the promised call of ``reroute_before_forward``.
        """
        if self._look is not None:
            raise GenerationError(
                "this decoding loop runs no forward pass between two tokens, so sentence-level routing cannot follow it; "
                "use greedy decoding or sampling, or route once per prompt (dlp: reroute=prompt)."
            )
        if self._go_on is None or self._undecided is None:
            self._go_on = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
            self._undecided = torch.zeros_like(self._go_on)
        if input_ids.shape[1] > self.width:
            new = input_ids[:, -1]
            self._look = _Look(input_ids, self.width, self._undecided | self.table.inner[new])
            self._undecided = self._undecided | self.table.stop[new]
            if not self.deferred:
                self.reroute_before_forward()
        return self._go_on

    def finish(self) -> None:
        """Complete the trace. What the last token ended is not acted upon otherwise, for nothing follows it."""
        if self.trace is not None:
            self.reroute_before_forward()

    def reroute_before_forward(self) -> None:
        """Re-route the rows whose newest token ended a sentence, if that is still to be done."""
        look, self._look = self._look, None
        candidates = [] if look is None else look.rows()
        if look is None or not candidates:
            return
        rows, views, texts, undecided = [], [], [], []
        for row, tokens in zip(candidates, look.generated[candidates].tolist(), strict=True):
            text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
            ended, is_open = self._ended(row, text)
            undecided.append(is_open)
            if ended:
                rows.append(row)
                texts.append(text)
                views.append(view_text(self.view, self.prompts[row], text, self._finished[row], self.tokenizer, self._tail))
        assert self._undecided is not None
        self._undecided[candidates] = torch.tensor(undecided, device=self._undecided.device)
        if rows:
            weights = self._weights(rows, views, texts)
            if self.refresh is not None:
                self.refresh(rows, weights.to(self.state.weights), look.input_ids)
            self.state.update_rows(torch.tensor(rows, device=self.state.weights.device), weights.to(self.state.weights))
            self.num_reroutes += len(rows)
            self._note(rows, views, texts, weights)

    def _ended(self, row: int, text: str) -> tuple[bool, bool]:
        """Whether a sentence has ended in the row's text since the last look, and whether a stop in it is still undecided."""
        count, undecided = ended_sentences(self.prompts[row], text)
        ended = count > self._finished[row]
        self._finished[row] = max(count, self._finished[row])
        return ended, undecided

    def _weights(self, rows: list[int], views: list[str], texts: list[str]) -> Tensor:
        ids = () if self.encode is None else (self.encode(rows, views),)
        if self.task_names is None:
            return self.route(views, None, *ids) if ids else self.route(views)
        indices = [
            answer_index(asked_questions(self.prompts[row]), text, self._finished[row]) for row, text in zip(rows, texts, strict=True)
        ]
        names = [segment_task(self.task_names[row], index) for row, index in zip(rows, indices, strict=True)]
        return self.route(views, names, *ids)

    def _note(self, rows: list[int], views: list[str], texts: list[str], weights: Tensor) -> None:
        if self.trace is None:
            return
        for row, view, text, chosen in zip(rows, views, texts, weights, strict=True):
            self.trace.append(trace_entry(row, self._finished[row], view, chosen, self.names, at=len(text)))


def trace_entry(row: int, sentence_idx: int, view: str, weights: Tensor, names: Sequence[str], *, at: int = 0) -> dict[str, Any]:
    """One line of a routing trace: which experts speak once ``at`` characters are generated, and what the router read."""
    return {"row": row, "sentence_idx": sentence_idx, "at": at, "view_text": view, "weights": kept_experts(weights, names)}


def kept_experts(weights: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Routing weights (E,) that are not zero, by name; of weights that differ from layer to layer, (L E,), the mean over layers."""
    values = weights.reshape(-1, len(names)).mean(dim=0).tolist()
    return {name: round(value, 4) for name, value in zip(names, values, strict=True) if value != 0}


def with_watchers(watchers: Sequence[StoppingCriteria], given: Any) -> StoppingCriteriaList:
    """The caller's stopping criteria after ours, which never stop anything."""
    return StoppingCriteriaList([*watchers, *(given or [])])
