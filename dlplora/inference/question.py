"""Extract the question from a prompt, which is what routers read, without its wrapper. Pure text.

``message_text`` is for a message that is known to be the user's, ``question_text`` for any other prompt; both are used for the first
routing and for re-routes. ``question_text`` removes, in this order:

1. if the prompt is a rendered conversation: everything but the last user message, found by the markers of the tokenizer's chat template, or
   by those of common formats (``chat_formats``); ``<think>`` blocks are removed too;
2. if the caller knows the evaluated document (lm-eval does): system instruction, task description and worked examples;
3. otherwise, in plain text: worked examples (parts that end with the prompt's last cue *and* an answer), and everything before the parts
   that ask. Parts are separated by blank lines; a part asks if it ends with a question mark or a cue (``Answer:``). Parts that announce the
   next one (they end with a colon) stay with it. If the last part does not ask, an instruction looks like a system text, and only
   parts that begin like a system prompt are removed.

A part without content of its own (a cue alone) is joined to the part before it. A prompt in which nothing is recognised is returned
unchanged. The rule is idempotent.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import regex

from dlplora.errors import GenerationError
from dlplora.inference.chat_formats import INPUT, USER, TurnMarkers, all_turns, begins_with_turn
from dlplora.inference.sentences import ends_with_question, question_spans

_THOUGHT = regex.compile(r"(?:\A\s*|\n[^\S\n]*)(?P<tag><(?P<name>think|thinking|reasoning)>)")
_LLAMA2_SYSTEM = regex.compile(r"<<SYS>>.*?<</SYS>>\s*", regex.DOTALL)
_SPACE = regex.compile(r"\s*")
_CUE = regex.compile(r"#{0,3} ?(?:\*\*)?[^\s:：][^\n:：]{0,40}[:：](?:\*\*)?")
_GAP = regex.compile(r"\n[^\S\n]*\n\s*")
_INST = regex.compile(r"\[INST\]")
_LIST_NUMBER = regex.compile(r"\d+\.\s")
_NUMBERED = regex.compile(r"(?m)^1\.\s")
_GLUED = regex.compile(r"(?=\p{Lu}\p{Ll})(?<=\p{Ll}[.!?][\"'”’)]*)|(?<=[。！？])(?=\S)")
_SYSTEM_OPENING = regex.compile(
    r"(?:system|instructions?|rules?|context)\s*:"
    r"|(?:you are|you're|you will|your (?:task|role|job) is|act as|as an ai|always |never |answer the user)"
    r"|(?:du bist|sie sind|tu es|vous êtes|eres |usted es|sei un|você é|je bent|du är|du er|jesteś|ты |вы )"
    r"|你是|您是|あなたは|당신은|أنت |आप एक|[\[{]|```|<tools>|<system>",
    regex.IGNORECASE,
)
_MOST_CUE_WORDS, _MOST_ANNOUNCING_WORDS = 5, 25
_LEAST_KNOWN = 20
"""Characters that a line of a document must have to be recognised; shorter ones (``yes``) occur anywhere."""
_MOST_CACHED = 8192
"""Characters of a prompt; longer ones are taken apart again rather than kept."""


def question_text(prompt: str, markers: TurnMarkers | None = None, known: Sequence[str] = ()) -> str:
    """The text that is routed.

    Args:
        prompt: What the model reads, as text.
        markers: Of the tokenizer's chat template.
        known: Texts that belong to the question, if the caller knows some: the fields of the evaluated document.

    >>> question_text("You are a helpful assistant.\\n\\nWho came?\\nAnswer:")
    'Who came?\\nAnswer:'
    """
    find = _question_text if len(prompt) <= _MOST_CACHED else _question_text.__wrapped__
    return find(prompt, markers, tuple(known))


@functools.lru_cache(maxsize=4096)
def _question_text(prompt: str, markers: TurnMarkers | None, known: tuple[str, ...]) -> str:
    text = prompt
    while True:  # wrappers may be nested; every step that changes the text makes it shorter
        inner = _spoken(_last_message(text, markers))
        own = _known_part(inner, known) if known else None
        inner = _asking_part(inner) if own is None else own
        if inner == text or not inner.strip():
            return text
        text = inner


def question_of_messages(messages: Sequence[Mapping[str, Any]], markers: TurnMarkers | None = None) -> str:
    """The text that is routed for a conversation: what the user said last, in one message or in several without an answer between them.

    Args:
        messages: ``role`` and ``content`` each; content is text, or parts of which those of type ``text`` are read.
        markers: Of the tokenizer's chat template.

    Raises:
        GenerationError: If a part of type ``text`` has no text.
    """
    texts = [(str(message.get("role")), content_text(message.get("content"))) for message in messages]
    said = [(role, text) for role, text in texts if text.strip()]
    last = max((i for i, (role, _) in enumerate(said) if role == "user"), default=len(said) - 1)
    first = last
    while first > 0 and said[first - 1][0] == said[last][0] == "user":
        first -= 1
    return message_text("\n\n".join(text for _, text in said[first : last + 1]), markers) if said else ""


def message_text(text: str, markers: TurnMarkers | None = None, known: Sequence[str] = ()) -> str:
    """The text that is routed of a message that is known to be the user's: its own words, whatever they look like.

    Only worked examples are left out, and a message that is a rendered conversation from its first character on is read as one.

    Args:
        text: Of the message.
        markers: Of the tokenizer's chat template.
        known: As for ``question_text``.

    >>> message_text("Summarise this log:\\nUser: hi\\nAssistant: hello")
    'Summarise this log:\\nUser: hi\\nAssistant: hello'
    """
    if begins_with_turn(text, markers):
        return question_text(text, markers, known)
    own = _known_part(text, known) if known else None
    if own is not None:
        return own
    start, end = next(_thoughts(text), (0, 0))
    if start == 0 and end < len(text):  # of an answer that was pasted; elsewhere the tag is the user's own word
        text = text[end:]
    if _begins_with_example(text):  # before a later one there may be an instruction
        return text[_behind_examples(text) :].strip()
    return text


def content_text(content: Any) -> str:
    """The text of a message's content.

    Raises:
        GenerationError: If a part of type ``text`` has no text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text" if "text" in part else None) in {"text", "input_text"}:
            if not isinstance(part.get("text"), str):
                raise GenerationError("a part of a message is of type 'text' and has no text.")
            texts.append(part["text"])
    return "\n".join(texts)


