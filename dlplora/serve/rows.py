"""A running request: its generated tokens, and where its sentences end."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dlplora.inference.generation import EndedSentences, VocabularyTable, view_text
from dlplora.inference.question import routed_tail
from dlplora.serve.jobs import Finished, FinishReason, Job, Piece
from dlplora.serve.sampling import Chosen, Sampler
from dlplora.serve.text import Detokenizer, StopTexts


@dataclass(eq=False)
class Row:
    """One job in a slot.

    Attributes:
        vocabulary: Says which tokens can end a sentence.
        cached: Tokens with keys and values in the slot.
        pending: Tokens to process before the next one can be sampled; for a new job the prompt.
        resumes: Whether ``pending`` is a prefix that is processed again under new weights, after which a token waits already.
        newest: The last sampled token, not processed yet.
        out_of_scope: Whether the prompt is; then the base model answers to the end.
        routing_s: Time spent on routing before the first token, s: question, router, buffers; shared by requests routed together.
    """

    job: Job
    tokenizer: Any
    vocabulary: VocabularyTable
    device: torch.device
    pending: list[int] = field(default_factory=list)
    cached: int = 0
    resumes: bool = False
    newest: int | None = None
    weights: Tensor | None = None
    routing_s: float = 0.0
    out_of_scope: bool = False

    def __post_init__(self) -> None:
        self.pending = list(self.job.prompt_ids)
        self.sampler = Sampler(self.job.sampling, self.device)
        self.detokenizer = Detokenizer(self.tokenizer)
        self.stops = StopTexts(self.job.stops)
        self.shown: list[Chosen] = []
        self.started = time.monotonic()
        self.first_token_s: float | None = None
        self._sentences = EndedSentences(self.job.routed_text)
        self._undecided = False
        self._tail = functools.cache(routed_tail)

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.detokenizer.tokens)

    def take(self, chosen: Chosen, eos: frozenset[int]) -> FinishReason | None:
        """Add a sampled token, report new text, and say whether the answer ends."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.job.submitted
        if chosen.token in eos and not self.job.ignore_eos:
            self._show(self.stops.finish())
            return "stop"
        self.newest = chosen.token
        self.shown.append(chosen if chosen.logprob is None else replace(chosen, offset=self.detokenizer.length))
        text, stopped = self.stops.push(self.detokenizer.push(chosen.token))
        if stopped:
            self._show(text)
            return "stop"
        if self.num_generated >= self.job.max_tokens:
            rest, stopped = self.stops.push(self.detokenizer.finish())
            self._show(text + rest + ("" if stopped else self.stops.finish()))
            return "stop" if stopped else "length"
        if text:
            self._show(text)
        return None

    def _show(self, text: str) -> None:
        if text or self.shown:
            self.job.report(Piece(text, tuple(self.shown)))
            self.shown = []

    def ended_sentence(self, view: str) -> str | None:
        """What the router reads if the newest token ended a sentence, else None."""
        tokens = self.detokenizer.tokens
        look = self._undecided or self.vocabulary.may_decide(tokens[-1])
        self._undecided = self._undecided or self.vocabulary.holds_stop(tokens[-1])
        if not look:
            return None
        generated = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        ended = self._sentences.look(generated)
        self._undecided = self._sentences.is_open
        if not ended:
            return None
        return view_text(view, self.job.routed_text, generated, self._sentences.number, self.tokenizer, self._tail)

    def restart(self) -> None:
        """Process prompt and answer again, for a policy that does not keep keys and values of other adapters."""
        self.pending = [*self.job.prompt_ids, *self.detokenizer.tokens[:-1]]
        self.cached, self.resumes = 0, True

    def finish(self, reason: FinishReason) -> None:
        """Report the end of the answer."""
        waited = self.started - self.job.submitted
        self.job.report(
            Finished(reason, len(self.job.prompt_ids), self.num_generated, waited, self.first_token_s, self.job.question_s + self.routing_s)
        )
