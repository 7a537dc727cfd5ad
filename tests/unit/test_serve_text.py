"""Incremental decoding and stop texts give what the whole text gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from dlplora.inference.generation import EndedSentences, VocabularyTable
from dlplora.serve.jobs import Job, Target
from dlplora.serve.logprobs import TokenTexts
from dlplora.serve.rows import Row
from dlplora.serve.sampling import Chosen, Sampler, SamplingOptions
from dlplora.serve.text import Detokenizer, StopTexts


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="ab é。😀\n!", max_size=20))
def test_pieces_add_up_to_the_text(tiny_tokenizer: Any, text: str) -> None:
    tokens = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    decoder, texts = Detokenizer(tiny_tokenizer), TokenTexts(tiny_tokenizer)
    pieces, before = [], b""
    for token in tokens:
        assert decoder.length == len(before.decode(errors="ignore")), "the offset of a token is that of the character that it goes on with"
        pieces.append(decoder.push(token))
        before += texts.raw(token)
    assert before == text.encode()
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.finish() == tiny_tokenizer.decode(tokens, skip_special_tokens=True) == decoder.text


def test_bytes_of_a_sentencepiece_tokenizer() -> None:
    """Its decoder drops the first space, and unknown characters are spelt in tokens such as ``<0xE2>``."""
    vocab = {"▁": 0, "c": 1, "a": 2, "t": 3, "▁c": 4, "▁ca": 5, "▁cat": 6, **{f"<0x{one:02X}>": 7 + one for one in range(256)}}
    model = Tokenizer(models.BPE(vocab, [("▁", "c"), ("▁c", "a"), ("▁ca", "t")], byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    texts = TokenTexts(tokenizer)
    tokens = tokenizer("cat cat€")["input_ids"]
    assert [texts.raw(token) for token in tokens] == [b" cat", b" cat", b"\xe2", b"\x82", b"\xac"]
    assert [texts.name(token) for token in tokens[1:3]] == [" cat", r"bytes:\xe2"]
    chosen = [Chosen(token, -0.5, ((tokens[0], -0.1),), place) for place, token in enumerate(tokens[:3])]
    assert texts.of_chat(chosen)["content"][2] == {
        "token": r"\xe2",
        "logprob": -0.5,
        "bytes": [0xE2],
        "top_logprobs": [{"token": " cat", "logprob": -0.1, "bytes": [32, 99, 97, 116]}],
    }
    assert texts.of_completion(chosen[1:]) == {
        "tokens": [" cat", r"bytes:\xe2"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{" cat": -0.5}, {" cat": -0.1, r"bytes:\xe2": -0.5}],
        "text_offset": [1, 2],
    }


def test_log_probabilities_are_those_of_the_model() -> None:
    """Before penalties, temperature and ``top_p``, as in vLLM."""
    logits = torch.tensor([2.0, 1.0, 0.0])
    options = SamplingOptions(temperature=0.5, top_p=0.0, frequency_penalty=2.0, top_logprobs=1)
    sampler = Sampler(options, torch.device("cpu"))
    first, second = sampler.choose(logits), sampler.choose(logits)
    wanted = logits.log_softmax(dim=-1).tolist()
    assert (first.token, first.logprob) == (0, pytest.approx(wanted[0]))
    assert (second.token, second.logprob) == (1, pytest.approx(wanted[1]))
    assert second.alternatives == ((0, pytest.approx(wanted[0])),)


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
