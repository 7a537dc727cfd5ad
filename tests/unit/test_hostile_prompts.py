"""Prompts that are made to be slow: a server reads what strangers send, and one request must not stop the others.

Each takes milliseconds if it is read in linear time, and minutes or more if not. The limit counts the time of this process, so that a
busy machine does not matter.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from dlplora.inference.prompt_routing import answers_by_line, asked_questions
from dlplora.inference.question import message_text, question_text, routed_tail

CHARS = 60_000
PIECES = {
    "tags": ("<user>a</user>", "", "x"),
    "open tags": ("<user>", "<system>a</system>", ""),
    "thoughts": ("\n<think>a</think>", "", ""),
    "open thoughts": ("\n<think>", "", "```"),
    "line breaks": ("\n", "", "x"),
    "separators": ("\u2028", "", ""),
    "blanks under a heading": (" ", "# Instruction\nx\n# Answer", "x"),
    "a role without an end": ("x", "<|start|>user", ""),
    "instructions": ("[INST]", "", ""),
    "instructions and a cue": ("[INST]", "", "\nAnswer:"),
    "system texts": ("<<SYS>>", "<<SYS>>a<</SYS>>", ""),
    "quotes": ('"', "Go.", "x"),
    "stops": (". ", "", ""),
    "abbreviations": ("e.g. ", "", ""),
    "list numbers": ("1. ", "", ""),
    "list items": ("7. a\n", "", ""),
    "digits": ("9", "", ". Who is it?\n\n1. What is it?"),
    "questions": ("a? ", "", ""),
    "examples": ("\nAnswer: b", "", "\nAnswer:"),
    "headings": ("## Instruction\n", "", "## Response:\n"),
}


@pytest.fixture
def limited() -> Iterator[None]:
    """Ten seconds of processor time."""

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError("10 s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 10)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def _known(prompt: str) -> str:
    return question_text(prompt, known=("a field of the document",))


@pytest.mark.skipif(sys.platform == "win32", reason="no timer of processor time")
@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("read", [question_text, message_text, routed_tail, asked_questions, answers_by_line, _known])
def test_long_prompts_are_read_in_linear_time(limited: None, read: Callable[[str], object], piece: str) -> None:
    repeated, before, behind = PIECES[piece]
    assert read(before + repeated * (CHARS // len(repeated)) + behind) is not None
