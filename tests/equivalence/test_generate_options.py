"""What ``generate`` takes: as transformers and PEFT do it, or refused in one line."""

from __future__ import annotations

import copy
import functools
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from dlplora.baselines.meteora import MeteoRA
from dlplora.cli.generate import prompt_text
from dlplora.errors import GenerationError, RoutingError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import FusionMethod, Metadata
from dlplora.methods.references import AvgDelta
from tests.equivalence.by_length import by_length

TEXT = "the cat sees the box. the cat sees two"
TEXTS = ("the cat sees", "Mia likes the plum. Who likes it? Answer:", "a")
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


class Second(FusionMethod):
    """The second adapter alone."""

    name = "second"
    metadata = Metadata(title="Second", granularity="prompt")

    def route(self, prompts: Any) -> Tensor:
        return torch.tensor([[0.0, 1.0, 0.0]]).expand(len(prompts), 3)


@pytest.fixture
def adapted(talkative: Any, tiny_pool: Path) -> Any:
    """PEFT with the adapter that ``Second`` picks."""
    return PeftModel.from_pretrained(copy.deepcopy(talkative), str(tiny_pool / "beta"), autocast_adapter_dtype=False).eval()


def new_tokens(found: Tensor, prompt: Tensor) -> list[list[int]]:
    return found[:, prompt.shape[1] :].tolist()


# ---------------------------------------------------------------------- decoding loops


def first_token_loop(model: Any, input_ids: Tensor, **options: Any) -> Tensor:
    """A decoding loop of a user's own: one greedy token."""
    out = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
    return torch.cat([input_ids, out.logits[:, -1:].argmax(dim=-1)], dim=1)


def loops(talkative: Any) -> list[dict[str, Any]]:
    return [
        {"prompt_lookup_num_tokens": 3},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=24, do_sample=False)},
        {"assistant_model": copy.deepcopy(talkative)},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"custom_generate": first_token_loop},
    ]


@pytest.mark.parametrize("place", range(6))
def test_other_loops_follow_routing_once_per_prompt(place: int, fuse: Any, adapted: Any, talkative: Any, tiny_tokenizer: Any) -> None:
    how = loops(talkative)[place]
    options = how if "generation_config" in how else {**GREEDY, "max_new_tokens": 24, **how}
    ids = tiny_tokenizer(TEXT, return_tensors="pt")["input_ids"]
    expected = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    assert fuse(Second()).generate(input_ids=ids, **options).tolist() == expected.tolist()


def test_assisted_decoding_follows_gates_and_averages(fuse: Any) -> None:
    for method in (AvgDelta(), MeteoRA()):
        fused = fuse(method)
        plain, looked_up = (fused.generate(TEXT, max_new_tokens=24, **GREEDY, **how) for how in ({}, {"prompt_lookup_num_tokens": 3}))
        assert plain.tolist() == looked_up.tolist()


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize(
    "option",
    [
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"token_healing": True},
        {"cache_implementation": "paged"},
        {"assistant_early_exit": 1},
    ],
)
def test_loops_that_sentence_routing_cannot_follow_are_refused(option: dict[str, Any], in_config: bool, fuse: Any) -> None:
    given = {"generation_config": GenerationConfig(**option)} if in_config else option
    with pytest.raises(GenerationError) as caught:
        fuse(by_length()).generate(TEXT, max_new_tokens=4, do_sample=False, **given)
    assert "\n" not in str(caught.value)
    name = "beam search" if "num_beams" in option else next(iter(option))
    assert name in str(caught.value)


def test_models_and_functions_that_decode_are_refused_too(fuse: Any, talkative: Any) -> None:
    fused = fuse(by_length())
    for option in ({"assistant_model": talkative}, {"custom_generate": first_token_loop}):
        with pytest.raises(GenerationError, match=f"{next(iter(option))}.*route once per prompt"):
            fused.generate(TEXT, max_new_tokens=4, do_sample=False, **option)
    # None is no request
    assert fused.generate(TEXT, max_new_tokens=4, prompt_lookup_num_tokens=None, custom_generate=None, **GREEDY).shape[0] == 1


