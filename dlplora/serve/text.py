"""Text of a running request: incremental decoding, stop texts, and sentence ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns a growing list of tokens into text, a piece at a time.

    A token's text can depend on the token before (leading spaces) and on the next one (a character spelt in several bytes). So the text
    between two safe positions is decoded together, and an incomplete character waits.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.text = ""
        self.length = 0
        """Whole characters so far, with those that wait behind an incomplete one."""
        self._start = self._shown = 0

    def push(self, token: int) -> str:
        """Add one token; returns the text that is now certain."""
        self.tokens.append(token)
        shown = self._decode(self.tokens[self._start : self._shown])
        whole = self._decode(self.tokens[self._start :])
        if whole.endswith(REPLACEMENT) or len(whole) <= len(shown):
            self.length = len(self.text) + max(0, len(whole.rstrip(REPLACEMENT)) - len(shown))
            return ""
        self._start, self._shown = self._shown, len(self.tokens)
        new = whole[len(shown) :]
        self.text += new
        self.length = len(self.text)
        return new

    def finish(self) -> str:
        """The text held back because its last character is incomplete."""
        rest = self._decode(self.tokens[self._start :])[len(self._decode(self.tokens[self._start : self._shown])) :]
        self._shown = len(self.tokens)
        self.text += rest
        return rest

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


class StopTexts:
    """Holds back text that may be the beginning of a stop text, and finds the one that is complete first."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; returns what may be shown, and whether a stop text was found (and cut off with everything after it)."""
        self._held += text
        found = [(place + len(stop), place) for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)[1]], ""
            return shown, True
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
