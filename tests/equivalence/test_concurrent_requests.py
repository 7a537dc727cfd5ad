"""Requests that run at the same time, or take turns, get what they get alone, to the last bit of the logits."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.errors import GenerationError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.modules.lora_bank import AdapterBank
from tests.equivalence.by_length import ByLength
from tests.equivalence.taking_turns import BATCHES, METHODS, Nested, ask, by_name, same, take_turns


@pytest.fixture
def fuse(fuse: Any) -> Callable[[str], FusedCausalLM]:
    """By the names of ``METHODS``."""
    return functools.partial(by_name, fuse)


@pytest.mark.parametrize("name", list(METHODS))
def test_requests_that_take_turns_answer_as_alone(name: str, fuse: Any) -> None:
    """20 drawn interleavings a method, 200 together."""
    fused, dice = fuse(name), random.Random(name)
    alone = {texts: ask(fused, texts) for texts in BATCHES}
    assert len({str(found[0]) for found in alone.values()}) == len(BATCHES)
    for _ in range(20):
        chosen = [dice.choice(BATCHES) for _ in range(dice.choice((2, 3)))]
        for texts, found in zip(chosen, take_turns(fused, chosen, dice), strict=True):
            assert same(found, alone[texts]), texts
    assert fused.slot.buffers.num_leased == 0
    assert fused.slot.buffers.num_made <= 6  # three requests, and under `recompute` each of them once more
    assert fused.slot.state is None


@pytest.mark.parametrize("name", ["sentence", "xlora"])
def test_an_error_in_one_request_leaves_the_others_intact(name: str, fuse: Any) -> None:
    fused, dice = fuse(name), random.Random(1)
    alone = {texts: ask(fused, texts) for texts in BATCHES}
    for failing in (0, 1, 2):
        found = take_turns(fused, BATCHES[:3], dice, failing)
        assert isinstance(found[failing], KeyError)
        assert all(
            same(answer, alone[texts]) for place, (answer, texts) in enumerate(zip(found, BATCHES, strict=False)) if place != failing
        )
        del found
    gc.collect()
    assert fused.slot.buffers.num_leased == 0


@pytest.fixture
def _hectic() -> Iterator[None]:
    """Threads that are switched in the middle of forward passes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_hectic")