# ---------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("settings", "model_settings"),
    [
        ({"pad_token_id": 0}, {}),
        ({"pad_token_id": 0, "eos_token_id": None}, {}),
        ({"pad_token_id": 0, "eos_token_id": [2, 5]}, {}),
        ({"pad_token_id": 2}, {}),
        ({"pad_token_id": 0, "eos_token_id": [2, 0]}, {}),
        ({"pad_token_id": 0, "eos_token_id": torch.tensor([0])}, {}),
        ({}, {"pad_token_id": 0}),
        ({}, {"pad_token_id": 2}),
        ({"generation_config": GenerationConfig(pad_token_id=0, eos_token_id=2, max_new_tokens=8)}, {}),
        ({"generation_config": GenerationConfig(pad_token_id=2, eos_token_id=2, max_new_tokens=8)}, {}),
    ],
)
def test_missing_masks_are_inferred_as_transformers_infers_them(
    settings: dict[str, Any], model_settings: dict[str, Any], fuse: Any, adapted: Any, tiny_tokenizer: Any
) -> None:
    fused = fuse(Second())
    for config in (fused.generation_config, adapted.generation_config):
        config.update(**model_settings)
    pad = settings.get("pad_token_id", model_settings.get("pad_token_id", 0))
    if "generation_config" in settings:
        pad = settings["generation_config"].pad_token_id
    rows = [tiny_tokenizer(text)["input_ids"] for text in TEXTS]
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    options = {**settings, "do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
    expected = adapted.generate(input_ids=ids, **copy.deepcopy(options))
    for how in ({"input_ids": ids}, {"inputs": ids}):
        assert new_tokens(fused.generate(**how, **copy.deepcopy(options)), ids) == new_tokens(expected, ids)
    assert new_tokens(fused.generate(ids, **copy.deepcopy(options)), ids) == new_tokens(expected, ids)


def test_padding_that_the_tokenizer_names_is_masked(fuse: Any, adapted: Any, tiny_tokenizer: Any) -> None:
    """transformers cannot know the tokenizer's padding; this model has it."""
    fused = fuse(Second())
    fused.generation_config.pad_token_id = None
    ids = torch.tensor([[0, 0, *tiny_tokenizer("the cat")["input_ids"]], tiny_tokenizer("the cat sees two")["input_ids"]])
    expected = adapted.generate(input_ids=ids, pad_token_id=0, max_new_tokens=8, do_sample=False)
    assert fused.generate(input_ids=ids, max_new_tokens=8, do_sample=False).tolist() == expected.tolist()


# ---------------------------------------------------------------------- no cache


def turned_off(fused: FusedCausalLM, how: str) -> dict[str, Any]:
    """Three places where a cache may be turned off; the arguments of the call."""
    if how == "argument":
        return {"use_cache": False}
    if how == "generation_config":
        return {"generation_config": GenerationConfig(use_cache=False, max_new_tokens=24, do_sample=False)}
    fused.model.config.use_cache = False
    fused.model.generation_config.use_cache = False
    return {}


@pytest.mark.parametrize("how", ["argument", "generation_config", "checkpoint"])
@pytest.mark.parametrize("policy", ["stale", "recompute", "prompt_frozen"])
def test_without_a_cache_a_policy_is_kept_or_refused(policy: str, how: str, fuse: Any) -> None:
    fused = fuse(by_length(policy))
    trace: list[dict[str, Any]] = []
    fused.generation_config.eos_token_id = None
    options = {"max_new_tokens": 24, "do_sample": False}
    expected = fused.generate(list(TEXTS), trace=trace, **options).tolist()
    assert len(trace) > len(TEXTS) + 3
    given = {**options, **turned_off(fused, how)}
    if "generation_config" in given:
        del given["max_new_tokens"], given["do_sample"]
    if how != "checkpoint" and policy != "recompute":
        with pytest.raises(GenerationError, match=rf"use_cache=False.*kv_policy '{policy}'.*kv_policy=recompute"):
            fused.generate(list(TEXTS), **given)
    else:
        assert fused.generate(list(TEXTS), **given).tolist() == expected


def test_pieces_of_a_prompt_need_the_cache(fuse: Any) -> None:
    fused = fuse(by_length("recompute", "sentence"))
    with pytest.raises(GenerationError, match="prompt_routing=whole"):
        fused.generate(TEXT, max_new_tokens=4, use_cache=False)
    with pytest.raises(GenerationError, match="prefill_chunk_size"):
        fused.generate(TEXT, max_new_tokens=4, prefill_chunk_size=2)


@pytest.mark.parametrize("method", [Second, AvgDelta, MeteoRA])
def test_a_method_that_routes_once_does_without_a_cache(method: Any, fuse: Any) -> None:
    fused = fuse(method())
    with_cache, without = (fused.generate(list(TEXTS), max_new_tokens=12, use_cache=use, **GREEDY).tolist() for use in (True, False))
    assert with_cache == without


# ---------------------------------------------------------------------- the first argument


def test_a_tensor_is_token_ids(fuse: Any, adapted: Any, tiny_tokenizer: Any) -> None:
    fused = fuse(Second())
    encoded = tiny_tokenizer(TEXT, return_tensors="pt")
    expected = adapted.generate(encoded["input_ids"], max_new_tokens=8, **GREEDY).tolist()
    for found in (
        fused.generate(encoded["input_ids"], max_new_tokens=8, **GREEDY),
        fused.generate(encoded["input_ids"].int(), attention_mask=encoded["attention_mask"], max_new_tokens=8, **GREEDY),
        fused.generate(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=8, **GREEDY),
        fused.generate(TEXT, max_new_tokens=8, **GREEDY),
        fused.generate((TEXT,), max_new_tokens=8, **GREEDY),
        fused.generate((text for text in [TEXT]), max_new_tokens=8, **GREEDY),
    ):
        assert found.tolist() == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one prompt"),
        ((), "at least one prompt"),
        ({"input_ids": torch.tensor([[1, 5]])}, r"dict is a mapping.*generate\(\*\*inputs\)"),
        ("encoding", r"BatchEncoding is a mapping.*generate\(\*\*inputs\)"),
        ([1, 5, 6], "list of int; pass token ids as a tensor"),
        ([[1, 5, 6]], "list of list; pass token ids as a tensor"),
        (np.array([[1, 5, 6]]), "list of ndarray; pass token ids as a tensor"),
        ([torch.tensor([1, 5])], "list of Tensor; pass token ids as a tensor"),
        ([{"role": "user", "content": "hi"}], "list of dict; render messages with tokenizer.apply_chat_template"),
        (["the cat", None], "list of NoneType"),
        (b"the cat", "got bytes"),
        (7, "got int"),
        (torch.tensor([1, 5, 6]), r"integer tensor \(B, T\), got torch.int64 of shape \(3,\)"),
        (torch.tensor([[0.5]]), "integer tensor"),
        (torch.ones(0, 4, dtype=torch.long), "at least one prompt, got none"),
        (torch.ones(1, 0, dtype=torch.long), "prompt 0 is empty"),
    ],
)
def test_other_first_arguments_are_refused_in_one_line(given: Any, message: str, fuse: Any, tiny_tokenizer: Any) -> None:
    given = tiny_tokenizer(TEXT, return_tensors="pt") if isinstance(given, str) else given
    with pytest.raises(GenerationError, match=message) as caught:
        fuse(Second()).generate(given, max_new_tokens=2)
    assert "\n" not in str(caught.value)


