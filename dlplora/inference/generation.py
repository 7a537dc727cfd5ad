"""Sentence-level re-routing inside Hugging Face ``generate``.

``SentenceRerouter`` is a stopping criterion that never stops anything: it is called when a token has been appended and before the
next forward, so the first token of a new sentence is already processed under the new routing weights. A stop is known to end a
sentence once the character behind it is known, and with BPE that comes with the next token, the first one of the new sentence.
What becomes of keys and values already cached is ``kv_policy``'s business.

The host must know that a sentence has ended before the next forward starts, and must not wait for the device to learn that none has.
So the rows that may have ended one are found on the device, from a table over the vocabulary, and copied to the host without
waiting; ``generate`` then waits for the device itself, to see whether all rows are finished; and the copy is read right after
that, before the next forward. Only where the table says "perhaps" are tokens fetched and looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from dlplora.errors import GenerationError
from dlplora.inference.prompt_routing import answer_index, answers_by_line, asked_questions, segment_task, segment_text
from dlplora.inference.sentences import STOP_CHARACTERS, last_question, sentence_end_positions
from dlplora.modules.routing_state import RoutingState

VIEWS = ("tail", "window", "whole", "segment")
WINDOW_TOKENS = 64
_LOOK_BACK = 3
"""Tokens between a stop character and the white space that confirms it: closing quotes and brackets."""


def view_text(
    view: str, prompt: str, generated: str, num_sentences: int, tokenizer: Any, tail: Callable[[str], str] = last_question
) -> str:
    """What the router reads at a sentence end.

    Args:
        view: ``tail``: the prompt's last question and everything generated since; ``window``: the last 64 tokens of prompt and
            text; ``whole``: all of it; ``segment``: the i-th question of the prompt for the i-th answer (``prompt_routing``).
        prompt: The prompt of the row.
        generated: Text generated so far.
        num_sentences: Sentences finished so far.
        tokenizer: Counts the tokens of ``window``.
        tail: Prompt -> its last question; whoever reads the same prompts again gives one that remembers.

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


@dataclass
class _Row:
    """Progress of one generated row."""

    start: int
    """Index, in generated tokens, where the running sentence began to be watched."""
    finished: int = 0
    """Sentences ended so far."""


