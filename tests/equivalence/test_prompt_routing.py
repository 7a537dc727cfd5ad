"""Prompts routed piece by piece, against merged models that hand their keys and values on; and who answers which question."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.errors import GenerationError
from dlplora.inference.generation import view_text
from dlplora.inference.prompt_routing import (
    asked_questions,
    initial_router_input,
    piecewise_weights,
    segment_text,
    split_prompt,
    token_ends,
)
from dlplora.types import PromptBatch
from tests.equivalence.test_kv_policy import ByLength, fused_with, keys_and_values, merged, talkative

__all__ = ["talkative"]

PROMPTS = {
    "question": (
        "Mia sees a cat. Who sees it?\nAnswer:\n\nWhere is the box?\nAnswer:\n\nIs it red?\nAnswer:",
        "the dog is blue",
        "Who? Where?",
    ),
    "sentence": ("Mia sees a cat. Who sees it?\nAnswer:\n\nWhere is the box?\nAnswer:", "the dog is blue", "One. Two! three"),
}
PIECES = {
    "question": (
        ["Mia sees a cat. Who sees it?\nAnswer:", "Where is the box?\nAnswer:", "Is it red?\nAnswer:"],
        ["the dog is blue"],
        ["Who?", "Where?"],
    ),
    "sentence": (
        ["Mia sees a cat.", "Who sees it?", "Answer:", "Where is the box?", "Answer:"],
        ["the dog is blue"],
        ["One.", "Two!", "three"],
    ),
}


@pytest.mark.parametrize("how", ["question", "sentence"])
def test_pieces(how: str) -> None:
    for prompt, expected in zip(PROMPTS[how], PIECES[how], strict=True):
        assert [prompt[start:end] for start, end in split_prompt(prompt, how)] == expected
    assert split_prompt("One. Two.", "whole") == [(0, 9)]
    with pytest.raises(GenerationError, match="unknown prompt_routing 'word'; known: whole, question, sentence"):
        split_prompt("One.", "word")


@pytest.mark.parametrize("how", ["question", "sentence"])
def test_prefill_equals_merged_models_in_a_row(how: str, talkative: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """Each piece by a model with that piece's weights merged, after the keys and values of the pieces before; left-padded in a batch."""
    route = ByLength().route
    fused = fused_with(copy.deepcopy(talkative), tiny_tokenizer, tiny_pool, "stale", how)
    trace: list[dict[str, Any]] = []
    out = fused.generate(
        list(PROMPTS[how]),
        max_new_tokens=2,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        trace=trace,
    )
    for row, (prompt, parts) in enumerate(zip(PROMPTS[how], PIECES[how], strict=True)):
        tokens = tiny_tokenizer(prompt)["input_ids"]
        answer = route(PromptBatch.from_texts((prompt,), tiny_tokenizer))[0]
        past: list[tuple[torch.Tensor, torch.Tensor]] = []
        begin, shown = 0, trace[row]["prompt_pieces"]
        assert [piece["text"] for piece in shown] == parts
        with torch.no_grad():
            for i, part in enumerate(parts):
                # a token belongs to the piece that its last character lies in; white space belongs to the piece before
                end = len(tokens) - 1 if i == len(parts) - 1 else _first_token_of(tiny_tokenizer, tokens, prompt, parts, i + 1)
                weights = route(PromptBatch.from_texts((part,), tiny_tokenizer))[0]
                if end > begin:
                    past, _ = keys_and_values(merged(talkative, tiny_pool, weights), tokens[begin:end], past)
                begin = end
            past, logits = keys_and_values(merged(talkative, tiny_pool, answer), tokens[-1:], past)
            assert (out.logits[0][row] - logits).abs().max() < 1e-5
            _, logits = keys_and_values(merged(talkative, tiny_pool, answer), [int(logits.argmax())], past)
        assert (out.logits[1][row] - logits).abs().max() < 1e-5


def _first_token_of(tokenizer: Any, tokens: list[int], prompt: str, parts: list[str], which: int) -> int:
    start = 0
    for part in parts[:which]:
        start = prompt.index(part, start) + len(part)
    start = prompt.index(parts[which], start)
    return next(k for k in range(len(tokens)) if len(tokenizer.decode(tokens[: k + 1], skip_special_tokens=True)) > start)


