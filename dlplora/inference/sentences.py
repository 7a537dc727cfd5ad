"""Sentence ends, and the questions of a prompt. Pure text, no tokenizer.

A sentence ends

* at a line break, if the line holds anything;
* at a character that Unicode lists as ``Sentence_Terminal`` (``.``, ``!``, ``?``, ``。``, ``؟``, ``।`` and those of the other scripts)
  or at an ellipsis, including closing quotes, brackets and emphasis. ASCII stops and the ellipsis must be followed by white space, the
  others need not.

Adjacent ends count as one: ``yes.`` and the line break after it, ``?!``, ``。。。``. The text that follows decides:

* a stop before a line break, or at the end of a finished text, always ends its sentence (``no.``, ``B.``, ``42.``, ``5 p.m.``, ``Corp.``);
* a stop after an abbreviation, an initial, an ordinal or a list number does not, if the next word shows it (``Dr. Kim``, ``No. 5``,
  ``J. R. Smith``, ``3. Juli``, ``U.S. Army``, ``1. First``); otherwise it does (``no. Next``, ``B. Then``, ``U.S. The``);
* an ellipsis, or a stop inside a closing quote, does not before a lower-case letter (``Well... maybe``, ``"Go!" he said``).

In lists and code blocks every line is a sentence. The rule reads no further than the first word after a stop. It can therefore be applied
while a text is generated, and an end that was found stays an end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import regex

from dlplora.inference import abbreviations as words

_CLOSING = r"[\"'“”‘’»›«*_`\p{Pe}\p{Pf}]"
_END = regex.compile(rf"(?P<run>(?:[\p{{STerm}}…]+{_CLOSING}*)+)|(?P<line>[\n\r\v\f\x1c-\x1e\x85\u2028\u2029])")
_LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_NEEDS_SPACE = frozenset(".!?…")
_LAST_OPEN = regex.compile(rf"(?r)(?!{_CLOSING})[\s\S]")
_CONTENT = regex.compile(rf"(?!{_CLOSING})[^\s\p{{STerm}}…]")
_GAP = regex.compile(r"\s*")
_OPENING = "([{\"'“‘„«»*_`"
_WORD = regex.compile(r"[\p{L}\p{M}]+")
_NUMBER = regex.compile(r"\d{1,4}")
_ACRONYM = regex.compile(r"(?:\p{L}\p{Ll}?\.)+\p{L}\p{Ll}?")
_LIST_MARK = regex.compile(r"(?r)[ \t>*\-(]*")
_LIST_ITEM = regex.compile(r"(?m)^[ \t>*\-(]*(\w+)[.)]\s")
_EMOJI = regex.compile(r"\p{Emoji_Presentation}")
_CONTINUES = frozenset(",;:،؛、，：；")
_QUOTES = frozenset("\"'“”‘’»›«」』")
_QUESTION_MARKS = tuple("?？؟⁇⁈⁉⸮፧꘏﹖")
_MAY_END = regex.compile(r"[\p{STerm}…\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


def _without_closing(text: str) -> str:
    """The text without the closing quotes, brackets and emphasis at its end."""
    last = _LAST_OPEN.search(text)
    return text[: last.end()] if last else ""


def may_end_sentence(piece: str) -> bool:
    """Whether a piece of text holds a character that can end a sentence."""
    return _MAY_END.search(piece) is not None


def decides_sentence(piece: str) -> bool:
    """Whether a piece of text can decide by itself that a sentence has ended: a line break, or a stop with something after it."""
    stop = _MAY_END.search(piece)
    return stop is not None and (stop.group() in _LINE_BREAKS or stop.end() < len(piece))


@dataclass(frozen=True, slots=True)
class _Next:
    """The text after a full stop and its white space, as far as it is generated."""

    text: str
    """The next word; one character if it is not a word."""
    complete: bool
    """Whether the word can grow no further."""
    stopped: bool
    """Whether it is at most two letters with a full stop after it."""

    def is_in(self, listed: frozenset[str]) -> bool | None:
        """Whether the word is listed; None while it may still become one of them."""
        word = self.text.lower()
        if self.complete:
            return word in listed
        return None if any(one.startswith(word) for one in listed) else False

    def starts_sentence(self) -> bool | None:
        """Whether it is a capitalised word that usually begins a sentence; None while that is open."""
        return self.is_in(words.SENTENCE_STARTS) if self.text[:1].isupper() else False


def _next_word(text: str, start: int, final: bool) -> _Next | None:
    """The word at ``start``; None if nothing is written there yet."""
    if start == len(text):
        return None
    match = _WORD.match(text, start)
    if match is None:
        return _Next(text[start], True, False)
    complete = match.end() < len(text) or final
    return _Next(match.group(), complete, len(match.group()) < 3 and text[match.end() : match.end() + 1] == ".")


def _is_list_mark(text: str, line: int, word: str) -> bool:
    """Whether number or letter ``word`` at the beginning of a line opens a list or continues the one above."""
    if word in ("1", "a", "A", "i", "I"):
        return True
    if word.isdigit():
        before = str(int(word) - 1)
    elif word.isascii():
        before = chr(ord(word) - 1)
    else:
        return False
    return _list_items(text).get(before, line + 1) <= line


@lru_cache(maxsize=8)
def _list_items(text: str) -> dict[str, int]:
    """Where the first list item with each number or letter has its text."""
    items: dict[str, int] = {}
    for item in _LIST_ITEM.finditer(text):
        items.setdefault(item[1], item.end())
    return items


def _lead(text: str, stop: int) -> str:
    """The last word before ``stop`` on the same line."""
    while stop and text[stop - 1].isspace() and text[stop - 1] not in _LINE_BREAKS:
        stop -= 1
    start = stop
    while start and not text[start - 1].isspace():
        start -= 1
    return text[start:stop]


def _number_ends(lead: str, following: _Next) -> bool | None:
    """Whether the stop after a number ends a sentence and is not that of an ordinal."""
    if lead in words.ORDINAL_LEADS:
        return False
    month, goes_on = following.is_in(words.MONTHS_AND_DAYS), following.is_in(words.NUMBER_GOES_ON)
    if month or goes_on:
        return False
    return None if month is None or goes_on is None else True


def _letter_ends(letter: str, lead: str, at_line_start: bool, following: _Next) -> bool | None:
    """Whether the stop after a single letter ends a sentence and is not that of an initial."""
    if letter == "I" and lead:
        return True
    pair = (letter + following.text).lower()
    initial = len(following.text) == 1 and following.text.isupper()
    if following.stopped and (initial or pair in words.SPACED or pair in words.SPACED_LAST):
        return False
    if not following.complete and (initial or any(one.startswith(pair) for one in words.SPACED | words.SPACED_LAST)):
        return None  # "B. C" may become "B. C." or "B. Carl"
    if following.text.isdigit():
        return letter not in "pPsSvc§"
    if lead in words.ANSWER_LEADS or letter.islower() or not letter.isupper():
        return True
    if following.text[:1].isupper():
        return following.starts_sentence()
    return at_line_start  # "B. east" is an answer, "E. coli" a name


def _abbreviation_ends(word: str, following: _Next) -> bool | None:
    """Whether the stop of an abbreviation ends a sentence too; True for a word that is none."""
    name, first = word.lower(), following.text[:1]
    if name in words.NEVER_LAST:
        return False
    if name in words.BEFORE_NAMES:
        return following.starts_sentence()
    if name in words.MONTHS_SHORT:
        return not (first.isdigit() or first.islower()) if name != "mar" or first.isdigit() else True
    if name in words.BEFORE_NUMBERS:
        return not first.isdigit()
    if name in words.OFTEN_LAST:
        if not first.isalpha() or first.islower():
            return not (first.islower() or first.isdigit() or first in _CONTINUES)
        named = following.is_in(words.MONTHS_AND_DAYS)
        return None if named is None else not named
    if _ACRONYM.fullmatch(word):
        return following.starts_sentence() if first.isupper() or first.islower() or first.isdigit() else True
    return True


def _full_stop_ends(text: str, dot: int, after: int, final: bool) -> bool | None:
    """Whether the full stop at ``dot`` ends a sentence, where text begins or will begin at ``after`` on the same line."""
    start = dot
    while start and not text[start - 1].isspace() and text[start - 1] not in _OPENING:
        start -= 1
    word = text[start:dot]
    number, letter = _NUMBER.fullmatch(word) is not None, len(word) == 1 and word.isalpha()
    name = word.lower()
    known = name in words.BEFORE_NAMES or name in words.BEFORE_NUMBERS or name in words.NEVER_LAST or name in words.OFTEN_LAST
    if not (number or letter or known or name in words.MONTHS_SHORT or _ACRONYM.fullmatch(word)):
        return True
    lead = _lead(text, start).strip(_OPENING + ",").lower()
    lead = "is" if lead.endswith((":", "=")) else lead
    if number and lead in words.ANSWER_LEADS:
        return True
    following = _next_word(text, after, final)
    if following is None:
        return True if final else None
    line = _LIST_MARK.match(text, 0, start).start()
    at_line_start = line == 0 or text[line - 1] in _LINE_BREAKS
    if at_line_start and (number or (letter and not following.stopped)) and _is_list_mark(text, line, word):
        return False if number or not following.text[:1].isupper() else following.starts_sentence()
    pair = lead.removesuffix(".") + name
    if lead.endswith(".") and pair in words.SPACED | words.SPACED_LAST:
        return pair in words.SPACED_LAST and following.text[:1].isupper()
    if number:
        return _number_ends(lead, following)
    return _letter_ends(word, lead, at_line_start, following) if letter else _abbreviation_ends(word, following)


def _run_ends(text: str, start: int, end: int, final: bool) -> bool | None:
    """Whether the stops and closing characters in ``text[start:end]`` end a sentence; None if only later text can tell."""
    if end == len(text):
        return True if final else None
    run = text[start:end]
    stops = _without_closing(run)
    closing = run[len(stops) :]
    after = _GAP.match(text, end).end()
    if any(char in _LINE_BREAKS for char in text[end:after]):
        return True
    if after == end:
        if _EMOJI.match(text, end):
            return True
        if stops[-1] in _NEEDS_SPACE or text[end] in _CONTINUES:
            return False
        return not (closing and text[end] in "とっ")  # a quotation continues: 「…。」と
    if stops == "." and not closing:
        return _full_stop_ends(text, start, after, final)
    if after == len(text):
        open_ended = stops[-1] == "…" or stops.endswith("..") or any(char in _QUOTES for char in closing)
        return None if open_ended and not final else True
    if stops[-1] == "…" or stops.endswith("..") or any(char in _QUOTES for char in closing):
        return not text[after].islower()
    return True


def sentence_end_positions(text: str, *, final: bool = True) -> list[int]:
    """Indices just after each sentence end, ascending, one for each sentence.

    Args:
        text: Any text.
        final: Whether nothing more follows. If not, only the ends are given that no further text can change.

    >>> sentence_end_positions("Dr. Kim paid 3.5 coins. She left!")
    [23, 33]
    """
    return _scan(text, final)[0]


def known_sentence_ends(text: str, begin: int = 0) -> tuple[list[int], bool]:
    """Ends of sentences in a text that is still being written, as ``sentence_end_positions``, and whether a stop in it is still undecided.

    Args:
        text: What is written so far.
        begin: A known end; only those after it are given.
    """
    return _scan(text, False, begin)


def _scan(text: str, final: bool, begin: int = 0) -> tuple[list[int], bool]:
    if not final:
        text = text.rstrip("\ufffd")  # a character of which not all bytes are there
    ends: list[int] = []
    blank = empty = begin  # up to where there is no character, and nothing but stops
    for match in _END.finditer(text, begin):
        if match["line"]:
            if text[max(begin, blank) : match.start()].strip():
                ends.append(begin := match.end())
            else:
                blank = match.end()
            continue
        verdict = _run_ends(text, match.start(), match.end(), final)
        if verdict is None:
            return ends, True
        if verdict:
            if _CONTENT.search(text, max(begin, empty), match.start()):
                ends.append(begin := match.end())
            else:
                empty = match.end()
    return ends, False


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, stripped, without empty ones.

    >>> split_sentences("One. Two? Three")
    ['One.', 'Two?', 'Three']
    """
    cuts = [0, *sentence_end_positions(text), len(text)]
    pieces = (text[start:end].strip() for start, end in pairwise(cuts))
    return [piece for piece in pieces if piece]


def ends_with_question(text: str) -> bool:
    """Whether the last sentence of a text is a question."""
    return _without_closing(text.rstrip()).endswith(_QUESTION_MARKS)


def question_spans(prompt: str) -> list[tuple[int, int]]:
    """Positions of the questions of a prompt, (start, end) in characters without white space at either end; see ``questions``."""
    found: list[tuple[int, int]] = []
    begin = 0
    for gap in [*regex.finditer(r"\n\s*\n", prompt), None]:
        stop = len(prompt) if gap is None else gap.start()
        block = prompt[begin:stop]
        ends = [end for start, end in pairwise([0, *sentence_end_positions(block)]) if ends_with_question(block[start:end])]
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
