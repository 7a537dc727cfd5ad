"""Padded token ids keep their columns in ``generate``, and what counts columns counts those of transformers. The truth is PEFT's model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GPT2Config, GPT2LMHeadModel, LogitsProcessor, StoppingCriteria

from dlplora.errors import GenerationError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import FusionMethod, Metadata
from dlplora.modules.lora_bank import AdapterBank
from tests.equivalence.by_length import ByLength, by_length
from tests.equivalence.test_generate_options import Second

TEXTS = ("the cat sees", "Mia likes the plum. Who likes it? Answer:")
WIDTH = 40
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Fixed(ByLength):
    """The second adapter alone, asked for again at every sentence end."""

    name = "fixed"
    metadata = Metadata(title="Fixed", granularity="sentence")

    def route(self, prompts: Any) -> Tensor:
        return torch.tensor([[0.0, 1.0, 0.0]]).expand(len(prompts), 3)


def fixed(policy: str, pieces: str) -> ByLength:
    return by_length(policy, pieces, Fixed)


METHODS: dict[str, Callable[[], FusionMethod]] = {
    "once": Second,
    "stale": lambda: fixed("stale", "whole"),
    "recompute": lambda: fixed("recompute", "whole"),
    "prompt_frozen": lambda: fixed("prompt_frozen", "whole"),
    "in pieces": lambda: fixed("stale", "sentence"),
}


@pytest.fixture
def adapted(talkative: Any, tiny_pool: Path) -> Any:
    """PEFT with the adapter that the methods pick."""
    return PeftModel.from_pretrained(copy.deepcopy(talkative), str(tiny_pool / "beta"), autocast_adapter_dtype=False).eval()


def padded(tokenizer: Any, kind: str = "wide") -> dict[str, Tensor]:
    """Ids and mask: ``wide`` is padded on the left to more than the longest row, ``hole`` also masks tokens between others."""
    given = tokenizer(list(TEXTS), return_tensors="pt", padding="max_length", max_length=WIDTH, padding_side="left")
    ids, mask = given["input_ids"], given["attention_mask"].clone()
    if kind == "hole":
        mask[1, -4:-2] = 0
    return {"input_ids": ids, "attention_mask": mask}


class StopsAt(StoppingCriteria):
    """Stops at a column, and notes what it is called with."""

    def __init__(self, column: int) -> None:
        self.column = column
        self.seen: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(input_ids.tolist())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.column)


class Looks(LogitsProcessor):
    """Notes what it is called with."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids.tolist())
        return scores


OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 12},
    {"max_length": WIDTH + 6},
    {"max_new_tokens": 12, "min_length": WIDTH + 5, "eos_token_id": [5, 6, 7, 8, 9, 10]},
    {"max_new_tokens": 12, "repetition_penalty": 1.7},
    {"max_new_tokens": 12, "no_repeat_ngram_size": 2},
    {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 3, "temperature": 1.3},
    {"max_new_tokens": 12, "cache_implementation": "static"},
    {"generation_config": GenerationConfig(max_length=WIDTH + 3, pad_token_id=0)},
    {},
]
BEAMS: list[dict[str, Any]] = [
    {"max_new_tokens": 12, "num_beams": 3},
    {"max_new_tokens": 12, "num_beams": 2, "num_return_sequences": 2},
    {"max_new_tokens": 8, "use_cache": False},
]


def same(fused: Any, adapted: Any, given: dict[str, Tensor], options: dict[str, Any]) -> None:
    options = options if "generation_config" in options else {**GREEDY, **options}
    found = []
    for model in (adapted, fused):
        torch.manual_seed(3)
        found.append(model.generate(**given, **copy.deepcopy(options)))
    assert found[1].tolist() == found[0].tolist()
    assert found[0].shape[1] > WIDTH


@pytest.mark.parametrize("kind", ["wide", "hole"])
@pytest.mark.parametrize("method", METHODS)
def test_padded_ids_are_continued_as_by_peft(method: str, kind: str, fuse: Any, adapted: Any, tiny_tokenizer: Any) -> None:
    given, fused = padded(tiny_tokenizer, kind), fuse(METHODS[method]())
    for options in [*OPTIONS, *(BEAMS if method == "once" else ())]:
        if "cache_implementation" not in options or method not in ("recompute", "prompt_frozen"):  # these have a cache of their own
            same(fused, adapted, given, options)