def document_texts(document: Any) -> tuple[str, ...]:
    """The texts among the fields of an evaluated document, for ``known``."""
    if not isinstance(document, Mapping):
        return ()
    return tuple(value for value in document.values() if isinstance(value, str) and len(value.strip()) >= _LEAST_KNOWN)


def routed_tail(question: str) -> str:
    """The last question of a routed text and what follows it; a re-route reads it before the generated text (view ``tail``).

    Questions are taken apart only where they are marked, by list numbers or by several ``[INST]``. Otherwise the whole text is read: what
    stands behind a blank line or a question mark (``Thanks!``, ``Can you do that?``) need not be a question of its own, and a list under a
    question holds the options.
    """
    spans = list(question_spans(question))
    numbered = [i for i, (start, _) in enumerate(spans) if _LIST_NUMBER.match(question, start)]
    if len(numbered) > 1 and not _are_options([question[slice(*span)] for span in spans], numbered):
        return question[slice(*spans[-1])]  # one cue for a whole list; the view `segment` knows which question comes next
    marked = [match.start() for match in _INST.finditer(question)]
    return question[marked[-1] :].strip() if len(marked) > 1 else question.strip()


def _are_options(parts: Sequence[str], numbered: Sequence[int]) -> bool:
    asked = [ends_with_question(_without_cue(parts[i])) for i in numbered]
    return numbered[0] > 0 and ends_with_question(parts[numbered[0] - 1]) and not any(asked)


def is_cue(text: str) -> bool:
    """Whether a text only asks for an answer: a few words with a colon, on one line."""
    text = text.strip()
    return _CUE.fullmatch(text) is not None and len(text.split()) <= _MOST_CUE_WORDS


def _thoughts(text: str) -> Iterator[tuple[int, int]]:
    """Blocks of thoughts that begin a line, (start, end); one without an end reaches to the end of the text if it holds no code."""
    code, unclosed, at = text.rfind("```"), set[str](), 0
    for opened in _THOUGHT.finditer(text):
        name, start = opened["name"], opened.end()
        if opened.start("tag") < at:
            continue
        end = -1 if name in unclosed else text.find(f"</{name}>", start)
        if end >= 0:
            end = _SPACE.match(text, end + len(name) + 3).end()
        elif code < start:
            end = len(text)
        else:
            unclosed.add(name)  # nor is any later one of its name; a search for each would take quadratic time
            continue
        yield max(opened.start(), at), end
        at = end


def _spoken(text: str) -> str:
    """A message without thoughts and Llama 2's system text; the text itself if it has neither."""
    thoughts = list(_thoughts(text))
    if thoughts:
        kept = zip([0, *(end for _, end in thoughts)], [*(start for start, _ in thoughts), len(text)], strict=True)
        text = "\n".join(text[start:end] for start, end in kept).strip()
    last = text.rfind("<</SYS>>")  # behind it, every opening would be searched in vain
    if last < 0:
        return text
    end = _SPACE.match(text, last + 8).end()
    rest = _LLAMA2_SYSTEM.sub("", text[:end])
    return (rest + text[end:]).strip() if len(rest) < end else text


