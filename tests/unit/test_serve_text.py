"""Incremental decoding and stop texts give what the whole text gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlplora.inference.generation import EndedSentences, VocabularyTable
from dlplora.serve.jobs import Job, Target
from dlplora.serve.rows import Row
from dlplora.serve.sampling import Chosen, SamplingOptions
from dlplora.serve.text import Detokenizer, StopTexts


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="ab é。😀\n!", max_size=20))
def test_pieces_add_up_to_the_text(tiny_tokenizer: Any, text: str) -> None:
    tokens = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    decoder = Detokenizer(tiny_tokenizer)
    pieces = [decoder.push(token) for token in tokens]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.finish() == tiny_tokenizer.decode(tokens, skip_special_tokens=True) == decoder.text


@settings(max_examples=300, deadline=None)
@example(pieces=["ca", "b"], stops=["a", "cab"])
@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=8),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=3), max_size=3),
)
def test_the_first_stop_text_ends_the_answer_whatever_the_pieces(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    complete = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    watcher, shown, found = StopTexts(stops), "", False
    for piece in pieces:
        text, found = watcher.push(piece)
        shown += text
        if found:
            break
    if not found:
        shown += watcher.finish()
    assert found == bool(complete)
    assert shown == (whole[: min(complete)[1]] if complete else whole)


@pytest.mark.parametrize("prompt", ["Who sees the cat?", "Who sees the cat?\n\nWho likes the box?\n\nAnswers:"])
@pytest.mark.parametrize("answer", ["the cat. Mia sees", "\nthe box. two", "\n\n two 。 the cat! no", 'J. R. Smith sees. "the" cat'])
def test_sentences_end_where_the_rule_sees_it(tiny_tokenizer: Any, prompt: str, answer: str) -> None:
    """The rule on the whole text after every token, against rows that look only behind tokens of the vocabulary table."""
    tokens = tiny_tokenizer(answer, add_special_tokens=False)["input_ids"]
    job = Job(
        prompt_ids=(1,), routed_text=prompt, target=Target(), sampling=SamplingOptions(), max_tokens=99, report=lambda event: None
    )  # fmt: skip
    row = Row(job, tiny_tokenizer, VocabularyTable(tiny_tokenizer, len(tiny_tokenizer)), torch.device("cpu"))
    seen, expected, count = [], [], 0
    for num, token in enumerate(tokens, 1):
        row.take(Chosen(token), frozenset())
        seen.append(row.ended_sentence("whole"))
        text = tiny_tokenizer.decode(tokens[:num], skip_special_tokens=True)
        rule = EndedSentences(prompt)  # reads the whole text
        rule.look(text)
        ended = rule.number
        expected.append(prompt + text if ended > count else None)
        count = max(count, ended)
    assert seen == expected
    assert any(seen)
