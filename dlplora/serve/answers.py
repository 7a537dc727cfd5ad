"""Convert the engine's events to responses of the OpenAI API."""

from __future__ import annotations

import string
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from dlplora.serve.jobs import Decision, Event, Failed, Finished, Piece, Sentence, Started
from dlplora.serve.logprobs import TokenTexts
from dlplora.serve.sampling import Chosen

_HEADER_SAFE = string.punctuation.replace("%", "")


def described(decision: Decision) -> dict[str, Any]:
    """A decision as JSON."""
    return {
        "decision": decision.kind,
        "out_of_scope": decision.out_of_scope,
        "adapter": decision.adapter,
        "confidence": None if decision.confidence is None else round(decision.confidence, 6),
        "weights": dict(decision.weights),
        "seconds": round(decision.seconds, 6),
    }


def headers_of(decision: Decision) -> dict[str, str]:
    """Response headers that name what was decided for the prompt; an adapter's name is percent-encoded where it is not plain ASCII."""
    kind = "base: out of scope" if decision.out_of_scope else decision.kind
    found = {"x-dlplora-decision": kind, "x-dlplora-selected-adapter": quote(decision.adapter, safe=_HEADER_SAFE, errors="replace")}
    if decision.confidence is not None:
        found["x-dlplora-confidence"] = f"{decision.confidence:.6f}"
    return found


@dataclass
class Answer:
    """What is known of one choice."""

    index: int
    text: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    sentences: list[tuple[int, Decision]] = field(default_factory=list)
    finished: Finished | None = None

    def take(self, event: Event) -> None:
        """Add an event.

        Raises:
            DLPLoRAError: If the request failed.
        """
        if isinstance(event, Started):
            self.sentences.append((0, event.decision))
        elif isinstance(event, Piece):
            self.text += event.text
            self.tokens.extend(event.tokens)
        elif isinstance(event, Sentence):
            self.sentences.append((event.start, event.decision))
        elif isinstance(event, Finished):
            self.finished = event
        elif isinstance(event, Failed):
            raise event.error

    def trace(self) -> list[dict[str, Any]]:
        """The routing of each sentence with its text."""
        ends = [*(start for start, _ in self.sentences[1:]), len(self.text)]
        return [
            {"start": start, "end": end, "text": self.text[start:end], **described(decision)}
            for (start, decision), end in zip(self.sentences, ends, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class ResponseFormat:
    """How the answers of one request are written.

    Attributes:
        chat: Whether it is a chat completion.
        model: What the request named.
        texts: Of single tokens, for log-probabilities.
        logprobs: Whether they are wanted.
        trace: Whether the routing of each sentence is wanted.
        n: Choices for each prompt.
    """

    chat: bool
    model: str
    texts: TokenTexts
    logprobs: bool
    trace: bool
    n: int = 1
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, chunk: bool) -> dict[str, Any]:
        name = "chat.completion" if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": f"{name}.chunk" if chunk and self.chat else name,
            "created": self.created,
            "model": self.model,
        }

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The response of a request that does not stream."""
        choices = []
        for answer in answers:
            content: dict[str, Any] = {"message": {"role": "assistant", "content": answer.text}} if self.chat else {"text": answer.text}
            choices.append(self._choice(answer.index, content, answer.tokens, _reason(answer)))
        body = {**self._head(False), "choices": choices, "usage": self._usage(answers)}
        return {**body, **self._traced(answers)}

    def _choice(self, index: int, content: dict[str, Any], tokens: Sequence[Chosen], reason: str | None) -> dict[str, Any]:
        written = None
        if self.logprobs and tokens:
            written = self.texts.of_chat(tokens) if self.chat else self.texts.of_completion(tokens)
        return {"index": index, **content, "logprobs": written, "finish_reason": reason}

    def _traced(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return {"dlplora": {"choices": [answer.trace() for answer in answers]}} if self.trace else {}

    def first(self, index: int) -> dict[str, Any]:
        """The first chunk of a streamed chat choice."""
        return {**self._head(True), "choices": [self._choice(index, {"delta": {"role": "assistant", "content": ""}}, (), None)]}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A chunk with new text."""
        content: dict[str, Any] = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        return {**self._head(True), "choices": [self._choice(index, content, piece.tokens, None)]}

    def sentence(self, index: int, start: int, decision: Decision) -> dict[str, Any]:
        """A chunk without text that says, while the answer streams, which adapters apply from a character on."""
        content: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        extra = {"dlplora": {"choice": index, "start": start, **described(decision)}}
        return {**self._head(True), "choices": [self._choice(index, content, (), None)], **extra}

    def last(self, answer: Answer) -> dict[str, Any]:
        """The chunk that ends a choice."""
        content: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return {**self._head(True), "choices": [self._choice(answer.index, content, (), _reason(answer))]}

    def end(self, answers: Sequence[Answer], usage: bool) -> dict[str, Any] | None:
        """The chunk after the choices: usage and trace, where they are wanted."""
        if not (usage or self.trace):
            return None
        return {**self._head(True), "choices": [], **({"usage": self._usage(answers)} if usage else {}), **self._traced(answers)}

    def _usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        """Token counts; a prompt counts once for all of its choices."""
        ends = [answer.finished for answer in answers if answer.finished is not None]
        prompts = sum(end.prompt_tokens for end in ends[:: self.n])
        completions = sum(end.completion_tokens for end in ends)
        return {"prompt_tokens": prompts, "completion_tokens": completions, "total_tokens": prompts + completions}


def _reason(answer: Answer) -> str | None:
    return None if answer.finished is None else answer.finished.reason
