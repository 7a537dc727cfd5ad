"""Which part of a request's context is routed, given the messages and documents that the harness knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dlplora.inference.chat_formats import TurnMarkers
from dlplora.inference.question import content_text, document_texts, message_text, question_text

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

CONVERSATIONS_KEPT = 100_000
"""Number of rendered conversations with a cached last message; in others the markers of the chat template find it."""


class RoutedTexts:
    """Finds the question in the context of a request.

    Args:
        markers: Of the tokenizer's chat template.
    """

    def __init__(self, markers: TurnMarkers | None) -> None:
        self.markers = markers
        self._last_messages: dict[str, str] = {}

    def remember(self, rendered: str, messages: Sequence[Mapping[str, str]]) -> None:
        """Note the last message of the user after a rendered conversation."""
        said = [content_text(message["content"]) for message in messages if message["role"] == "user"]
        if said and len(self._last_messages) < CONVERSATIONS_KEPT:
            self._last_messages[rendered] = said[-1]

    def of(self, request: Instance) -> str:
        """The question of a request with a context; without system instruction, task description and few-shot examples."""
        context, known = str(request.args[0]), document_texts(request.doc)
        said = self._last_messages.get(context)
        return question_text(context, self.markers, known) if said is None else message_text(said, self.markers, known)
