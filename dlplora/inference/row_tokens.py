"""Token ids of a growing text, without tokenising its unchanged beginning again.

At every sentence end the router reads the prompt's last question and all text generated since; only the end of it is new. If a tokenizer
splits text into words first, a text can be cut before a space between two words and its parts encoded separately, because neither part
depends on the other. ``piece_encoder`` knows which tokenizers do so; for others the whole text is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import regex

from dlplora.encoding import encode_texts, is_plain

_CUT = regex.compile(r"(?r)(?<=[!-~]) (?=[A-Za-z])")
"""A space after a visible ASCII character and before a letter, the last one first."""
_SPLITS = frozenset(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # Llama 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # Qwen 2
    )
)
"""Patterns with matches that begin at such a space and never extend across it."""
_LONG = 48
"""Characters that are encoded again rather than cut."""
_SAMPLE = "Who came, and when? It's 3 o'clock.\nAnswer: Mia and Tom saw 42 plums"


class PieceEncoder:
    """Encodes pieces of text without special tokens, for a tokenizer that encodes them independently (``piece_encoder``)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, piece: str) -> list[int]:
        """Ids of a piece."""
        found: list[int] = self.tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False).ids
        return found


def piece_encoder(tokenizer: Any) -> PieceEncoder | None:
    """The encoder of a tokenizer; None if a text cannot be cut."""
    from transformers import PreTrainedTokenizerFast

    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    return PieceEncoder(tokenizer) if fast and _splits_into_words(tokenizer.backend_tokenizer) else None


def _splits_into_words(backend: Any) -> bool:
    """Whether no step of a fast tokenizer depends on text across a space between two words."""
    if backend.normalizer is not None and _state(backend.normalizer) != {"type": "NFC"}:
        return False
    if getattr(backend.model, "dropout", None):
        return False
    for token in backend.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or token.single_word or any(char.isspace() for char in token.content):
            return False
    splitter = None if backend.pre_tokenizer is None else _state(backend.pre_tokenizer)
    if splitter is None:
        return False
    parts = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    return all(_is_local(part) for part in parts) and any(_is_regex(part) for part in parts)


def _state(part: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(part.__getstate__())
    return found


def _is_local(part: dict[str, Any]) -> bool:
    return part["type"] == "Digits" or _is_regex(part) or (part["type"] == "ByteLevel" and not part["add_prefix_space"])


def _is_regex(part: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer splits by a pattern that is known."""
    if part["type"] == "ByteLevel":
        return bool(part["use_regex"]) and not part["add_prefix_space"]
    isolates = part.get("behavior") == "Isolated" and not part.get("invert")
    return part["type"] == "Split" and isolates and part["pattern"].get("Regex") in _SPLITS


class RowTokens:
    """Token ids of each row's text, as the tokenizer's own call gives them; only the new end of a text is encoded.

    Args:
        tokenizer: Any.
        encoder: Of ``piece_encoder``.
    """

    def __init__(self, tokenizer: Any, encoder: PieceEncoder | None) -> None:
        self.tokenizer, self._encode = tokenizer, encoder
        self._known: dict[int, tuple[str, list[int]]] = {}
        self._around: tuple[list[int], list[int]] | None = None

    def __call__(self, rows: Sequence[int], texts: Sequence[str]) -> list[list[int]]:
        """The ids of one text a row (N), special tokens included."""
        encode = self._encode
        if encode is not None and is_plain(self.tokenizer):
            if self._around is None:
                self._around = self._special_tokens(encode)
            if self._around is not None:
                begin, end = self._around
                return [[*begin, *self._ids(encode, row, text), *end] for row, text in zip(rows, texts, strict=True)]
        return encode_texts(self.tokenizer, texts)

    def _special_tokens(self, encode: PieceEncoder) -> tuple[list[int], list[int]] | None:
        """What the tokenizer adds before and after a text; None if it does anything else, and then texts are not cut."""
        sample, whole = encode(_SAMPLE), list(self.tokenizer(_SAMPLE)["input_ids"])
        begin = next((i for i in range(len(whole)) if whole[i : i + len(sample)] == sample), None)
        if begin is None:
            self._encode = None
            return None
        return whole[:begin], whole[begin + len(sample) :]

    def _ids(self, encode: PieceEncoder, row: int, text: str) -> list[int]:
        """The ids of a text; those up to its last safe cut are kept for the row's next text."""
        before, ids = self._known.get(row, ("", []))
        if not text.startswith(before):
            before, ids = "", []
        start = len(before)
        if len(text) - start > _LONG and (cut := _CUT.search(text, start + 1)) is not None:
            ids = [*ids, *encode(text[start : cut.start()])]
            start = cut.start()
            self._known[row] = text[:start], ids
        return [*ids, *encode(text[start:])]