class VocabularyTable:
    """Which tokens can end, or confirm the end of, a sentence; computed once per tokenizer."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        pieces = [str(tokenizer.decode([index])) for index in range(min(size, len(tokenizer)))]
        # A piece alone may lose its leading space (SentencePiece marks it with a character of its own).
        raw = tokenizer.convert_ids_to_tokens(list(range(len(pieces))))
        # A character spelt byte by byte (。 and … often are) shows up as U+FFFD until its last byte; only the text can tell.
        torn = ["\ufffd" in piece for piece in pieces]
        stop = [part or any(character in piece for character in STOP_CHARACTERS) for piece, part in zip(pieces, torn, strict=True)]
        space = [piece[:1].isspace() or str(token)[:1] in {"Ġ", "▁"} for piece, token in zip(pieces, raw, strict=True)]
        inner = ["\n" in piece or bool(sentence_end_positions(piece, final=False)) for piece in pieces]
        inner = [part or whole for part, whole in zip(torn, inner, strict=True)]
        pad = [False] * (size - len(pieces))
        self.stop = torch.tensor(stop + pad)
        self.space = torch.tensor(space + pad)
        self.inner = torch.tensor(inner + pad)

    def to(self, device: torch.device) -> VocabularyTable:
        """Move the tables to a device in place."""
        self.stop, self.space, self.inner = self.stop.to(device), self.space.to(device), self.inner.to(device)
        return self

    def candidates(self, new: Tensor, recent: Tensor) -> Tensor:
        """Whether the newest token of each row may have ended a sentence, boolean (B,); nothing waits for the device.

        Args:
            new: Newest token of each row (B,).
            recent: The tokens before it (B, at most 3).
        """
        confirmed = self.space[new] & self.stop[recent].any(dim=1) if recent.shape[1] else torch.zeros_like(self.space[new])
        return confirmed | self.inner[new]


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
        route: Texts -> routing weights (N, E); with ``task_names`` it is called with a task name for each text as well.
        prompts: Prompt text of each row.
        tokenizer: Decodes generated tokens.
        table: Vocabulary table of the tokenizer.
        prompt_width: Tokens of the padded prompt.
        view: What the router reads.
        trace: If a list, receives one dict per re-route.
        names: Expert names, for the trace.
        task_names: The protocol's name of each row's task, one a question for composite prompts; None where it has none.
        refresh: Called with rows, weights and tokens before the plans change, to bring the cache in line.
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
    ) -> None:
        self.state, self.route, self.prompts, self.tokenizer, self.table = state, route, list(prompts), tokenizer, table
        self.width, self.view, self.trace, self.names = prompt_width, view, trace, tuple(names)
        self._rows = [_Row(start=0) for _ in prompts]
        self._tail = functools.cache(last_question)
        self.task_names, self.refresh = task_names, refresh
        self.num_reroutes = 0
        self.deferred = False
        """Whether the caller promises to call ``reroute_before_forward`` before the next forward."""
        self._look: _Look | None = None
        self._go_on: Tensor | None = None

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
        if self._go_on is None:
            self._go_on = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        generated = input_ids[:, self.width :]
        if generated.shape[1]:
            self._look = _Look(input_ids, self.width, self.table.candidates(generated[:, -1], generated[:, -1 - _LOOK_BACK : -1]))
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
        rows, views, texts = [], [], []
        for row, tokens in zip(candidates, look.generated[candidates].tolist(), strict=True):
            ended = self._ended(row, tokens)
            if ended is not None:
                rows.append(row)
                texts.append(ended)
                views.append(view_text(self.view, self.prompts[row], ended, self._rows[row].finished, self.tokenizer, self._tail))
        if rows:
            weights = self._weights(rows, views, texts)
            if self.refresh is not None:
                self.refresh(rows, weights.to(self.state.weights), look.input_ids)
            self.state.update_rows(torch.tensor(rows, device=self.state.weights.device), weights.to(self.state.weights))
            self.num_reroutes += len(rows)
            self._note(rows, views, texts, weights)

    def _ended(self, row: int, ids: list[int]) -> str | None:
        """The text generated so far if a sentence has ended since the last look, else None."""
        progress = self._rows[row]
        running = str(self.tokenizer.decode(ids[progress.start :], skip_special_tokens=True))
        ends = sentence_end_positions(running, final=False)
        if not ends and not progress.finished and "\n" in running and not running.strip() and answers_by_line(self.prompts[row]):
            ends = [len(running)]  # the first answer was left empty: the line that ends it is an end all the same
        if not ends:
            return None
        progress.finished += len(ends)
        # Text behind the last end belongs to the new sentence; it is shorter than the newest token, so watching from there is enough.
        progress.start = len(ids) - 1 if running[ends[-1] :].strip() else len(ids)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _weights(self, rows: list[int], views: list[str], texts: list[str]) -> Tensor:
        if self.task_names is None:
            return self.route(views)
        indices = [
            answer_index(asked_questions(self.prompts[row]), text, self._rows[row].finished) for row, text in zip(rows, texts, strict=True)
        ]
        names = [segment_task(self.task_names[row], index) for row, index in zip(rows, indices, strict=True)]
        return self.route(views, names)

    def _note(self, rows: list[int], views: list[str], texts: list[str], weights: Tensor) -> None:
        if self.trace is None:
            return
        for row, view, text, chosen in zip(rows, views, texts, weights, strict=True):
            self.trace.append(trace_entry(row, self._rows[row].finished, view, chosen, self.names, at=len(text)))


def trace_entry(row: int, sentence_idx: int, view: str, weights: Tensor, names: Sequence[str], *, at: int = 0) -> dict[str, Any]:
    """One line of a routing trace: which experts speak once ``at`` characters are generated, and what the router read."""
    return {"row": row, "sentence_idx": sentence_idx, "at": at, "view_text": view, "weights": kept_experts(weights, names)}


def kept_experts(weights: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Routing weights (E,) that are not zero, by name."""
    values = weights.tolist()
    return {name: round(value, 4) for name, value in zip(names, values, strict=True) if value != 0}


def with_watchers(watchers: Sequence[StoppingCriteria], given: Any) -> StoppingCriteriaList:
    """The caller's stopping criteria after ours, which never stop anything."""
    return StoppingCriteriaList([*watchers, *(given or [])])
