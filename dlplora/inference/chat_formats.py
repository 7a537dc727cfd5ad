"""Chat templates and instruction formats as text: which role each part of a prompt has. No torch, no tokenizer classes.

A prompt is split into turns at the role markers of one format. The markers of the tokenizer's own chat template are found by rendering
sentinel messages; those of common formats are listed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import regex

from dlplora.errors import one_line

USER, INPUT, INSTRUCTIONS, OTHER = "user", "input", "instructions", "other"
"""Roles: the user, whose words are routed; input that belongs to them (Alpaca's ``### Input:``); a heading ``Instructions``, under which
either the user's words stand or a system text; all others."""

_USER_NAMES = frozenset("user human instruction instruct question query prompt prompter inst user_token 102 106".split())
_INPUT_NAMES = frozenset("input context".split())
_ROLE = r"(?P<role>system|developer|user|human|assistant|model|bot|gpt|tool|ipython|observation|function|environment)"

_MARKED = tuple(
    regex.compile(pattern, regex.IGNORECASE)
    for pattern in (
        rf"<\|im_start\|>{_ROLE}[^\n<]*(?:<\|im_sep\|>|\n|$)",  # ChatML: Qwen, Phi-4
        rf"<\|start_header_id\|>{_ROLE}<\|end_header_id\|>",  # Llama 3
        rf"<\|header_start\|>{_ROLE}<\|header_end\|>",  # Llama 4
        rf"<start_of_turn>{_ROLE}\b",  # Gemma
        rf"<\|turn>{_ROLE}\b",
        rf"<\|start_of_role\|>{_ROLE}[^<\n]*<\|end_of_role\|>",  # Granite
        rf"<\|start\|>{_ROLE}[^<\n]*+(?:<\|channel\|>\w+)?[^<\n]*+<\|message\|>",  # gpt-oss
        rf"<[|｜]{_ROLE}[|｜]>:?",  # Phi-3, Zephyr, GLM, DeepSeek, InternLM
        rf"<\|im_\w+\|>{_ROLE}<\|im_middle\|>",  # Kimi
        rf"<extra_id_[01]>{_ROLE}\b",  # Nemotron
        r"<\|(?P<role>prompter|prompt|assistant|answer|system)\|>",  # OpenAssistant, H2O
        rf"\[\|{_ROLE}\|\]",  # EXAONE
        r"<(?P<role>human|bot)>:",  # RedPajama
        r"<reserved_(?P<role>10[2367])>",  # Baichuan
        r"GPT4 Correct (?P<role>User|Assistant):",  # OpenChat
        r"<\|START_OF_TURN_TOKEN\|><\|(?P<role>SYSTEM|USER|CHATBOT)_TOKEN\|>",  # Cohere
        r"\[(?P<role>/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS))\]",  # Llama 2, Mistral
    )
)
_HEADINGS = "instructions?|input|context|question|prompt|response|answer|output|system|user|human|assistant|gpt"
_AFTER_TURN = r"(?<=(?:</s>|<eos>|<\|\w+\|>|<｜[^｜\n]*｜>) ?)"
"""Behind a token that ends a turn; Vicuna writes no space between the two."""
_PLAIN = tuple(
    regex.compile(pattern)
    for pattern in (
        rf"(?mi)(?:^|{_AFTER_TURN})#{{2,3}} ?(?P<role>{_HEADINGS})s?(?: prompt| message)?(?::|[ \t]*$)",  # Alpaca, Markdown headings
        r"### (?P<role>System|Human|User|Assistant):",  # Guanaco writes them on one line
        rf"(?:^|(?<=\s)|{_AFTER_TURN})(?P<role>USER|ASSISTANT|SYSTEM):(?=\s|$)",  # Vicuna
        rf"(?m)(?:^|{_AFTER_TURN})(?P<role>System|User|Human|Assistant|AI|Bot|Falcon):(?=\s|$)",
        r"(?m)^(?P<role>Instruct|Output):(?=\s|$)",  # Phi-2
        r"(?m)^(?P<role>system|user|assistant|model)[ \t]*$",  # ChatML and Gemma without their special tokens
    )
)
_TOP_HEADINGS = regex.compile(rf"(?mi)^# ?(?P<role>{_HEADINGS})s?(?::|[ \t]*$)")
_TOP_HEADINGS_WHOLE = regex.compile(rf"(?i)\A\s*# ?(?:{_HEADINGS})s?[: \t]*\n(?s:.*)\n# ?(?:answer|response|output)s?[:\s]*\Z")
"""A single ``#`` is a comment in code and a title in a text: it counts if the prompt begins with one and ends with an empty one."""
_BARE = regex.compile(r"(?:\A|(?<=\S))(?P<role>system|user|assistant)\n\n")
"""Llama 3 without its special tokens, which leaves the next role glued to the last word of a message."""
_BARE_WHOLE = regex.compile(r"\A(?:system|user)\n\n.*\Sassistant\s*\Z", regex.DOTALL)
_TAG = "system|instructions?|context|user|human|question|query|prompt|assistant|answer|response"
_TAGGED_WHOLE = regex.compile(
    rf"\A\s*(?:(?><({_TAG})>.*?</\1>\s*))++(?:<(?:assistant|answer|response)>\s*)?\Z", regex.DOTALL | regex.IGNORECASE
)
"""A prompt in XML-like tags from end to end; tags within a text are its own words. A tag ends at its first end: without the atomic group,
the ways to pair tags would be tried one by one."""
_ANSWERERS = frozenset("assistant response answer output gpt ai bot model falcon".split())
_TURN_END = regex.compile(
    r"(?:\s|<\|im_end\|>|<\|eot_id\|>|<\|eot\|>|<end_of_turn>|<turn\|>|<\|end\|>|<\|end_of_text\|>|<\|endoftext\|>|<\|end_of_turn\|>"
    r"|<\|END_OF_TURN_TOKEN\|>|<\|return\|>|<eoh>|<eoa>|<｜end▁of▁sentence｜>|\[\|endofturn\|\]|</s>|<s>|<eos>|<bos>)+"
)
_TOOL_ANSWER = regex.compile(r"\s*<tool_response>")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message in a rendered prompt.

    Args:
        role: ``user``, ``input`` or ``other``.
        start, end: Its words, in characters of the prompt.
        opened: Where its marker begins.
    """

    role: str
    start: int
    end: int
    opened: int


@dataclass(frozen=True, slots=True)
class TurnMarkers:
    """What a chat template writes before and after the words of a user."""

    before: str
    behind: str


def learn_markers(tokenizer: Any, chat_template: str | None = None) -> TurnMarkers | None:
    """The markers of a tokenizer's chat template; None if it has no template, or one that marks no turns.

    Sentinel messages are rendered in several arrangements; the text before the user's words that all of them share is the marker.

    Args:
        tokenizer: Renders conversations.
        chat_template: In place of the tokenizer's own.
    """
    if not (chat_template or getattr(tokenizer, "chat_template", None)):
        return None
    first, reply, second = "Xfirst1question", "Xthe2reply", "Xsecond3question"
    conversations = [
        [{"role": "user", "content": first}, {"role": "assistant", "content": reply}, {"role": "user", "content": second}],
        [{"role": "user", "content": second}],
    ]
    before, behind = [], []
    for messages in conversations:
        try:
            text = rendered(tokenizer, messages, chat_template)
        except ValueError:  # templates refuse arrangements that they were not written for
            continue
        if second not in text:
            continue
        head, _, tail = text.partition(second)
        before.append(head.rpartition(reply)[2])
        behind.append(tail)
        if first in head:
            before.append(head.partition(first)[0])
            behind.append(head.partition(first)[2].partition(reply)[0])
    opening = _common_start([text[::-1] for text in before])[::-1].strip()
    closing = _common_start(behind).strip()
    marks = sum(not char.isspace() for char in opening) >= 3 and any(not char.isalnum() and not char.isspace() for char in opening)
    return TurnMarkers(opening, closing) if marks else None


def _common_start(texts: Sequence[str]) -> str:
    """The characters with which all texts begin."""
    return "".join(chars[0] for chars in takewhile(lambda chars: len(set(chars)) == 1, zip(*texts, strict=False)))


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], chat_template: str | None = None) -> str:
    """Messages as a chat template writes them, up to where the assistant begins.

    Args:
        tokenizer: Renders them.
        messages: ``role`` and ``content`` of each.
        chat_template: In place of the tokenizer's own.

    Raises:
        ValueError: If the template refuses the messages, or there is none.
    """
    from jinja2.exceptions import TemplateError

    plain = [dict(message) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(plain, chat_template=chat_template, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(one_line(error)[:300]) from error


def _role(name: str) -> str:
    name = name.lower()
    return USER if name in _USER_NAMES else INPUT if name in _INPUT_NAMES else INSTRUCTIONS if name == "instructions" else OTHER


def _turns(prompt: str, pattern: regex.Pattern[str]) -> list[Turn]:
    matches = list(pattern.finditer(prompt))
    turns = []
    for match, stop in zip(matches, [*(later.start() for later in matches), len(prompt)][1:], strict=True):
        found = prompt[match.end() : stop]
        closing = regex.search(rf"(?r){_TURN_END.pattern}$", found)
        end = match.end() + (closing.start() if closing else len(found))
        start = match.end() + len(found) - len(found.lstrip())
        role = _role(match["role"])
        if role == USER and _TOOL_ANSWER.match(prompt, start):
            role = OTHER  # Qwen writes what a tool returned as a message of the user
        turns.append(Turn(role, min(start, end), end, match.start()))
    return turns


def _tagged_turns(prompt: str) -> list[Turn]:
    """The turns of a prompt in XML-like tags."""
    found = regex.finditer(rf"<(?P<role>{_TAG})>(?P<words>.*?)</(?P=role)>", prompt, regex.DOTALL | regex.IGNORECASE)
    return [Turn(_role(one["role"]), one.start("words"), one.end("words"), one.start()) for one in found]


def _with_one_question(turns: list[Turn]) -> list[Turn]:
    """Under a heading ``Instructions`` stand the words of the user, unless there is a question beside them."""
    role = OTHER if any(turn.role == USER for turn in turns) else USER
    return [replace(turn, role=role) if turn.role == INSTRUCTIONS else turn for turn in turns]


def _learned_turns(prompt: str, markers: TurnMarkers) -> list[Turn]:
    turns = []
    at = prompt.find(markers.before)
    while at >= 0:
        start = at + len(markers.before)
        following = prompt.find(markers.before, start)
        stop = len(prompt) if following < 0 else following
        end = prompt.find(markers.behind, start, stop) if markers.behind else -1
        end = stop if end < 0 else end
        closed = min(stop, end + len(markers.behind))
        turns += [Turn(USER, start, end, at), Turn(OTHER, closed, stop, closed)]
        at = following
    return turns


def all_turns(prompt: str, markers: TurnMarkers | None) -> Iterator[list[Turn]]:
    """The turns of a prompt in each format that it may have, the most certain first; formats without a user turn are left out.

    Formats with ordinary words as markers count only if the last marker asks for an answer.
    """
    if markers is not None and markers.before in prompt:
        yield _learned_turns(prompt, markers)
    for pattern in _MARKED:
        turns = _turns(prompt, pattern)
        if any(turn.role == USER for turn in turns):
            yield turns
    if _TAGGED_WHOLE.match(prompt):
        yield _with_one_question(_tagged_turns(prompt))
    whole = ((_BARE, _BARE_WHOLE), (_TOP_HEADINGS, _TOP_HEADINGS_WHOLE))
    for pattern in (*_PLAIN, *(one for one, shape in whole if shape.match(prompt))):
        names = [match["role"].lower() for match in pattern.finditer(prompt)]
        if len(names) > 1 and names[-1] in _ANSWERERS:
            turns = _with_one_question(_turns(prompt, pattern))
            if any(turn.role == USER for turn in turns):
                yield turns


def begins_with_turn(text: str, markers: TurnMarkers | None) -> bool:
    """Whether a text begins with a role marker made of special tokens, as a rendered conversation does."""
    start = text.lstrip().removeprefix("<s>").removeprefix("<bos>").removeprefix("<|begin_of_text|>").lstrip()
    own = markers is not None and bool(markers.before) and start.startswith(markers.before)
    return own or any(pattern.match(start) for pattern in _MARKED)
