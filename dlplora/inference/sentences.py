"""Where sentences end. Pure text, no tokenizer.

A newline always ends a sentence. So does ``.``, ``!`` or ``?`` (with closing quotes or brackets behind it) before white space or
the end of the text, and ``。``, ``！``, ``？`` anywhere. A full stop of an abbreviation, an initial, a decimal or a list number does not.
"""

from __future__ import annotations

import re
from itertools import pairwise

_STOP = re.compile(r"(?:[.!?…]+[\"'”’»)\]]*(?=\s|$))|[。！？]+[”’」』）]*|\n+")
_OPENING = "([\"'“‘"
_ABBREVIATIONS = frozenset(
    (
        "mr mrs ms dr prof st mt jr sr vs etc e.g i.e cf al fig no vol ed approx dept inc ltd co corp gen col sgt rev hon a.m p.m u.s u.k"
    ).split()
)
STOP_CHARACTERS = ".!?…。！？"


def _is_abbreviation(text: str, stop: int) -> bool:
    """Whether the full stop at index ``stop`` belongs to the word before it, or on the line before it."""
    # Read backwards: a pattern anchored at the end would be tried from every character of the text.
    end = start = stop - text.endswith("\n", 0, stop)
    while start and not text[start - 1].isspace() and text[start - 1] not in _OPENING:
        start -= 1
    word = text[start:end]
    if not word:
        return False
    if word.lower().rstrip(".") in _ABBREVIATIONS:
        return True
    if re.fullmatch(r"(?:[A-Z]\.)*[A-Z]", word):  # initials; the pronoun "I" is the one capital that ends sentences
        return word != "I"
    line_start = text.rfind("\n", 0, stop) + 1
    return word.isdigit() and text[line_start:stop].strip() == word  # "1. " opens a list item


def sentence_end_positions(text: str, *, final: bool = True) -> list[int]:
    """Indices just behind each sentence end, ascending.

    Args:
        text: Any text.
        final: Whether nothing more follows. If not, a stop at the very end is still open: the next character decides.

    >>> sentence_end_positions("Dr. Kim paid 3.5 coins. She left!")
    [23, 33]
    """
    ends: list[int] = []
    for match in _STOP.finditer(text):
        stop = match.group()
        if stop == "." and _is_abbreviation(text, match.start()):
            continue
        open_ended = match.end() == len(text) and "\n" not in stop and stop[0] not in "。！？"
        if open_ended and not final:
            continue
        if text[: match.end()].strip():
            ends.append(match.end())
    return ends


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, stripped, without empty ones.

    >>> split_sentences("One. Two? Three")
    ['One.', 'Two?', 'Three']
    """
    cuts = [0, *sentence_end_positions(text), len(text)]
    pieces = (text[start:end].strip() for start, end in pairwise(cuts))
    return [piece for piece in pieces if piece]


def question_spans(prompt: str) -> list[tuple[int, int]]:
    """Where the questions of a prompt lie, (start, end) in characters without white space at either end; see ``questions``."""
    found: list[tuple[int, int]] = []
    begin = 0
    for gap in [*re.finditer(r"\n\s*\n", prompt), None]:
        stop = len(prompt) if gap is None else gap.start()
        block = prompt[begin:stop]
        ends = [end for end in sentence_end_positions(block) if block[:end].rstrip("\"'”’»)]").endswith(("?", "？"))]
        cuts = [0, *ends[:-1], len(block)]
        found += [(begin + start, begin + end) for start, end in pairwise(cuts)]
        begin = stop if gap is None else gap.end()
    return [span for start, end in found if (span := _stripped(prompt, start, end)) is not None]


def _stripped(text: str, start: int, end: int) -> tuple[int, int] | None:
    inner = text[start:end]
    if not inner.strip():
        return None
    return start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip())


def questions(prompt: str) -> list[str]:
    """The questions of a prompt in order: a blank line or a question mark closes one; a text without either is one question.

    What follows the last question mark (``Answer:``) belongs to the last question.
    """
    return [prompt[start:end] for start, end in question_spans(prompt)]


def last_question(prompt: str) -> str:
    """The last question of a prompt with whatever follows it; the whole prompt if it has no parts."""
    found = questions(prompt)
    return found[-1] if found else prompt.strip()
