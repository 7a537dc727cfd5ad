"""Prompts of several questions: which questions they contain, and how the prompt itself is routed.

``prompt_routing`` says which routing weights each token of the prompt is processed under:

* ``whole`` (default): one set of weights for the whole prompt;
* ``question``: each question is routed separately, on its own text;
* ``sentence``: the same for every sentence.

The last two give routing weights (B, T, E) that are piecewise constant over the prefill. The last token of a prompt predicts the first
token of the answer, so it is processed under the weights of the answer, like the token that ends a generated sentence. Everything is read
from the context. A prompt of one question has one piece under ``question``, which then equals ``whole``.

Shapes: B rows, T columns of the prompts, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from dlplora.encoding import encode_texts
from dlplora.errors import GenerationError
from dlplora.inference.chat_formats import TurnMarkers
from dlplora.inference.question import question_text
from dlplora.inference.sentences import question_spans, sentence_end_positions
from dlplora.tasks.types import TASK_SEPARATOR
from dlplora.types import PromptBatch

PROMPT_ROUTINGS = ("whole", "question", "sentence")

_INSTRUCTION = re.compile(r"\[INST\](.*?)\[/INST\]", re.DOTALL)
_NUMBER = re.compile(r"(\d{1,9})\.\s+")


@dataclass(frozen=True, slots=True)
class ParsedQuestions:
    """The questions that a prompt asks, in order, without worked examples.

    Args:
        spans: (start, end) of each in characters of the prompt, without list number and instruction markers.
        answers: What an answer is: a ``line`` of its own (questions in blocks), a ``numbered`` line (numbered or ``[INST]`` questions), or
            a ``sentence`` (questions in one running text).
    """

    spans: tuple[tuple[int, int], ...]
    answers: Literal["line", "numbered", "sentence"]

    def texts(self, prompt: str) -> list[str]:
        """The questions as text."""
        return [prompt[start:end] for start, end in self.spans]


def asked_questions(prompt: str) -> ParsedQuestions:
    """Find the questions of a prompt.

    ``[INST] … [/INST]`` blocks count if there are any: the last run of them with nothing but white space between. Otherwise, if parts begin
    with a list number, those from the last ``1.`` on; otherwise what blank lines divide, or in one running text what ``questions`` finds.

    >>> asked_questions("1. Who?\\n\\n2. Where?\\n\\nAnswers:").texts("1. Who?\\n\\n2. Where?\\n\\nAnswers:")
    ['Who?', 'Where?']
    """
    marked = list(
        _INSTRUCTION.finditer(prompt, 0, prompt.rfind("[/INST]") + 7)
    )  # behind the last end, each opening would be searched in vain
    if marked:
        first = max((i for i in range(1, len(marked)) if prompt[marked[i - 1].end() : marked[i].start()].strip()), default=0)
        return ParsedQuestions(tuple(_trimmed(prompt, *match.span(1)) for match in marked[first:]), "numbered")
    spans = question_spans(prompt)
    numbered = [(span, int(match[1]), match.end()) for span in spans if (match := _NUMBER.match(prompt, *span))]
    start = max((i for i, (_, number, _) in enumerate(numbered) if number == 1), default=None)
    if start is not None and len(numbered) - start > 1:
        return ParsedQuestions(tuple(_numbered_spans(prompt, spans, [(span, inner) for span, _, inner in numbered[start:]])), "numbered")
    blocks = _blocks(prompt)
    return ParsedQuestions(tuple(blocks), "line") if len(blocks) > 1 else ParsedQuestions(tuple(spans), "sentence")


def _blocks(prompt: str) -> list[tuple[int, int]]:
    """The parts between blank lines."""
    cuts = [0, *(match.end() for match in re.finditer(r"\n\s*\n", prompt)), len(prompt)]
    return [_trimmed(prompt, start, end) for start, end in pairwise(cuts) if prompt[start:end].strip()]


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    inner = text[start:end]
    return start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip())


def _numbered_spans(
    prompt: str, spans: Sequence[tuple[int, int]], numbered: Sequence[tuple[tuple[int, int], int]]
) -> list[tuple[int, int]]:
    """Each numbered question up to the next, or to the blank line that closes the last one."""
    found = []
    for i, (span, inner) in enumerate(numbered):
        if i + 1 < len(numbered):
            stop = numbered[i + 1][0][0]
        else:
            gap = re.compile(r"\n\s*\n").search(prompt, span[0])
            stop = gap.start() if gap else len(prompt)
        found.append(_trimmed(prompt, inner, stop))
    return found


def answers_by_line(prompt: str) -> bool:
    """Whether a prompt asks several questions and every answer is a line, unnumbered: a line left blank is an answer left out."""
    asked = asked_questions(prompt)
    return asked.answers == "line" and len(asked.spans) > 1


def answer_index(asked: ParsedQuestions, generated: str, num_sentences: int) -> int:
    """Which answer comes next, from 0: lines begun so far, or sentences ended where answers are sentences; at most the last one."""
    text = generated.lstrip() if asked.answers == "numbered" else generated
    done = num_sentences if asked.answers == "sentence" else len(re.findall(r"\n+", text))
    return max(0, min(done, len(asked.spans) - 1))


def segment_text(prompt: str, generated: str, num_sentences: int) -> str:
    """The question that is answered next; the whole prompt if it has no parts."""
    asked = asked_questions(prompt)
    return asked.texts(prompt)[answer_index(asked, generated, num_sentences)] if asked.spans else prompt


def segment_task(names: str | None, index: int) -> str | None:
    """The task of the ``index``-th question where ``names`` may hold one name per question."""
    if names is None:
        return None
    parts = names.split(TASK_SEPARATOR)
    return parts[min(index, len(parts) - 1)]


def num_tasks(names: str | None) -> int:
    """How many tasks ``names`` holds."""
    return 0 if names is None else names.count(TASK_SEPARATOR) + 1


def split_prompt(prompt: str, how: str) -> list[tuple[int, int]]:
    """The parts of a prompt that are routed by themselves: (start, end) in characters, ascending, never empty.

    Text between two parts (white space, worked answers, list numbers) belongs to the one before, text at the beginning to the first part.

    Raises:
        GenerationError: If ``how`` is unknown.
    """
    if how == "whole":
        return [(0, len(prompt))]
    if how == "question":
        return question_spans(prompt) or [(0, len(prompt))]
    if how == "sentence":
        cuts = [0, *sentence_end_positions(prompt), len(prompt)]
        spans = [_trimmed(prompt, start, end) for start, end in pairwise(cuts) if prompt[start:end].strip()]
        return spans or [(0, len(prompt))]
    raise GenerationError(f"unknown prompt_routing '{how}'; known: {', '.join(PROMPT_ROUTINGS)}.")


def routed_questions(prompts: PromptBatch, tokenizer: Any, markers: TurnMarkers | None) -> PromptBatch:
    """The prompts as a router reads them: each row's question, by what the caller knows, else by the rule of ``inference.question``.

    Args:
        prompts: Whole prompts; returned as they are where the question is all of the text.
        tokenizer: Encodes the questions that are only part of their prompt.
        markers: Of the tokenizer's chat template.
    """
    found = prompts.questions or tuple(question_text(text, markers) for text in prompts.texts)
    if found == prompts.texts:
        return prompts
    parts = [question for text, question in zip(prompts.texts, found, strict=True) if question != text]
    encoded = iter(encode_texts(tokenizer, parts))
    rows = []
    for ids, mask, text, question in zip(prompts.input_ids, prompts.attention_mask, prompts.texts, found, strict=True):
        rows.append(ids[mask.bool()].tolist() if question == text else next(encoded))
    device = prompts.input_ids.device
    return PromptBatch.from_ids(rows, tokenizer, device=device, task_names=prompts.task_names, texts=found, questions=found)


def initial_router_input(view: str, prompts: PromptBatch, tokenizer: Any) -> PromptBatch:
    """What the first answer is routed on: the prompt, or under ``segment`` its first question.

    Args:
        view: The method's view.
        prompts: What is routed (``routed_questions``); returned unchanged unless some row asks several questions.
        tokenizer: Encodes the texts that differ.
    """
    if view != "segment":
        return prompts
    names = None if prompts.task_names is None else tuple(segment_task(name, 0) for name in prompts.task_names)
    if all(len(asked_questions(text).spans) < 2 for text in prompts.texts):
        return PromptBatch(prompts.input_ids, prompts.attention_mask, prompts.texts, names, prompts.questions)
    texts = [segment_text(text, "", 0) for text in prompts.texts]
    return PromptBatch.from_texts(texts, tokenizer, device=prompts.input_ids.device, task_names=names)


def token_ends(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of a row of tokens, and after which of its characters each token ends; special tokens have no characters."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    special = set(tokenizer.all_special_ids)
    if getattr(tokenizer, "is_fast", False):
        plain = [token for token in ids if token not in special]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if encoded["input_ids"] == plain:
            ends = iter(end for _, end in encoded["offset_mapping"])
            found, last = [], 0
            for token in ids:
                last = last if token in special else next(ends)
                found.append(last)
            return text, found
    return text, [len(str(tokenizer.decode(list(ids[: i + 1]), skip_special_tokens=True))) for i in range(len(ids))]


def piecewise_weights(
    ids: Tensor,
    mask: Tensor,
    how: str,
    answer: Tensor,
    route: Callable[[Sequence[str], Sequence[tuple[int, int]]], Tensor],
    tokenizer: Any,
) -> tuple[Tensor, list[list[tuple[str, Tensor]]]]:
    """Routing weights of every token of prompts that end with a token.

    Args:
        ids, mask: Prompts (B, T).
        how: ``question`` or ``sentence``.
        answer: Routing weights of the first answer (B, E); the last token of each row is processed under it.
        route: Texts, and (row, piece) of each, to weights (N, E).
        tokenizer: Finds which token belongs to which piece.

    Returns:
        Weights (B, T, E), and for every row its pieces with the weights (E,) of each. Padding has the weights of the first piece.
    """
    texts: list[str] = []
    places: list[tuple[int, int]] = []
    owners: list[list[int]] = []
    for row in range(ids.shape[0]):
        tokens = ids[row][mask[row].bool()].tolist()
        text, ends = token_ends(tokenizer, tokens)
        spans = split_prompt(text, how)
        starts = [start for start, _ in spans]
        owners.append([len(texts) + max(0, sum(start < end for start in starts) - 1) for end in ends])
        places += [(row, i) for i in range(len(spans))]
        texts += [text[start:end] for start, end in spans]
    routed = route(texts, places).to(answer)
    weights = answer[:, None, :].repeat(1, ids.shape[1], 1)
    shown: list[list[tuple[str, Tensor]]] = [[] for _ in range(ids.shape[0])]
    for row, owner in enumerate(owners):
        index = torch.full((ids.shape[1],), owner[0], device=routed.device)
        index[mask[row].bool()] = torch.tensor(owner, device=routed.device)
        weights[row, :-1] = routed[index[:-1]]
    for (row, _), text, chosen in zip(places, texts, routed, strict=True):
        shown[row].append((text, chosen))
    return weights, shown
