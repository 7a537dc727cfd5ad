"""Where sentences end, as a reader would say; and the token table agrees with the text rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dlplora.errors import GenerationError
from dlplora.inference.generation import SentenceRerouter, VocabularyTable, view_text
from dlplora.inference.sentences import questions, sentence_end_positions, split_sentences
from dlplora.modules.routing_state import RoutingState

TEXTS = {
    "an emoji without a space": ("Great!🎉 Done. It is 3.5.😀 Yes.", ["Great!", "🎉 Done.", "It is 3.5.", "😀 Yes."]),
    "plain": ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
    "abbreviations": ("Dr. Kim met Mr. Roy at 5 p.m. sharp, e.g. here. Bye.", ["Dr. Kim met Mr. Roy at 5 p.m. sharp, e.g. here.", "Bye."]),
    "initials": ("J. R. Smith wrote it. So did I. Really.", ["J. R. Smith wrote it.", "So did I.", "Really."]),
    "decimals": ("It costs 3.50 now. Or 1,000.5 later.", ["It costs 3.50 now.", "Or 1,000.5 later."]),
    "addresses": ("See www.example.org for more. Bye.", ["See www.example.org for more.", "Bye."]),
    "ellipsis": ("Well... Yes.", ["Well...", "Yes."]),
    "one character ellipsis": ("Well… Yes.", ["Well…", "Yes."]),
    "several stops": ("What?! No way!!! Fine.", ["What?!", "No way!!!", "Fine."]),
    "quotes": ('He said "go." Then he left.', ['He said "go."', "Then he left."]),
    "brackets": ("(It rained.) We stayed. [Really?] Yes.", ["(It rained.)", "We stayed.", "[Really?]", "Yes."]),
    "newline": ("A list\nof two\n\nlines", ["A list", "of two", "lines"]),
    "list numbers": ("1. First thing. 2\n2. Second thing.", ["1. First thing.", "2", "2. Second thing."]),
    "a number ends a sentence": ("The answer is 7. The next is 8.", ["The answer is 7.", "The next is 8."]),
    "chinese": ("今天下雨。我们不去！好吗？好。", ["今天下雨。", "我们不去！", "好吗？", "好。"]),
    "chinese quotes": ("他说：“走。”然后走了。", ["他说：“走。”", "然后走了。"]),
    "short answers": ("The answer is no. Next. It is B. Then 42. So it", ["The answer is no.", "Next.", "It is B.", "Then 42.", "So it"]),
    "short answers on lines": ("no.\nB.\n42.\nU.S.\n5 p.m.\nCorp.\nyes", ["no.", "B.", "42.", "U.S.", "5 p.m.", "Corp.", "yes"]),
    "stop and line break": ("yes.\neast.\n\nwest.\r\nnorth", ["yes.", "east.", "west.", "north"]),
    "a letter is answer or initial": (
        "B follows A. Then C. By J. Smith. Ask John F. Kennedy.",
        ["B follows A.", "Then C.", "By J. Smith.", "Ask John F. Kennedy."],
    ),
    "acronyms": ("The U.S. Army left the U.S. The end. At 5 p.m. Then", ["The U.S. Army left the U.S.", "The end.", "At 5 p.m.", "Then"]),
    "companies": ("Apple Inc. and Ford Corp. grew. So did Kim Ltd. Next", ["Apple Inc. and Ford Corp. grew.", "So did Kim Ltd.", "Next"]),
    "degrees and dates": ("Her Ph.D. came on Jan. 5 with No. 3. Good.", ["Her Ph.D. came on Jan. 5 with No. 3.", "Good."]),
    "german": (
        "Am 3. Juli, z. B. der 2. Weltkrieg. Ja. Nr. 5 usw. Dann",
        ["Am 3. Juli, z. B. der 2. Weltkrieg.", "Ja.", "Nr. 5 usw.", "Dann"],
    ),
    "ellipsis goes on": ("Well... maybe… yes. No", ["Well... maybe… yes.", "No"]),
    "a quotation goes on": ('"Go!" he said. "No." Then "Why?" I', ['"Go!" he said.', '"No."', 'Then "Why?"', "I"]),
    "emphasis": ("It is **12.** Next _one._ And", ["It is **12.**", "Next _one._", "And"]),
    "an answer that looks like a list number": ("\n42. Next.", ["42.", "Next."]),
    "japanese quotation": ("「行く。」と言った。はい。", ["「行く。」と言った。", "はい。"]),
    "hindi": ("राम घर गया। सीता गई।", ["राम घर गया।", "सीता गई।"]),
    "urdu and arabic": ("کیا؟ ہاں۔ نعم. لا", ["کیا؟", "ہاں۔", "نعم.", "لا"]),
    "armenian, ethiopic, burmese, khmer": ("Այո։ Ոչ։ ሰላም። သွားပါ။ ទៅ។ x", ["Այո։", "Ոչ։", "ሰላም።", "သွားပါ။", "ទៅ។", "x"]),
    "many stops are one end": ("好。。。是！？对", ["好。。。", "是！？", "对"]),
    "code": ("x = a.b\nprint(x)\n", ["x = a.b", "print(x)"]),
    "no stop": ("nothing ends here", ["nothing ends here"]),
    "nothing": ("", []),
    "white space": (" \n\n ", []),
}


@pytest.mark.parametrize("name", TEXTS)
def test_sentences(name: str) -> None:
    text, expected = TEXTS[name]
    assert split_sentences(text) == expected


def test_a_stop_at_the_end_is_open_while_more_may_follow() -> None:
    assert sentence_end_positions("It is 3.") == [8]
    assert sentence_end_positions("It is 3.", final=False) == []
    assert sentence_end_positions("It is 3. ", final=False) == [8]
    assert sentence_end_positions("It is.\n", final=False)[-1] in {6, 7}
    assert sentence_end_positions("下雨。", final=False) == []  # it may be 。。 or 。」
    assert sentence_end_positions("下雨。我", final=False) == [3]


def test_questions_of_a_prompt() -> None:
    assert questions("Who? Where?\nAnswer:") == ["Who?", "Where?\nAnswer:"]
    assert questions("First one.\n\nSecond one. Answer:") == ["First one.", "Second one. Answer:"]


@pytest.mark.parametrize("text", ["yes.\neast", "no. \n\neast", "one?!\r\ntwo", "好。。。是", "42.\nx", "U.S.\nx"])
def test_one_end_is_counted_once(text: str) -> None:
    assert len(sentence_end_positions(text, final=False)) == 1


def test_views(tiny_tokenizer: Any) -> None:
    prompt, text = "Who? Where?", " Mia. There"
    assert view_text("tail", prompt, text, 1, tiny_tokenizer) == "Who? Where? Mia. There"
    assert view_text("tail", "1. Who?\n\n2. Where?", text, 1, tiny_tokenizer) == "2. Where? Mia. There"
    assert view_text("whole", prompt, text, 1, tiny_tokenizer) == "Who? Where? Mia. There"
    assert view_text("segment", prompt, text, 0, tiny_tokenizer) == "Who?"
    assert view_text("segment", prompt, text, 5, tiny_tokenizer) == "Where?"
    long = "the cat sees a box . " * 60
    window = view_text("window", long, text, 1, tiny_tokenizer)
    assert (long + text).endswith(window)
    assert len(tiny_tokenizer(window, add_special_tokens=False)["input_ids"]) <= 65
    with pytest.raises(GenerationError, match="unknown view 'all'"):
        view_text("all", prompt, text, 1, tiny_tokenizer)


def metaspace_tokenizer() -> Any:
    """Spaces are part of the next piece and marked, as in SentencePiece vocabularies."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    corpus = [text for text, _ in TEXTS.values()] + ["the cat sees the box. It is red! Is it? Yes."] * 3
    special = ["<unk>", "<s>", "</s>"]
    raw.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def reroutes_at(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Tokens after which the watcher re-routes, and tokens after which the text rule sees one more certain end."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    fired: list[int] = []

    def route(views: list[str]) -> torch.Tensor:
        fired.append(step)
        return torch.ones(len(views), 2)

    table = VocabularyTable(tokenizer, len(tokenizer))
    watcher = SentenceRerouter(RoutingState(torch.ones(1, 2)), route, ["prompt"], tokenizer, table, 1)
    expected, known = [], 0
    for step in range(1, len(ids) + 1):
        assert watcher(torch.tensor([[0, *ids[:step]]]), None).tolist() == [False]
        ends = len(sentence_end_positions(tokenizer.decode(ids[:step]), final=False))
        if ends > known:
            expected.append(step)
            known = ends
    return fired, expected


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize("name", [name for name in TEXTS if TEXTS[name][0].strip()])
def test_the_watcher_sees_what_the_text_rule_sees(name: str, kind: str, tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer if kind == "byte-level" else metaspace_tokenizer()
    text = TEXTS[name][0]
    if kind == "metaspace":
        text = text.replace("\r\n", " ").replace("\n", " ")  # this vocabulary has no newline
    fired, expected = reroutes_at(tokenizer, text)
    assert fired == expected
    if kind == "byte-level":
        assert len(expected) >= len(TEXTS[name][1]) - 1


def test_chinese_stops_are_seen_with_the_character_behind_them(tiny_tokenizer: Any) -> None:
    fired, expected = reroutes_at(tiny_tokenizer, TEXTS["chinese"][0])
    assert fired == expected
    assert len(fired) == 3  # nothing follows the last one


def test_rows_end_their_sentences_apart(tiny_tokenizer: Any) -> None:
    texts = ["Mia sees. Leo", "one two three four", "a. b. c"]
    rows = [tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows))
    grid = torch.tensor([[0] + row + [2] * (width - len(row)) for row in rows])  # 2 ends a text and is no word
    seen: list[tuple[int, str]] = []
    state = RoutingState(torch.zeros(3, 2))

    def route(views: list[str]) -> torch.Tensor:
        seen.extend((step, view) for view in views)
        return torch.tensor([[float(len(seen)), 0.0]]).repeat(len(views), 1)

    table = VocabularyTable(tiny_tokenizer, len(tiny_tokenizer))
    trace: list[dict[str, Any]] = []
    watcher = SentenceRerouter(state, route, ["P0", "P1", "P2"], tiny_tokenizer, table, 1, "whole", trace, ("x", "y"))
    for step in range(2, width + 2):
        watcher(grid[:, :step], None)
    assert {entry["row"] for entry in trace} == {0, 2}
    assert [entry["sentence_idx"] for entry in trace if entry["row"] == 2] == [1, 2]
    assert float(state.weights[1].sum()) == 0.0
    assert all(view.startswith(("P0Mia sees.", "P2a.")) for _, view in seen)