def test_a_missing_mask_keeps_the_columns_too(fuse: Any, adapted: Any, tiny_tokenizer: Any) -> None:
    given = padded(tiny_tokenizer)
    given["input_ids"][1, -6] = 0  # padding between tokens is masked by transformers
    same(fuse(Second()), adapted, {"input_ids": given["input_ids"]}, {"max_new_tokens": 12})
    same(fuse(Second()), adapted, {"inputs": given["input_ids"]}, {"max_new_tokens": 12})


def test_criteria_processors_and_scores_see_all_columns(fuse: Any, adapted: Any, tiny_tokenizer: Any) -> None:
    given, found = padded(tiny_tokenizer), []
    for model in (adapted, fuse(Second()), fuse(fixed("stale", "whole"))):
        stop, look = StopsAt(WIDTH + 5), Looks()
        told = {"return_dict_in_generate": True, "output_scores": True, "stopping_criteria": [stop], "logits_processor": [look]}
        out = model.generate(**given, max_new_tokens=12, **told, **GREEDY)
        found.append((out.sequences.tolist(), len(out.scores), [score.shape for score in out.scores], stop.seen, look.seen))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0][0]) == WIDTH + 5


def test_streamers_receive_the_padded_prompt(fuse: Any, adapted: Any, tiny_tokenizer: Any) -> None:
    class Collect:
        def __init__(self) -> None:
            self.values: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.values.append(value.flatten().tolist())

        def end(self) -> None:
            self.values.append([])

    given, found = {name: tensor[:1] for name, tensor in padded(tiny_tokenizer).items()}, []
    for model in (adapted, fuse(Second()), fuse(fixed("stale", "whole"))):
        streamer = Collect()
        model.generate(**given, max_new_tokens=6, streamer=streamer, **GREEDY)
        found.append(streamer.values)
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) == WIDTH


def test_positions_of_padded_ids_are_taken(fuse: Any, adapted: Any, tiny_tokenizer: Any) -> None:
    for kind in ("wide", "hole"):
        given = padded(tiny_tokenizer, kind)
        given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        same(fuse(Second()), adapted, given, {"max_new_tokens": 8})
        given["position_ids"] = given["position_ids"] * 2  # wrong positions are the caller's wish
        same(fuse(Second()), adapted, given, {"max_new_tokens": 8})


def test_a_cache_is_continued(fuse: Any, adapted: Any, tiny_tokenizer: Any) -> None:
    found = []
    for model in (adapted, fuse(Second()), fuse(fixed("stale", "whole"))):
        given, cache = padded(tiny_tokenizer), DynamicCache()
        first = model.generate(**given, max_new_tokens=5, past_key_values=cache, **GREEDY)
        ids = torch.cat([first, torch.full((2, 1), 9)], dim=1)
        mask = torch.cat([given["attention_mask"], torch.ones(2, 6, dtype=torch.long)], dim=1)
        found.append(model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, **GREEDY).tolist())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("limit", [WIDTH, WIDTH - 4])
def test_a_length_within_the_padding_is_refused_as_by_transformers(limit: int, fuse: Any, adapted: Any, tiny_tokenizer: Any) -> None:
    given = padded(tiny_tokenizer)
    with pytest.raises(ValueError, match="max_length"):
        adapted.generate(**given, max_length=limit, **GREEDY)
    with pytest.raises(GenerationError, match=rf"max_length is {limit}, but the prompts take {WIDTH} columns.*padding included") as caught:
        fuse(Second()).generate(**given, max_length=limit, **GREEDY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["stale", "recompute", "prompt_frozen"])
@pytest.mark.parametrize("pieces", ["whole", "question", "sentence"])
def test_width_and_holes_change_no_reroute(method: str, pieces: str, fuse: Any, tiny_tokenizer: Any) -> None:
    """Routing that changes with the text: the rows alone, without any padding, are the truth."""
    fused = fuse(by_length(method, pieces))
    for kind in ("wide", "hole"):
        given = padded(tiny_tokenizer, kind)
        trace: list[dict[str, Any]] = []
        found = fused.generate(**given, max_new_tokens=24, trace=trace, **GREEDY)
        assert found[:, :WIDTH].tolist() == given["input_ids"].tolist()
        for row in range(2):
            alone: list[dict[str, Any]] = []
            ids = given["input_ids"][row][given["attention_mask"][row].bool()][None]
            expected = fused.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, trace=alone, **GREEDY)
            assert found[row, WIDTH:].tolist() == expected[0, ids.shape[1] :].tolist()
            assert [{**entry, "row": 0} for entry in trace if entry["row"] == row] == alone
            assert len(alone) >= 2


