"""Texts that grow at their end, and features of tokens that are kept: both against reading everything again."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dlplora.inference.row_tokens import _SPLITS, RowTokens, piece_encoder
from dlplora.modules import known_tokens
from dlplora.modules.router import MiniMLPRouter, RouterConfig
from tests.property.test_sentence_watcher import FRAGMENTS
from tests.property.test_sentence_watcher import tokenizer_of as sentence_tokenizer

WORDS = [
    " the",
    " Mia",
    "cat",
    "'s",
    "'ll",
    " '",
    " I",
    "  x",
    "\n\nA",
    " \n b",
    " 1",
    "12",
    " é",
    " naïve",
    "é",
    "<s>",
    "</s>",
    "<|end|>",
    "Ａ",
]
PIECES = st.one_of(st.sampled_from([*WORDS, *FRAGMENTS]), st.characters(exclude_categories=["Cs"]))
GROWTH = st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=5)


@functools.cache
def tokenizer_of(kind: str) -> Any:
    """nano's; two that split as Llama 3 and Qwen 2 do, after a normalizer and with a token at the end; one of the Llama 2 family."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if not kind.startswith("split"):
        return sentence_tokenizer(kind)
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    pattern = sorted(_SPLITS)[int(kind[-1])]
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_of])
    corpus = ["  a  b   c    d  ", "the cat's 123 Mia sees I'll naïve\n\nA b. x, 12? é"] * 4  # runs of spaces are tokens of their own
    special = ["<s>", "</s>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("kind", ["byte-level", "split 0", "split 1", "byte-fallback"])
@settings(max_examples=50, deadline=None)
@given(growth=GROWTH, other=GROWTH, start=st.sampled_from(["", "Who sees the cat in the red box of Tom, and when? " * 2]))
def test_ids_are_those_of_the_whole_text(kind: str, growth: list[str], other: list[str], start: str) -> None:
    tokenizer = tokenizer_of(kind)
    encode = RowTokens(tokenizer, piece_encoder(tokenizer))
    texts = [start, "A red box, said Mia to the others who were there"]
    for one, two in zip(growth, other, strict=False):
        texts = [texts[0] + one, two if len(two) > 5 else texts[1] + two]  # the second row may begin again
        assert encode([4, 7], texts) == tokenizer(texts)["input_ids"]


@pytest.mark.parametrize("kind", ["byte-level", "split 0", "split 1"])
def test_texts_that_end_in_the_middle_of_something(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    start = "Who sees the cat in the red box of Tom, and when does Mia see it"
    for end in ("  ", " \n ", "   x", " 1", "'s ", " <s> x", "<s> x", " \u3000 b", "\t b", "\n\n  b", ". ", " e\u0301", " <|end|>"):
        encode = RowTokens(tokenizer, piece_encoder(tokenizer))
        for text in (start + end, start + end + " Mia", start + end + "b  c"):
            assert encode([0], [text]) == tokenizer([text])["input_ids"]


def test_which_tokenizers_are_read_in_parts() -> None:
    assert piece_encoder(tokenizer_of("byte-level")) is not None
    assert piece_encoder(tokenizer_of("split 0")) is not None
    assert piece_encoder(tokenizer_of("byte-fallback")) is None  # marks a space at the start of every piece
    from tokenizers import AddedToken

    greedy = copy.deepcopy(tokenizer_of("byte-level"))
    greedy.add_tokens([AddedToken("[eats]", lstrip=True)])
    assert piece_encoder(greedy) is None


def test_a_tokenizer_told_to_cut_texts_is_asked_as_usual() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("byte-level"))
    encode = RowTokens(tokenizer, piece_encoder(tokenizer))
    text = "Who sees the cat in the red box of Tom, and when does Mia come?"
    whole = tokenizer([text])["input_ids"]
    assert encode([0], [text]) == whole
    tokenizer([text], truncation=True, max_length=3, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation is not None
    assert encode([0], [text + " Yes"]) == tokenizer([text + " Yes"])["input_ids"]


@pytest.mark.parametrize("variant", ["backbone", "table"])
def test_kept_features_are_those_of_a_router_that_has_seen_nothing(variant: str, monkeypatch: Any) -> None:
    torch.manual_seed(3)
    embedding = nn.Embedding(90, 12)
    options: dict[str, Any] = {"variant": variant, "hidden": (16, 8, 8), "pooling": "tokens", "table_rows": 70, "table_width": 12}
    given_embedding = embedding if variant == "backbone" else None
    router = MiniMLPRouter(("a", "b"), RouterConfig(**options), embedding=given_embedding).eval()
    monkeypatch.setattr(known_tokens, "MOST_TOKENS", 60)  # the table begins again on the way
    sizes = []
    with torch.no_grad():
        for step in range(12):
            ids = torch.randint(0, 90, (3, 20))
            mask = (torch.arange(20) < torch.tensor([20, 15, 17])[:, None]).long()
            if step == 6:
                router.token_layer[0].weight.mul_(1.5)  # a change in place
            fresh = MiniMLPRouter(("a", "b"), RouterConfig(**options), embedding=given_embedding).eval()
            fresh.load_state_dict(router.state_dict())
            torch.testing.assert_close(router.features(ids, mask), fresh.features(ids, mask), atol=1e-6, rtol=1e-6)
            sizes.append(router._known._table.size)  # type: ignore[union-attr]
    assert min(sizes[1:]) < max(sizes)
    assert copy.deepcopy(router)._known._table is None
    router.features(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4)).sum().backward()  # with gradients nothing is taken from the table
    assert router.token_layer[0].weight.grad is not None  # type: ignore[index,union-attr]
