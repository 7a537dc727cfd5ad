"""Log-probabilities in OpenAI's two formats, with the text and the bytes of single tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dlplora.serve.sampling import Chosen
from dlplora.serve.text import REPLACEMENT

_PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTES = {chr(one): one for one in _PLAIN} | {chr(256 + i): one for i, one in enumerate(sorted({*range(256)} - {*_PLAIN}))}
"""Byte-level tokenizers write every byte as one of these characters."""
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""SentencePiece has such tokens for the bytes of characters that it does not know."""


class TokenTexts:
    """Text and bytes of single tokens; a token may hold a part of a character only.

    Args:
        tokenizer: Of the base model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def raw(self, token: int) -> bytes:
        """The bytes that a token adds to a text."""
        if token not in self._known:
            self._known[token] = self._bytes(token)
        return self._known[token]

    def text(self, token: int) -> str:
        r"""The text of a token; ``\xe2\x82`` for bytes that are no whole characters, as OpenAI writes them."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{one:02x}" for one in raw)

    def name(self, token: int) -> str:
        """``text``, with OpenAI's mark ``bytes:`` for what is no text."""
        text = self.text(token)
        return text if text.encode() == self.raw(token) else f"bytes:{text}"

    def _bytes(self, token: int) -> bytes:
        once = str(self.tokenizer.decode([token]))
        twice = str(self.tokenizer.decode([token, token]))  # some decoders drop the space at the beginning of a text
        text = twice[len(once) :] if twice.startswith(once) else once
        if REPLACEMENT not in text:
            return text.encode()
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        if found := _FALLBACK.fullmatch(piece):
            return bytes.fromhex(found[1])
        if all(one in _BYTES for one in piece):
            return bytes(_BYTES[one] for one in piece)
        return text.encode()

    def of_completion(self, tokens: Sequence[Chosen]) -> dict[str, Any]:
        """``logprobs`` of a completion; the sampled token is among the alternatives, as in OpenAI's API."""
        return {
            "tokens": [self.name(one.token) for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [{self.name(token): value for token, value in (*one.alternatives, (one.token, one.logprob))} for one in tokens],
            "text_offset": [one.offset for one in tokens],
        }

    def of_chat(self, tokens: Sequence[Chosen]) -> dict[str, Any]:
        """``logprobs`` of a chat completion."""

        def entry(token: int, value: float | None) -> dict[str, Any]:
            return {"token": self.text(token), "logprob": value, "bytes": list(self.raw(token))}

        return {
            "content": [
                {**entry(one.token, one.logprob), "top_logprobs": [entry(token, value) for token, value in one.alternatives]}
                for one in tokens
            ]
        }