def test_one_question_is_one_piece(talkative: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    said = {}
    for how in ("whole", "question"):
        fused = fused_with(copy.deepcopy(talkative), tiny_tokenizer, tiny_pool, "stale", how)
        said[how] = fused.generate(["Mia sees a cat. Who sees it?\nAnswer:"], max_new_tokens=12, do_sample=False)
    assert torch.equal(said["whole"], said["question"])


def test_token_ends_with_and_without_offsets(tiny_tokenizer: Any) -> None:
    class Slow:
        """The same tokenizer without offsets."""

        is_fast = False
        all_special_ids = tiny_tokenizer.all_special_ids
        decode = staticmethod(tiny_tokenizer.decode)

    ids = tiny_tokenizer("Mia sees the box.\n\nOne, two")["input_ids"]
    assert token_ends(tiny_tokenizer, ids) == token_ends(Slow(), ids)


def test_padding_and_the_last_token(tiny_tokenizer: Any) -> None:
    ids, mask = torch.tensor([[0, 0, *tiny_tokenizer("Who? Where?")["input_ids"]]]), None
    mask = (ids != 0).long()
    weights, shown = piecewise_weights(
        ids,
        mask,
        "question",
        torch.tensor([[0.0, 7.0]]),
        lambda texts, places: torch.tensor([[float(row), 1.0 + i] for row, i in places]),
        tiny_tokenizer,
    )
    assert weights.shape == (1, ids.shape[1], 2)
    assert weights[0, -1].tolist() == [0.0, 7.0]
    assert weights[0, :3, 1].tolist() == [1.0, 1.0, 1.0]
    assert weights[0, -2, 1] == 2.0
    assert [text for text, _ in shown[0]] == ["Who?", "Where?"]


ASKED = {
    "blocks": ("Who? Or what?\nAnswer:\n\nWhere is it.\nAnswer:", ["Who? Or what?\nAnswer:", "Where is it.\nAnswer:"], "line"),
    "running": ("Who? Where?", ["Who?", "Where?"], "sentence"),
    "one": ("Mia has a plum. Who has it?\nAnswer:", ["Mia has a plum. Who has it?\nAnswer:"], "sentence"),
    "numbered": (
        "Example 1:\n\n1. Red?\n\n2. Blue?\n\nAnswers:\n1. a\n2. b\n\nQuestions:\n\n1. One?\nA:\n\n2. Two?\nA:\n\nAnswers:",
        ["One?\nA:", "Two?\nA:"],
        "numbered",
    ),
    "instructions": (
        "Example 1:\n\n[INST] x [/INST]\n\n1. y\n\nGo on:\n\n[INST] Who?\n\nWhy? [/INST]\n\n[INST] Where? [/INST]",
        ["Who?\n\nWhy?", "Where?"],
        "numbered",
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_asked_questions(name: str) -> None:
    prompt, expected, answers = ASKED[name]
    asked = asked_questions(prompt)
    assert asked.texts(prompt) == expected
    assert asked.answers == answers


def test_the_segment_follows_the_answers(tiny_tokenizer: Any) -> None:
    blocks, numbered = ASKED["blocks"][0], ASKED["numbered"][0]
    assert segment_text(blocks, "", 0) == "Who? Or what?\nAnswer:"
    assert segment_text(blocks, " Mia. And Leo", 1) == "Who? Or what?\nAnswer:"  # a second sentence is not a second answer
    assert segment_text(blocks, " Mia.\n", 2) == "Where is it.\nAnswer:"
    assert segment_text(blocks, "\n", 0) == "Where is it.\nAnswer:"  # an answer left empty
    assert segment_text(numbered, "\n1. x", 1) == "One?\nA:"  # the line break before the list is none
    assert segment_text(numbered, "\n1. x\n", 1) == "Two?\nA:"
    assert segment_text(numbered, "\n1. x\n2. y\n", 2) == "Two?\nA:"
    assert segment_text("", "x", 1) == ""
    assert view_text("segment", "Who? Where?", "Mia. ", 1, tiny_tokenizer) == "Where?"


def test_the_first_answer_is_routed_on_the_first_question(tiny_tokenizer: Any) -> None:
    prompts = PromptBatch.from_texts((ASKED["blocks"][0], "Who?"), tiny_tokenizer, task_names=("a+b", "c"))
    for view in ("tail", "window", "whole"):
        assert initial_router_input(view, prompts, tiny_tokenizer) is prompts
    first = initial_router_input("segment", prompts, tiny_tokenizer)
    assert first.texts == ("Who? Or what?\nAnswer:", "Who?")
    assert first.task_names == ("a", "c")
    single = PromptBatch.from_texts(("Who?",), tiny_tokenizer)
    assert torch.equal(initial_router_input("segment", single, tiny_tokenizer).input_ids, single.input_ids)
