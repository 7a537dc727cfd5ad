"""Random texts: ends are never taken back, and rows are re-routed exactly where the text rule sees an end, whatever the tokenizer."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dlplora.inference.loading import nano_asset
from dlplora.inference.question import question_text, routed_tail
from dlplora.inference.sentences import sentence_end_positions
from tests.unit.test_sentences import reroutes_at

FRAGMENTS = [
    *(" ", "  ", "\n", "\r\n", "\n\n", ".", "..", "...", "…", "!", "?", "。", "！", "।", "؟", "።", '"', "”", "」", "「", ")", "("),
    *("**", ",", "'", "no", "yes", "east", "B", "I", "J", "Smith", "The", "Next", "42", "3", "1", "U.S", "Corp", "p.m", "Dr", "Ph.D"),
    *("e.g", "z", "Jan", "Juli", "Th", "am", "und", "は", "と", "राम", "نعم", "é", "\u2028", "😀", "- ", "```"),
]
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.characters(exclude_categories=["Cs"])), max_size=14).map("".join)


@functools.cache
def tokenizer_of(kind: str) -> Any:
    """The nano tokenizer, or marked spaces and bytes for unknown characters as in SentencePiece vocabularies of the Llama family."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "byte-level":
        return AutoTokenizer.from_pretrained(nano_asset("backbone"))
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizer
    corpus = ["the cat sees no. yes! The end? Next p.m. U.S. Dr. Smith e.g. 42. 3. B. J. Corp. Jan."] * 3
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = [*model["vocab"], *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    raw = Tokenizer(models.BPE(vocab, [tuple(merge) for merge in model["merges"]], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizer
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, data=st.data())
def test_no_end_is_taken_back(text: str, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text)))
    early, whole = sentence_end_positions(text[:cut], final=False), sentence_end_positions(text, final=True)
    assert early == whole[: len(early)]


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@settings(max_examples=120, deadline=None)
@given(text=TEXTS)
def test_the_watcher_sees_what_the_text_rule_sees(kind: str, text: str) -> None:
    fired, expected = reroutes_at(tokenizer_of(kind), text)
    assert fired == expected


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_the_question_rule_is_idempotent_and_never_empty(text: str) -> None:
    for prompt in (text, f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", f"System.\n\n{text}?\n\nAnswer:"):
        asked = question_text(prompt)
        assert question_text(asked) == asked
        assert asked.strip() or not prompt.strip()
        assert routed_tail(asked).strip() or not asked.strip()
