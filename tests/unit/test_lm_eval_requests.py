"""Windows, padding, decoding options, stop texts and statistics against hand-made values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dlplora.errors import GenerationError
from dlplora.lm_eval.requests import GenerationSettings, Prompt, ScoringRequest, StopTexts, pad_rows
from dlplora.lm_eval.routing_statistics import RoutingStatistics, summarize


def request(context: tuple[int, ...], continuation: tuple[int, ...], task: str | None = None) -> ScoringRequest:
    return ScoringRequest(context, continuation, Prompt(context, task))


def test_window_drops_the_last_token_and_cuts_on_the_left() -> None:
    unit = request((1, 2, 3, 4), (5, 6, 7))
    assert unit.window(100) == (1, 2, 3, 4, 5, 6)
    assert unit.window(6) == (1, 2, 3, 4, 5, 6)
    assert unit.window(4) == (3, 4, 5, 6)
    assert request((1,), (5,)).window(1) == (1,)


def test_forward_passes_are_shared_only_within_a_context_and_a_task() -> None:
    one, two = request((1, 2), (3, 4)), request((1, 2), (3, 9))
    assert one.forward_key == two.forward_key
    assert one.forward_key != request((1, 2, 3), (4,)).forward_key, "the same tokens, another split: another plan"
    assert one.forward_key != request((1, 2), (3, 4), "other").forward_key


def test_padding_on_both_sides() -> None:
    ids, mask = pad_rows([(5, 6), (7,)], 9, "right", "cpu")
    assert ids.tolist() == [[5, 6], [7, 9]]
    assert mask.tolist() == [[1, 1], [1, 0]]
    ids, mask = pad_rows([(5, 6), (7,)], 9, "left", "cpu")
    assert ids.tolist() == [[5, 6], [9, 7]]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_settings_follow_lm_eval() -> None:
    given = {"until": ["\n", ""], "max_gen_toks": 7, "do_sample": False}
    settings = GenerationSettings.parse(given, default_max_new_tokens=256, eos="</s>")
    assert settings.until == ("\n", "</s>")
    assert settings.max_new_tokens == 7
    assert dict(settings.options) == {"do_sample": False}
    sampled = GenerationSettings.parse({"temperature": 0.7, "top_p": 0.9}, default_max_new_tokens=256, eos="</s>")
    assert sampled.max_new_tokens == 256
    assert dict(sampled.options) == {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    with pytest.raises(GenerationError, match="num_return_sequences"):
        GenerationSettings.parse({"num_return_sequences": 2}, default_max_new_tokens=8, eos=None)


def test_settings_leave_the_task_s_options_alone() -> None:
    options: dict[str, Any] = {"until": ["x"], "max_gen_toks": 3}
    GenerationSettings.parse(options, default_max_new_tokens=1, eos="</s>")
    assert options == {"until": ["x"], "max_gen_toks": 3}


def test_stop_texts_end_rows_one_by_one_and_never_look_into_the_prompt(tiny_tokenizer: Any) -> None:
    prompt = tiny_tokenizer("the cat . red", add_special_tokens=False)["input_ids"]
    stop = StopTexts(tiny_tokenizer, [". red", "</s>"], len(prompt))
    endings = [" dog . red", " dog red .", " dog the box"]
    rows = [prompt + tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in endings]
    ids, _ = pad_rows(rows, 0, "right", "cpu")
    assert stop(ids, None).tolist() == [True, False, False]
    with_eos = torch.tensor([[*prompt, tiny_tokenizer.eos_token_id]])
    assert stop(with_eos, None).tolist() == [True]
    assert stop(torch.tensor([prompt]), None).tolist() == [False]


def test_stop_text_spelt_byte_by_byte_is_found(tiny_tokenizer: Any) -> None:
    text = "plum pear"
    spelt = [tiny_tokenizer.convert_tokens_to_ids("Ġ" if char == " " else char) for char in text]
    stop = StopTexts(tiny_tokenizer, [text], 1)
    assert stop(torch.tensor([[1, 1, 1, *spelt]]), None).tolist() == [True]
    assert stop(torch.tensor([[1, 1, 1, *spelt[:-1]]]), None).tolist() == [False]


def test_statistics_by_hand() -> None:
    statistics = RoutingStatistics(("a", "b", "c"))
    statistics.add_weights(torch.tensor([0.5, 0.5, 0.0]), "b")  # a tie goes to the first: wrong
    statistics.add_weights(torch.tensor([0.0, 0.0, 1.0]), "c")
    statistics.add_weights(torch.tensor([0.0, 0.0, 0.0]), "a")  # nobody is asked: wrong
    statistics.add_weights(torch.tensor([0.2, 0.3, 0.5]), "unknown task")  # not judged
    statistics.count("reroutes", 3)
    figures = summarize(statistics.sums)
    entropies = [math.log(2), 0.0, 0.0, -(0.2 * math.log(0.2) + 0.3 * math.log(0.3) + 0.5 * math.log(0.5))]
    assert figures["router_accuracy"] == pytest.approx(1 / 3)
    assert figures["mean_experts_kept"] == pytest.approx((2 + 1 + 0 + 3) / 4)
    assert figures["fraction_multi"] == pytest.approx(2 / 4)
    assert figures["mean_entropy_nats"] == pytest.approx(sum(entropies) / 4, abs=1e-7)
    assert (figures["num_plans"], figures["num_reroutes"], figures["num_truncated_prompts"]) == (4, 3, 0)


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [0.25, 0.25, 0.25]])
def test_a_method_that_prefers_nobody_has_no_router_accuracy(weights: list[float]) -> None:
    statistics = RoutingStatistics(("a", "b", "c"))
    for task in "aabc":
        statistics.add_weights(torch.tensor(weights), task)
    assert summarize(statistics.sums)["router_accuracy"] is None


def test_nothing_measured_is_none_not_zero() -> None:
    figures = summarize(RoutingStatistics(("a",)).sums)
    assert figures["router_accuracy"] is None
    assert figures["mean_experts_kept"] is None
    assert figures["num_plans"] == 0