def test_arguments_that_do_not_fit_together_are_refused(fuse: Any) -> None:
    refused = functools.partial(fuse(Second()).generate, max_new_tokens=2)
    ids = torch.tensor([[1, 5, 6]])
    with pytest.raises(GenerationError, match="attention_mask must be a tensor of the shape"):
        refused(input_ids=ids, attention_mask=torch.ones(1, 2))
    with pytest.raises(GenerationError, match="attention_mask must be a tensor of the shape"):
        refused(input_ids=ids, attention_mask=[[1, 1, 1]])
    with pytest.raises(GenerationError, match="attention_mask belongs to input_ids"):
        refused("the cat", attention_mask=torch.ones(1, 2))
    with pytest.raises(GenerationError, match="integer tensor"):
        refused(input_ids=[[1, 5, 6]])
    with pytest.raises(GenerationError, match="not several"):
        refused(ids, input_ids=ids)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number, got '5'"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens must be a whole number, got nan"),
        ({"max_new_tokens": None, "max_length": "9"}, "max_length must be a whole number"),
        ({"num_beams": 0}, "must be at least 1, got 0 and 1"),
        ({"num_return_sequences": -1}, "must be at least 1, got None and -1"),
        ({"pad_token_id": [0]}, "pad_token_id must be a whole number"),
    ],
)
def test_numbers_that_are_none(option: dict[str, Any], message: str, fuse: Any) -> None:
    for method in (Second(), by_length()):
        with pytest.raises(GenerationError, match=message):
            fuse(method).generate(TEXT, **{"max_new_tokens": 2, **option})
    with pytest.raises(RoutingError, match=r"must be a tensor .* got list"):
        fuse(Second()).generate(TEXT, routing=[0.0, 1.0])  # type: ignore[arg-type]
    assert fuse(Second()).generate(TEXT, max_new_tokens=2.0, **GREEDY).shape[0] == 1