@pytest.mark.parametrize("name", ["sentence", "prompt", "static", "xlora", "lora_flow", "mole"])
def test_threads_answer_as_alone(name: str, fuse: Any) -> None:
    """Without batons: as the scheduler has it."""
    fused = fuse(name)
    alone = {texts: ask(fused, texts) for texts in BATCHES}
    wrong: list[Any] = []

    def work(texts: tuple[str, ...]) -> None:
        for _ in range(4):
            found = ask(fused, texts)
            if not same(found, alone[texts]):
                wrong.append(texts)

    threads = [threading.Thread(target=work, args=(texts,)) for texts in BATCHES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert fused.slot.buffers.num_leased == 0


def test_the_embedded_model_answers_two_users_at_once() -> None:
    for method in ("dlp", "dlp_code"):
        fused = FusedCausalLM.from_pretrained(method=method)
        asked = {
            "gate": "Tom is at the gate with a brown glove. Does Tom pass?\nAnswer:",
            "zargi": "Please write in Zargi: the cat sees the hat.\nAnswer:",
        }
        alone = {name: fused.generate(text, max_new_tokens=12, do_sample=False).tolist() for name, text in asked.items()}
        got: dict[str, list[Any]] = {name: [] for name in asked}

        def work(name: str, fused: Any = fused, asked: Any = asked, got: Any = got) -> None:
            for _ in range(3):
                got[name].append(fused.generate(asked[name], max_new_tokens=12, do_sample=False).tolist())

        threads = [threading.Thread(target=work, args=(name,)) for name in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(found == alone[name] for name, answers in got.items() for found in answers)
        assert all(len(answers) == 3 for answers in got.values())


@pytest.mark.parametrize("name", ["sentence", "sentence_recompute", "static", "xlora", "lora_flow"])
def test_a_request_inside_another_one(name: str, fuse: Any) -> None:
    fused = fuse(name)
    inner, outer = ask(fused, BATCHES[3]), ask(fused, BATCHES[2])
    nested = Nested(fused, inner)
    assert same(ask(fused, BATCHES[2], stopping_criteria=[nested]), outer)
    assert nested.num_right == 9


def test_compiled_requests_take_turns(talkative: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    torch._dynamo.reset()
    fused = FusedCausalLM(talkative, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), ByLength(), backend="folded")
    fused.compile(backend=lambda graph, inputs, **options: graph.forward)
    for texts in BATCHES[:2]:
        ask(fused, texts)  # the static cache grows to the longest request
    alone = {texts: ask(fused, texts) for texts in BATCHES[:2]}
    nested = Nested(fused, None)
    with pytest.raises(GenerationError, match="from inside another one"):
        ask(fused, BATCHES[0], stopping_criteria=[nested])
    got: dict[Any, list[Any]] = {texts: [] for texts in alone}

    def work(texts: tuple[str, ...]) -> None:
        got[texts].extend(ask(fused, texts) for _ in range(3))

    threads = [threading.Thread(target=work, args=(texts,)) for texts in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(answers) == 3 and all(same(found, alone[texts]) for found in answers) for texts, answers in got.items())
    assert fused.slot.buffers.num_made == 1
    torch._dynamo.reset()


def test_a_copy_has_requests_of_its_own(fuse: Any) -> None:
    for name in ("sentence", "xlora"):
        fused = fuse(name)
        expected = ask(fused, BATCHES[0])
        again = copy.deepcopy(fused)
        assert same(ask(again, BATCHES[0]), expected)
        assert again.slot is not fused.slot
        assert all(layer.slot is again.slot for layer in again.patched.layers.values())
    state = fused.request_router.state(torch.tensor([0.9, 0.1, 0.0]))
    with fused.routing(state):
        other = copy.copy(state)
        assert not other.buffers


def test_buffers_of_many_requests_do_not_add_up(fuse: Any) -> None:
    """200 requests of changing sizes: one set of buffers in memory, none of them in use."""
    fused = fuse("prompt")
    for number in range(200):
        ask(fused, BATCHES[number % 4], steps=1)
    assert (fused.slot.buffers.num_leased, fused.slot.buffers.num_made) == (0, 1)


def test_requests_that_keep_fewer_experts_read_the_same_buffers_and_get_the_same_bits(
    talkative: Any, tiny_tokenizer: Any, tiny_pool: Path
) -> None:
    """On a CPU the buffers of two experts also serve one; what an earlier request left behind it is not read."""
    one, two = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.0, 0.5]])
    ids = torch.tensor([[5, 6, 7]])

    def folded() -> FusedCausalLM:
        return FusedCausalLM(copy.deepcopy(talkative), tiny_tokenizer, AdapterBank.from_pool(tiny_pool), ByLength(), backend="folded")

    def logits(fused: FusedCausalLM, weights: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return fused(input_ids=ids, routing=fused.request_router.state(weights, reroutes=True)).logits

    expected = {weights: logits(folded(), weights) for weights in (one, two)}
    assert not torch.equal(expected[one], expected[two])
    fused = folded()
    logits(fused, two)
    for _ in range(3):
        assert all(torch.equal(logits(fused, weights), expected[weights]) for weights in (one, two))
    assert (fused.slot.buffers.num_leased, fused.slot.buffers.num_made) == (0, 1)


def test_what_transformers_sets_while_decoding_is_restored_by_the_last_request(fuse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = fuse("static")
    events: list[str] = []

    @contextlib.contextmanager
    def switched(model: Any) -> Iterator[None]:
        events.append("set")
        yield
        events.append("restored")

    monkeypatch.setattr(type(fused.model), "_optimize_model_for_decode", switched)
    for seed in range(4):
        take_turns(fused, BATCHES[:3], random.Random(seed))
        assert events == ["set", "restored"] * (len(events) // 2)
    assert len(events) < 4 * 3 * 2  # requests did overlap