def _last_message(text: str, markers: TurnMarkers | None) -> str:
    """The last user message, in the first format that has one; the text itself if it is not a conversation."""
    for turns in all_turns(text, markers):
        written = [turn for turn in turns if text[turn.start : turn.end].strip()]
        if not written:
            continue
        last = max((i for i, turn in enumerate(written) if turn.role == USER), default=len(written) - 1)
        first = last
        while first and written[first - 1].role == written[last].role == USER:
            first -= 1
        if first < last and all(_INST.match(text, turn.opened) for turn in written[first : last + 1]):
            end = text.find("[/INST]", written[last].end)
            return text[written[first].opened : end + 7 if end >= 0 else None].strip()  # several questions, for `asked_questions`
        inputs = written[last + 1 : last + 2]
        words = [*written[first : last + 1], *(turn for turn in inputs if turn.role == INPUT)]
        return "\n".join(text[turn.start : turn.end].strip() for turn in words)
    return text


def _known_part(text: str, known: Sequence[str]) -> str | None:
    """The text from the block on in which the document begins; None if nothing of the document is found.

    What stands before the document in its block is an instruction (``Write in Zargi: {{text}}``) and stays, unless it is a line that looks
    like a system text, or worked examples. A field with its own cue (``…\\nAnswer:``) is a whole prompt, and nothing before it belongs to
    it.
    """
    whole = [one.strip() for one in known]
    prompt = max((one for one in whole if text.rstrip().endswith(one) and len(_without_cue(one)) < len(one)), key=len, default="")
    if prompt:
        return text if prompt == text.strip() else prompt
    lines = [line.strip() for one in known for line in one.splitlines() if len(line.strip()) >= _LEAST_KNOWN]
    found = [at for one in (*whole, *lines) if (at := text.rfind(one)) >= 0]
    if not found:
        return None
    first = min(found)
    *before, start = [0, *(gap.end() for gap in _GAP.finditer(text, 0, first))]
    block = text[before[-1] : start].rstrip() if before else ""
    if _announces(block.rpartition("\n")[2]):
        start = before[-1] + block.rfind("\n") + 1  # ``Write in Zargi:`` and a blank line
    start = max((cut.start() for cut in _GLUED.finditer(text, start, first + 2) if cut.start() <= first), default=start)
    while _SYSTEM_OPENING.match(text, start) and (line := text.find("\n", start, first)) >= 0:
        start = line + 1
    start += min(_behind_examples(text[start:]), first - start)
    return text if not text[:start].strip() else text[start:].strip()


def _parts(text: str) -> list[tuple[int, int]]:
    """The parts between blank lines, (start, end); a part that is a cue alone is joined to the part before it."""
    cuts = [0, *(gap.end() for gap in _GAP.finditer(text)), len(text)]
    parts: list[tuple[int, int]] = []
    for start, end in pairwise(cuts):
        if parts and is_cue(text[start:end]):
            parts[-1] = (parts[-1][0], end)
        elif text[start:end].strip():
            parts.append((start, end))
    return parts


def _without_cue(part: str) -> str:
    """A part without the cues at its end."""
    lines = part.rstrip().split("\n")
    while len(lines) > 1 and (is_cue(lines[-1]) or not lines[-1].strip()):
        lines.pop()
    return "\n".join(lines)


def _asks(part: str) -> bool:
    body = _without_cue(part)
    return len(body) < len(part.rstrip()) or ends_with_question(body)


def _asking_part(text: str) -> str:
    """A plain text without worked examples and without the text before the parts that ask."""
    start = _behind_examples(text)
    rest = text[start:]
    parts = _parts(rest)
    if len(_INST.findall(rest)) > 1 or len(parts) < 2 or _NUMBERED.search(rest):
        return rest if start else text
    first = len(parts) - 1
    if _asks(rest[slice(*parts[first])]):
        while first and _asks(rest[slice(*parts[first - 1])]):
            first -= 1
        while first and _announces(rest[slice(*parts[first - 1])]):
            first -= 1
    else:
        first = 0
        while first < len(parts) - 1 and _SYSTEM_OPENING.match(rest[slice(*parts[first])].lstrip()):
            first += 1
    if first:
        return rest[parts[first][0] :].strip()
    return rest if start else text


def _announces(part: str) -> bool:
    return part.rstrip().endswith((":", "：")) and len(part.split()) <= _MOST_ANNOUNCING_WORDS


def _behind_examples(text: str) -> int:
    """Where the worked examples end: after the last part in which the prompt's own cue has an answer; 0 without examples."""
    cue = text.rstrip().rpartition("\n")[2].strip()
    if not is_cue(cue):
        return 0
    answered = list(regex.finditer(rf"(?m)^[ \t]*{regex.escape(cue)}[ \t]*\S.*$", text))
    if not answered:
        return 0
    gap = _GAP.search(text, answered[-1].end())
    rest = text[gap.end() if gap else answered[-1].end() :]
    if not rest.strip() or is_cue(rest):
        return 0
    return len(text) - len(rest.lstrip())


def _begins_with_example(text: str) -> bool:
    """Whether the first part of a text is a worked example: it has an answer behind the cue that the text ends with."""
    cue, parts = text.rstrip().rpartition("\n")[2].strip(), _parts(text)
    first = text[slice(*parts[0])] if parts else ""
    return is_cue(cue) and regex.search(rf"(?m)^[ \t]*{regex.escape(cue)}[ \t]*\S", first) is not None
