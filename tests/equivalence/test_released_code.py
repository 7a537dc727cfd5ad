"""The released code's evaluation: numbers worked out by hand, and predictions of a plain loop over PEFT, token by token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.evaluation import released_code
from dlplora.evaluation.released_code import character_bleu, predictions, released_layout, released_metrics, rows_of
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.tasks.types import Item

QUESTIONS = [
    ("alpha", "the cat sees the", "red box ."),
    ("beta", "who likes the plum in the tree ?", "Mia"),
    ("alpha", "what", "the dog is in the blue box , yes !"),
]


def test_the_layout_of_the_released_code() -> None:
    assert released_layout([7, 8, 9], [4, 5, 2], repeat_last=True) == ([7, 8, 9, 9, 4, 5], [9, 4, 5, 2])
    assert released_layout([7, 8, 9], [4, 5, 2], repeat_last=False) == ([7, 8, 9, 4, 5], [4, 5, 2])
    assert released_layout([7], [2], repeat_last=True) == ([7, 7], [7, 2])


@pytest.mark.parametrize(
    ("label", "predicted", "expected"),
    [
        ("The answer is A", "The answer is B", (11 / 15) ** 0.25),  # 14/15 x 13/14 x 12/13 x 11/12
        ("abcde", "abcdx", (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        ("abcdef", "abcd", math.exp(1 - 6 / 4)),  # every n-gram right, too short
        ("abcd", "abcd", 1.0),
        ("A", "A", 0.0),  # one letter has no 4-gram, and nothing is smoothed
        ("abcd", "", 0.0),
    ],
)
def test_bleu_over_characters_by_hand(label: str, predicted: str, expected: float) -> None:
    assert character_bleu(label, predicted) == pytest.approx(expected, abs=1e-9)


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "".join(chr(i) for i in ids)


def test_the_numbers_of_one_row_by_hand() -> None:
    targets, predicted = [ord(c) for c in "a cat"], [ord(c) for c in "a aat"]
    found = released_metrics(predicted, targets, Letters())
    # letters of the label: a, blank, c, a, t; of the prediction: a, blank, a, a, t. Two of three a's are covered.
    assert found["self_bleu"] == pytest.approx(4 / 5)
    assert found["self_rouge"] == pytest.approx(1.0)
    assert found["exact"] == 0.0
    assert found["rouge1"] == pytest.approx(0.5)  # words: "a cat" and "a aat"
    assert found["rougeL"] == pytest.approx(0.5)
    assert released_metrics(targets, targets, Letters())["exact"] == 1.0


@pytest.mark.parametrize("repeat_last", [False, True])
def test_predictions_are_those_of_a_plain_loop_over_peft(
    repeat_last: bool, tiny_llama_folder: Path, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path
) -> None:
    from peft import PeftModel

    items = [Item(task, prompt, answer) for task, prompt, answer in QUESTIONS]
    with torch.no_grad():
        fused = FusedCausalLM.from_pretrained(str(tiny_llama_folder), pool=tiny_pool, method="oracle")
        rows, num_cut = rows_of(items, tiny_tokenizer, 256, repeat_last=repeat_last)
        found = predictions(fused, rows)
        fused.close()
        truth = PeftModel.from_pretrained(tiny_llama, str(tiny_pool / "alpha"), adapter_name="alpha")
        truth.load_adapter(str(tiny_pool / "beta"), adapter_name="beta")
        truth.eval()
        for (task, prompt, answer), predicted in zip(QUESTIONS, found, strict=True):
            truth.set_adapter(task)
            context = tiny_tokenizer(prompt)["input_ids"]
            right = [*tiny_tokenizer(f"{prompt} {answer}")["input_ids"][len(context) :], tiny_tokenizer.eos_token_id]
            seen = list(context)
            expected = []
            for token in ([context[-1]] if repeat_last else []) + right:
                logits = truth(input_ids=torch.tensor([seen])).logits[0, -1]
                expected.append(int(logits.argmax()))
                seen.append(token)
            assert predicted == expected
    assert num_cut == 0


def test_prompts_that_do_not_fit_are_counted(tiny_tokenizer: Any) -> None:
    items = [Item("alpha", "the cat sees " * 20, "yes"), Item("alpha", "the cat", "yes")]
    rows, num_cut = rows_of(items, tiny_tokenizer, 24, repeat_last=True)
    assert num_cut == 1
    assert len(rows[0].inputs) <= 24
    assert rows[0].targets[-1] == tiny_tokenizer.eos_token_id
    assert set(released_code.REPEATED) <= set(released_code.METRICS)
