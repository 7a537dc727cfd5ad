"""Sentence-level re-routing inside Hugging Face ``generate``.

``SentenceRerouter`` is a stopping criterion that never stops generation. It is called after a token was appended and before the next
forward pass, so the first token of a new sentence is processed under the new routing weights. A stop is known to end a sentence once the
character after it is known; with BPE that comes with the next token, the first one of the new sentence. ``kv_policy`` decides what happens
to the cached keys and values.

The host must know before the next forward pass whether a sentence has ended, without waiting for the device at every token. So a table over
the vocabulary finds on the device which rows may have ended a sentence, and the result is copied to the host asynchronously. ``generate``
itself then waits for the device to see whether all rows are finished; the copy is read right after that. Only for rows that may have ended
a sentence are tokens fetched and decoded, and the rule of ``sentences`` decides on the text. A row stays a candidate from a token with a
stop until the rule has decided. Rows are thus re-routed exactly where the rule finds an end in the text so far, with any tokenizer.

A line break is known to end a sentence as soon as it is generated, so the first token of the next sentence is already predicted under the
new weights. For other stops the next token decides, and it is the first one processed under them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from dlplora.errors import GenerationError
from dlplora.inference.prompt_routing import answer_index, answers_by_line, asked_questions, num_tasks, segment_task, segment_text
from dlplora.inference.question import routed_tail
from dlplora.inference.sentences import decides_sentence, known_sentence_ends, may_end_sentence
from dlplora.modules.routing_state import RoutingState

VIEWS = ("tail", "window", "whole", "segment")
WINDOW_TOKENS = 64
MAY_DECIDE, HOLDS_STOP = 1, 2
"""Kinds of tokens; see ``VocabularyTable``."""


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


class EndedSentences:
    """Counts the finished sentences of a text that is still being generated. Only the new end of the text is read.

    Args:
        prompt: What is routed of the row's prompt.

    Attributes:
        number: Sentences that have ended.
        is_open: Whether a stop in the text is undecided.
    """

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.number, self.is_open = 0, False
        self._read, self._num_read = "", 0

    def look(self, generated: str) -> bool:
        """Whether another sentence has ended in the text generated so far."""
        if not generated.startswith(self._read):
            self._read, self._num_read = "", 0
        ends, self.is_open = known_sentence_ends(generated, len(self._read))
        if ends:
            self._read, self._num_read = generated[: ends[-1]], self._num_read + len(ends)
        count = self._num_read
        blank = generated[: len(generated) - len(generated.lstrip())]
        if "\n" in blank and answers_by_line(self.prompt):
            count += 1  # the first answer was left empty; its line break is still an end
        another = count > self.number
        self.number = max(count, self.number)
        return another


class VocabularyTable:
    """Which tokens hold a character that can end a sentence; computed once per tokenizer.

    A token is of two kinds, or of none:

        stop: Tokens after which the text is looked at with every further token until the sentence rule has decided.
        inner: Tokens that may decide an end themselves: with a line break, with a stop that is not their last character, or with part
            of a character that is spelt byte by byte (``。`` often is), which can only be recognised in the text.

    Attributes:
        kinds: Of each token, uint8 (V,): ``MAY_DECIDE`` and ``HOLDS_STOP`` added up.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        pieces = [str(tokenizer.decode([index])) for index in range(min(size, len(tokenizer)))]
        pad = [False] * (size - len(pieces))
        stop = torch.tensor([may_end_sentence(piece) for piece in pieces] + pad)
        inner = torch.tensor(["\ufffd" in piece or decides_sentence(piece) for piece in pieces] + pad)
        self._stop, self._inner = (frozenset(flags.nonzero().flatten().tolist()) for flags in (stop, inner))
        self.kinds = inner.byte() * MAY_DECIDE + stop.byte() * HOLDS_STOP

    def holds_stop(self, token: int) -> bool:
        """``stop`` of a token that the host knows."""
        return token in self._stop

    def may_decide(self, token: int) -> bool:
        """``inner`` of a token that the host knows."""
        return token in self._inner

    def to(self, device: torch.device) -> VocabularyTable:
        """Move the table to a device in place."""
        self.kinds = self.kinds.to(device)
        return self