def test_padding_on_the_right_is_moved_and_its_width_kept(fuse: Any, adapted: Any, tiny_tokenizer: Any) -> None:
    """transformers continues such rows after their padding; here they are continued after their last token, as padded on the left."""
    left = padded(tiny_tokenizer)
    right = tiny_tokenizer(list(TEXTS), return_tensors="pt", padding="max_length", max_length=WIDTH, padding_side="right")
    expected = adapted.generate(**left, max_new_tokens=9, **GREEDY)
    for method in (Second(), fixed("recompute", "whole"), fixed("stale", "sentence")):
        given = {name: right[name] for name in ("input_ids", "attention_mask")}
        assert fuse(method).generate(**given, max_new_tokens=9, **GREEDY).tolist() == expected.tolist()
        assert fuse(method).generate(right["input_ids"], max_new_tokens=9, **GREEDY).tolist() == expected.tolist()
    same_ids, mask = torch.full((1, 4), 5), torch.tensor([[1, 1, 1, 0]])
    with pytest.raises(GenerationError, match="position_ids belongs to"):
        fuse(Second()).generate(input_ids=same_ids, attention_mask=mask, position_ids=torch.arange(4)[None], max_new_tokens=2)


def test_padding_takes_no_room_in_the_context(fuse: Any, adapted: Any, tiny_tokenizer: Any) -> None:
    """More columns than the context has tokens: only tokens are cut, and padding stays where nothing is cut."""
    fused = fuse(Second())
    width = fused.max_length + 30
    given = tiny_tokenizer(list(TEXTS), return_tensors="pt", padding="max_length", max_length=width, padding_side="left")
    given = {name: given[name] for name in ("input_ids", "attention_mask")}
    same(fused, adapted, given, {"max_new_tokens": 8})
    assert fused.num_truncated_prompts == 0
    long = torch.randint(5, 40, (1, width), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([given["input_ids"], long])
    mask = torch.cat([given["attention_mask"], torch.ones_like(long)])
    found = fused.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    room = fused.max_length - 8
    assert found.shape == (3, fused.max_length)
    assert fused.num_truncated_prompts == 1
    cut = {"input_ids": ids[:, -room:], "attention_mask": mask[:, -room:]}
    assert found.tolist() == adapted.generate(**cut, max_new_tokens=8, **GREEDY).tolist()
    # a limit in columns leaves as many new tokens after the cut as it would without one
    limited = fused.generate(input_ids=ids, attention_mask=mask, max_length=width + 8, **GREEDY)
    assert limited.tolist() == found.tolist()


@pytest.mark.parametrize("value", [2, -1, 0.5])
def test_a_mask_of_other_numbers_is_refused(value: float, fuse: Any, adapted: Any, tiny_tokenizer: Any) -> None:
    given = padded(tiny_tokenizer)
    mask = given["attention_mask"]
    for dtype in (torch.bool, torch.float32, torch.uint8):
        same(fuse(Second()), adapted, {**given, "attention_mask": mask.to(dtype)}, {"max_new_tokens": 4})
    with pytest.raises(GenerationError, match="1 for tokens and 0 for padding"):
        fuse(Second()).generate(input_ids=given["input_ids"], attention_mask=mask * value, max_new_tokens=4)


def test_what_the_mask_hides_may_be_no_token(fuse: Any, tiny_tokenizer: Any) -> None:
    given = padded(tiny_tokenizer)
    hidden = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    expected = fuse(Second()).generate(**given, max_new_tokens=6, **GREEDY)
    found = fuse(Second()).generate(input_ids=hidden, attention_mask=given["attention_mask"], max_new_tokens=6, **GREEDY)
    assert found.tolist() == expected.tolist()


def test_learned_positions_are_those_of_the_tokens(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """GPT-2 has an embedding for each position, and Conv1D layers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "one")
    adapted.eval()
    assert isinstance(base.transformer.wte, nn.Embedding)

    class Only(Second):
        def route(self, prompts: Any) -> Tensor:
            return torch.ones(len(prompts), 1)

    fused = FusedCausalLM(base, tiny_tokenizer, AdapterBank.from_peft({"one": tmp_path / "one"}), Only())
    for kind in ("wide", "hole"):
        for options in ({"max_new_tokens": 9}, {"max_length": WIDTH + 4}, {"max_new_tokens": 9, "num_beams": 2}):
            same(fused, adapted, padded(tiny_tokenizer, kind), options)