def test_inputs_by_place_keep_their_places_or_are_refused(fuse: Any, adapted: Any, tiny_tokenizer: Any) -> None:
    """What is padded anew here would meet the positions, embeddings or cached tokens of other columns."""
    fused = fuse(Second())
    rows = [tiny_tokenizer(text)["input_ids"] for text in TEXTS]
    width = max(map(len, rows))
    left = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    right = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    assert not torch.equal(left, right)
    positions = 3 * (left.ne(0).cumsum(dim=1) - 1).clamp_min(0)
    options = {"max_new_tokens": 6, "pad_token_id": 0, **GREEDY}
    expected = adapted.generate(input_ids=left, attention_mask=left.ne(0).long(), position_ids=positions, **options)
    assert fused.generate(input_ids=left, position_ids=positions, **options).tolist() == expected.tolist()
    for given in ({"input_ids": right}, {"inputs": right}, {"texts": list(TEXTS)}):
        with pytest.raises(GenerationError, match="position_ids belongs to tokens in their places"):
            fused.generate(**given, position_ids=positions, **options)
    wide = torch.cat([left * 0, left], dim=1)
    for few in (positions, positions[0], positions.tolist(), positions[:1]):
        with pytest.raises(GenerationError, match="position_ids must be a tensor with a place for each column"):
            fused.generate(input_ids=wide, position_ids=few, **options)
    placed = {"input_ids": wide, "position_ids": torch.cat([positions * 0, positions], dim=1)}
    assert fused.generate(**placed, **options).tolist() == adapted.generate(**placed, **options).tolist()
    empty, used = DynamicCache(config=fused.config), DynamicCache(config=fused.config)
    assert fused.generate(list(TEXTS), past_key_values=empty, **options).tolist() == fused.generate(list(TEXTS), **options).tolist()
    with torch.no_grad(), fused.routing(torch.tensor([0.0, 1.0, 0.0])):
        fused(input_ids=left[:, :3], past_key_values=used, use_cache=True)
    with pytest.raises(GenerationError, match="past_key_values belongs to"):
        fused.generate(list(TEXTS), past_key_values=used, **options)


@pytest.mark.parametrize("policy", ["stale", "recompute", "prompt_frozen"])
def test_guidance_has_a_cache_of_its_own(policy: str, fuse: Any) -> None:
    fused = fuse(by_length(policy))
    if policy == "stale":
        assert fused.generate(TEXT, max_new_tokens=4, guidance_scale=1.5, **GREEDY).shape[0] == 1
        return
    with pytest.raises(GenerationError, match="guidance_scale keeps a second cache"):
        fused.generate(TEXT, max_new_tokens=4, guidance_scale=1.5, **GREEDY)
    assert fused.generate(TEXT, max_new_tokens=4, guidance_scale=1.0, **GREEDY).shape[0] == 1


def test_guidance_of_a_method_that_routes_once_is_pefts(fuse: Any, adapted: Any, tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer(TEXT, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 6, "guidance_scale": 3.0, "pad_token_id": 0, **GREEDY}
    expected = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert fuse(Second()).generate(input_ids=ids, **options).tolist() == expected.tolist()


# ---------------------------------------------------------------------- the command


def typed(prompt: str, *, raw: bool, pretrained: str | None = None) -> str:
    return prompt_text(Namespace(prompt=prompt, raw=raw, pretrained=pretrained, chat=False))


def test_raw_prompts_are_taken_as_typed() -> None:
    prompt = r"If x \neq 3, is \nabla f zero? C:\new"
    assert typed(prompt, raw=True) == prompt
    assert typed("a\\nb", raw=False) == "a\nb\nAnswer:"
    assert typed("a\\nb", raw=False, pretrained="some/model") == "a\nb"
