"""From requests to prompts: chat templates, tokens, and the text that the router reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dlplora.inference.chat_formats import learn_markers, rendered
from dlplora.inference.question import message_text, question_of_messages, question_text
from dlplora.serve.jobs import BadRequestError
from dlplora.serve.schemas import ChatRequest, CompletionRequest, Message

NANO_TEMPLATE = "{{ messages | map(attribute='content') | join('\n\n') }}\nAnswer:"
"""For the embedded model, which has no chat template and was trained on prompts that end with ``Answer:``."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: tokens, text, and what the router reads."""

    ids: tuple[int, ...]
    text: str
    routed_text: str
    question_s: float = 0.0
    """Time that finding ``routed_text`` took, s."""


class PromptBuilder:
    """Makes prompts for one tokenizer. Long texts take a while, so an event loop must call its methods in a thread.

    Args:
        tokenizer: Of the base model.
        vocab_size: Token ids that the model knows.
        limit: Tokens of a request, prompt included.
        chat_template: Jinja template for chat requests; None takes the tokenizer's.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, limit: int, chat_template: str | None = None) -> None:
        self.tokenizer, self.vocab_size, self.limit = tokenizer, vocab_size, limit
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        self._markers = learn_markers(tokenizer, chat_template)

    def chat(self, request: ChatRequest) -> Prompt:
        """The prompt of a conversation; the router reads the last user message.

        Raises:
            BadRequestError: Without a chat template, or if the template refuses the messages.
        """
        text = self._rendered(request.messages)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._checked(ids, text, lambda: self.question(request.messages), "messages")

    def question(self, messages: Sequence[Message]) -> str:
        """What the router reads of a conversation: the last user message (for the embedded model in the form it was trained on)."""
        asked = question_of_messages([{"role": message.role, "content": message.text} for message in messages], self._markers)
        if self.chat_template == NANO_TEMPLATE:
            return message_text(self._rendered([Message(role="user", content=asked)]), self._markers)
        return asked

    def routed_text(self, prompt: str) -> str:
        """What the router reads of a prompt: its question (``inference.question``)."""
        return question_text(prompt, self._markers)

    def to_route(self, prompt: str | None, messages: Sequence[Message] | None) -> str:
        """What the router reads of a prompt or a conversation that is routed without an answer.

        Raises:
            BadRequestError: If it is longer than the context, or holds nothing to route.
        """
        param = "messages" if messages else "prompt"
        text = "\n\n".join(message.text for message in messages) if messages else prompt or ""
        self._require_room(len(self.tokenizer(text)["input_ids"]), param)
        if not text.strip():
            raise BadRequestError("there is nothing to route.", param)
        return self.question(messages) if messages else self.routed_text(text)

    def _rendered(self, messages: Sequence[Message]) -> str:
        if self.chat_template is None:
            raise BadRequestError(
                "this base model has no chat template; use /v1/completions, or start the server with --chat-template FILE.", "messages"
            )
        try:
            return rendered(self.tokenizer, [message.for_template() for message in messages], self.chat_template)
        except ValueError as error:
            raise BadRequestError(f"the chat template refuses this conversation: {error}", "messages") from error

    def completion(self, request: CompletionRequest) -> list[Prompt]:
        """One or several prompts.

        Raises:
            BadRequestError: If one is empty, too long, or names a token that does not exist.
        """
        given: Any = request.prompt
        if not given:
            raise BadRequestError("'prompt' is empty.", "prompt")
        several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        return [self._of_text(one) if isinstance(one, str) else self._of_tokens(one) for one in several]

    def _of_text(self, text: str) -> Prompt:
        return self._checked(self.tokenizer(text)["input_ids"], text, lambda: self.routed_text(text), "prompt")

    def _of_tokens(self, ids: Sequence[int]) -> Prompt:
        wrong = next((one for one in ids if not 0 <= one < self.vocab_size), None)
        if wrong is not None:
            raise BadRequestError(f"token {wrong} does not exist; the vocabulary has {self.vocab_size} tokens.", "prompt")
        text = str(self.tokenizer.decode(list(ids)))
        return self._checked(ids, text, lambda: self.routed_text(text), "prompt")

    def _checked(self, ids: Sequence[int], text: str, question: Callable[[], str], param: str) -> Prompt:
        if not ids:
            raise BadRequestError(f"'{param}' is empty.", param)
        self._require_room(len(ids), param)
        started = time.perf_counter()
        routed = question()
        return Prompt(tuple(ids), text, routed, time.perf_counter() - started)

    def _require_room(self, num: int, param: str) -> None:
        if num >= self.limit:
            raise BadRequestError(
                f"this prompt has {num} tokens, which leaves no room for an answer: the context is {self.limit} tokens.",
                param,
                "context_length_exceeded",
            )

    def room(self, prompt: Prompt, wanted: int | None, default: int) -> int:
        """Tokens that may be generated.

        Raises:
            BadRequestError: If more are requested than fit.
        """
        free = self.limit - len(prompt.ids)
        if wanted is not None and wanted > free:
            raise BadRequestError(
                f"the prompt has {len(prompt.ids)} tokens and 'max_tokens' is {wanted}; together they exceed the context of {self.limit}.",
                "max_tokens",
                "context_length_exceeded",
            )
        return min(default, free) if wanted is None else wanted