class _Look:
    """The kinds of the newest tokens, on their way to the host.

    Args:
        input_ids: Prompt and tokens generated so far.
        width: Tokens of the padded prompt.
        kinds: Of the newest tokens, uint8 (B,), on the device.
    """

    def __init__(self, input_ids: Tensor, width: int, kinds: Tensor) -> None:
        self.input_ids, self.generated = input_ids, input_ids[:, width:]
        self._arrived: Any = None
        self._kinds = kinds
        if kinds.device.type == "cuda":
            self._kinds = torch.empty(kinds.shape, dtype=kinds.dtype, pin_memory=True)
            self._kinds.copy_(kinds, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def kinds(self) -> list[int]:
        """One kind per row; waits only if the copy is not finished."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._kinds.tolist()


class RoutedCriterion(StoppingCriteria):
    """A stopping criterion that ``FusedCausalLM.generate`` tells the routing state of its request."""

    state: RoutingState | None = None


class SentenceRerouter(StoppingCriteria):
    """Re-routes each row on its own when its generated text has ended a sentence. Greedy decoding and sampling only.

    Args:
        state: The routing state of this generation; updated in place.
        route: Texts -> routing weights (N, E); with ``task_names`` it is called with a task name for each text as well, and with ``encode``
            with the texts' token ids.
        prompts: What is routed of each row's prompt (``question_text``).
        tokenizer: Decodes generated tokens.
        table: Vocabulary table of the tokenizer.
        prompt_width: Tokens of the padded prompt.
        view: What the router reads.
        trace: If a list, receives one dict per re-route.
        names: Expert names, for the trace.
        task_names: The protocol's name of each row's task, one per question for composite prompts; None where it has none.
        refresh: Called with rows, weights and tokens before the routing weights change, to bring the cache in line.
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
        self._sentences = [EndedSentences(prompt) for prompt in self.prompts]
        self._open: set[int] = set()
        self._tail = functools.cache(routed_tail)
        self.task_names, self.refresh, self.encode = task_names, refresh, encode
        self.num_reroutes = 0
        self.deferred = False
        """Whether the caller promises to call ``reroute_before_forward`` before the next forward."""
        self._look: _Look | None = None
        self._go_on: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        """Look at the newest token of each row; always returns False (B,).

        Raises:
            GenerationError: If the decoding loop continued without the promised call of ``reroute_before_forward``.
        """
        if self._look is not None:
            raise GenerationError(
                "this decoding loop runs no forward pass between two tokens, so sentence-level routing cannot follow it; "
                "use greedy decoding or sampling, or route once per prompt (dlp: reroute=prompt)."
            )
        if self._go_on is None:
            self._go_on = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        if input_ids.shape[1] > self.width:
            self._look = _Look(input_ids, self.width, self.table.kinds[input_ids[:, -1]])
            if not self.deferred:
                self.reroute_before_forward()
        return self._go_on

    def finish(self) -> None:
        """Complete the trace. A sentence end at the last token has no other effect, since nothing follows."""
        if self.trace is not None:
            self.reroute_before_forward()

    def reroute_before_forward(self) -> None:
        """Re-route the rows with a sentence end at the newest token, if this has not been done."""
        look, self._look = self._look, None
        candidates = [] if look is None else self._candidates(look.kinds())
        if look is None or not candidates:
            return
        rows, views, texts = [], [], []
        for row, tokens in zip(candidates, look.generated[candidates].tolist(), strict=True):
            text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
            sentences = self._sentences[row]
            if sentences.look(text):
                rows.append(row)
                texts.append(text)
                views.append(view_text(self.view, self.prompts[row], text, sentences.number, self.tokenizer, self._tail))
            if sentences.is_open:
                self._open.add(row)
        if rows:
            weights = self._weights(rows, views, texts).to(self.state.weights)
            if self.refresh is not None:
                self.refresh(rows, weights, look.input_ids)
            self.state.update_rows(torch.tensor(rows, device=self.state.weights.device), weights)
            self.num_reroutes += len(rows)
            self._note(rows, views, texts, weights)

    def _candidates(self, kinds: Sequence[int]) -> list[int]:
        """Rows to check. After a token with a stop, a row is checked until the rule has decided."""
        found = [row for row, kind in enumerate(kinds) if kind & MAY_DECIDE or row in self._open]
        self._open = {row for row, kind in enumerate(kinds) if kind & HOLDS_STOP}.difference(found)
        return found

    def _weights(self, rows: list[int], views: list[str], texts: list[str]) -> Tensor:
        ids = () if self.encode is None else (self.encode(rows, views),)
        if self.task_names is None:
            return self.route(views, None, *ids) if ids else self.route(views)
        indices = [self._answer(row, text) for row, text in zip(rows, texts, strict=True)]
        names = [segment_task(self.task_names[row], index) for row, index in zip(rows, indices, strict=True)]
        return self.route(views, names, *ids)

    def _answer(self, row: int, text: str) -> int:
        """Which answer of a row comes next, from 0; every sentence is one if more tasks were given than the layout has questions."""
        asked, number = asked_questions(self.prompts[row]), self._sentences[row].number
        told = num_tasks(None if self.task_names is None else self.task_names[row])
        return number if told > max(1, len(asked.spans)) else answer_index(asked, text, number)

    def _note(self, rows: list[int], views: list[str], texts: list[str], weights: Tensor) -> None:
        if self.trace is None:
            return
        for row, view, text, chosen in zip(rows, views, texts, weights, strict=True):
            self.trace.append(trace_entry(row, self._sentences[row].number, view, chosen, self.names, at=len(text)))


def trace_entry(row: int, sentence_idx: int, view: str, weights: Tensor, names: Sequence[str], *, at: int = 0) -> dict[str, Any]:
    """One line of a routing trace: which experts are used from character ``at`` on, and what the router read."""
    return {"row": row, "sentence_idx": sentence_idx, "at": at, "view_text": view, "weights": kept_experts(weights, names)}


def kept_experts(weights: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Routing weights (E,) that are not zero, by name; of weights that differ from layer to layer, (L E,), the mean over layers."""
    values = weights.reshape(-1, len(names)).mean(dim=0).tolist()
    return {name: round(value, 4) for name, value in zip(names, values, strict=True) if value != 0}


def with_watchers(watchers: Sequence[StoppingCriteria], given: Any) -> StoppingCriteriaList:
    """The caller's stopping criteria after ours, which never stop anything."""
    return StoppingCriteriaList([*watchers, *(given or [])])
