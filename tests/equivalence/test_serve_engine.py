"""The engine's answers, with requests that join and leave, against loops without a cache, PEFT and the unpatched model."""

from __future__ import annotations

import copy
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.errors import ConfigError, GenerationError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.serve.engine import Engine, EngineOptions
from dlplora.serve.jobs import Failed, Piece, QueueFullError, Sentence, Started, Target
from dlplora.serve.sampling import Sampler, SamplingOptions
from tests.equivalence.serve_client import Client
from tests.equivalence.test_kv_policy import STEPS, TEXTS, fused_with, slow


@pytest.mark.parametrize("policy", ["stale", "recompute"])
@pytest.mark.parametrize("max_batch", [1, 3])
def test_answers_equal_slow_loops(policy: str, max_batch: int, double: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """Every request twice, in an order of its own, so that rows join, leave and move while others decode."""
    expected = {text: slow(double, tiny_pool, tiny_tokenizer, text, policy) for text in TEXTS}
    fused = fused_with(copy.deepcopy(double), tiny_tokenizer, tiny_pool, policy)
    engine = Engine(fused, EngineOptions(max_batch=max_batch, prefill_chunk=3))
    client = Client(engine)
    order = [(text, turn, limit) for text in TEXTS for turn, limit in enumerate((STEPS, 7))]
    random.Random(3).shuffle(order)
    for text, turn, limit in order:
        engine.submit(client.job((text, turn), text, max_tokens=limit))
    client.wait(len(order))
    engine.close()
    for text, turn, limit in order:
        new, _, turns = expected[text]
        assert client.tokens((text, turn)) == new[:limit]
        assert client.text((text, turn)) == tiny_tokenizer.decode(new[:limit], skip_special_tokens=True)
        if limit == STEPS:
            sentences = sum(isinstance(event, Sentence) for event in client.events[text, turn])
            assert turns - sentences in {0, 1}, "only a sentence that ends with the answer is not routed again"


TARGETS = {"base": Target(kind="base"), "beta": Target(kind="pinned", weights={"beta": 1.0}), "auto": Target()}


def test_base_and_pinned_rows_beside_routed_ones(truths: Any, double: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    engine = Engine(fused_with(copy.deepcopy(double), tiny_tokenizer, tiny_pool, "stale"), EngineOptions(max_batch=12))
    client = Client(engine)
    for text in TEXTS:
        for name, target in TARGETS.items():
            engine.submit(client.job((text, name), text, target))
    client.wait(len(TEXTS) * len(TARGETS))
    engine.close()
    for text in TEXTS:
        for name in TARGETS:
            assert client.tokens((text, name)) == truths[name][text]
        first = client.events[text, "beta"][0]
        assert isinstance(first, Started)
        assert (first.decision.adapter, first.decision.kind, dict(first.decision.weights)) == ("beta", "pinned", {"beta": 1.0})


@pytest.mark.parametrize("budget", [7, 60, 1000])
def test_prompts_of_unequal_length_are_processed_together(
    budget: int, truths: Any, double: Any, tiny_tokenizer: Any, tiny_pool: Path, monkeypatch: Any
) -> None:
    """One is pinned, one gets the base model, two are routed; they wait together and are routed in one call of the router."""
    fused = fused_with(copy.deepcopy(double), tiny_tokenizer, tiny_pool, "stale")
    engine = Engine(fused, EngineOptions(max_batch=4, prefill_chunk=budget))
    client = Client(engine)
    shapes: list[tuple[int, ...]] = []
    routed: list[tuple[str, ...]] = []
    forward, route = type(fused).forward, fused.method.route

    def seen(self: Any, **given: Any) -> Any:
        shapes.append(tuple(given["input_ids"].shape))
        return forward(self, **given)

    monkeypatch.setattr(type(fused), "forward", seen)
    monkeypatch.setattr(fused.method, "route", lambda prompts: routed.append(prompts.texts) or route(prompts))  # type: ignore[func-returns-value]
    names = ("base", "beta", "auto", "auto")
    engine.submit(*(client.job(text, text, TARGETS[name]) for text, name in zip(TEXTS, names, strict=True)))
    client.wait(4)
    engine.close()
    for text, name in zip(TEXTS, names, strict=True):
        assert client.tokens(text) == truths[name][text]
    assert routed[0] == TEXTS[2:]
    prompts = [shape for shape in shapes if shape[1] > 1]
    assert any(rows > 1 for rows, _ in prompts)
    assert all(rows * tokens <= budget for rows, tokens in prompts)


def test_a_sampled_answer_does_not_depend_on_its_neighbours(double: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    engine = Engine(fused_with(copy.deepcopy(double), tiny_tokenizer, tiny_pool, "stale"), EngineOptions(max_batch=8))
    client = Client(engine)
    seeded = SamplingOptions(temperature=2.0, top_p=0.99, seed=11, top_logprobs=2)
    engine.submit(client.job("alone", TEXTS[1], sampling=seeded))
    client.wait(1)
    for number in range(5):
        engine.submit(client.job(number, TEXTS[number % len(TEXTS)], sampling=SamplingOptions(temperature=2.0, seed=number)))
    engine.submit(client.job("beside", TEXTS[1], sampling=seeded))
    client.wait(6)
    engine.close()
    assert client.tokens("alone") == client.tokens("beside")
    assert len({tuple(client.tokens(number)) for number in range(5)}) > 1
    for piece in (event for event in client.events["alone"] if isinstance(event, Piece)):
        for chosen in piece.tokens:
            assert chosen.logprob is not None
            assert chosen.logprob <= chosen.alternatives[0][1] <= 0.0


def test_cancelled_jobs_free_their_slots_and_others_go_on(double: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    engine = Engine(fused_with(copy.deepcopy(double), tiny_tokenizer, tiny_pool, "stale"), EngineOptions(max_batch=2, max_queue=4))
    client = Client(engine)
    endless = [client.job(name, TEXTS[0], max_tokens=200) for name in ("a", "b", "waits")]
    engine.submit(*endless)
    engine.submit(client.job("last", TEXTS[2]))
    engine.cancel(endless[0], endless[2])
    client.wait(4)
    assert [client.events[name][-1].reason for name in ("a", "b", "waits", "last")] == ["cancelled", "length", "cancelled", "length"]
    assert len(client.tokens("last")) == STEPS
    assert len(client.tokens("b")) == 200
    engine.close()
    assert engine.num_running == 0


@pytest.mark.parametrize("policy", ["stale", "recompute"])
def test_a_client_that_vanishes_while_it_decodes_harms_nobody(policy: str, double: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """The last row takes over the freed slot, with its keys and values."""
    expected = {text: slow(double, tiny_pool, tiny_tokenizer, text, policy)[0] for text in TEXTS[1:3]}
    engine = Engine(fused_with(copy.deepcopy(double), tiny_tokenizer, tiny_pool, policy), EngineOptions(max_batch=4))
    client = Client(engine)
    gone = client.job("gone", TEXTS[0], Target(kind="base"), max_tokens=200)
    others = [client.job(text, text) for text in expected]
    decodes = threading.Event()
    report = gone.report

    def told(event: Any) -> None:
        report(event)
        if isinstance(event, Piece):
            decodes.set()

    gone.report = told
    engine.submit(gone, *others)
    assert decodes.wait(60)
    engine.cancel(gone)
    client.wait(3)
    engine.close()
    assert client.events["gone"][-1].reason == "cancelled"
    for text, tokens in expected.items():
        assert client.tokens(text) == tokens


def test_too_many_requests_are_refused_together(double: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    engine = Engine(fused_with(copy.deepcopy(double), tiny_tokenizer, tiny_pool, "stale"), EngineOptions(max_batch=1, max_queue=2))
    client = Client(engine)
    blocker = threading.Event()
    engine_busy = threading.Thread(target=engine.call, args=(lambda: blocker.wait(30),))
    engine_busy.start()
    engine.submit(client.job("first", TEXTS[0]), client.job("second", TEXTS[1]))
    with pytest.raises(QueueFullError, match="2 requests are waiting, 2 may"):
        engine.submit(client.job("third", TEXTS[2]))
    blocker.set()
    engine_busy.join()
    client.wait(2)
    engine.close()
    with pytest.raises(GenerationError, match="closed"):
        engine.submit(client.job("late", TEXTS[0]))


def test_temperatures_near_zero_are_greedy() -> None:
    logits = torch.tensor([1.0, 30.0, 29.9])
    for temperature in (0.0, 5e-324, 1e-38, 9e-6):
        assert Sampler(SamplingOptions(temperature=temperature), torch.device("cpu")).is_plain_greedy
    for temperature in (1e-38, 1e-5, 1e-3):
        options = SamplingOptions(temperature=temperature, top_logprobs=1, frequency_penalty=-2.0)
        assert Sampler(options, torch.device("cpu")).choose(logits).token == 1


def test_another_model_is_adopted_between_requests(double: Any, tiny_tokenizer: Any, tiny_pool: Path, make_adapter: Any) -> None:
    """Requests that wait while the pool is loaded again are answered with the new one; a failure leaves the old one."""
    base = copy.deepcopy(double)
    old = fused_with(base, tiny_tokenizer, tiny_pool, "stale")
    engine = Engine(old, EngineOptions(max_batch=2))
    client = Client(engine)

    def swap() -> FusedCausalLM:
        old.close()
        return fused_with(base, tiny_tokenizer, tiny_pool, "recompute")

    def fails() -> FusedCausalLM:
        raise ConfigError("adapter 'x' has rank 0")

    with pytest.raises(ConfigError, match="rank 0"):
        engine.run_idle(fails)
    assert engine.fused is old
    engine.submit(*(client.job(text, text) for text in TEXTS))
    engine.run_idle(swap)
    client.wait(len(TEXTS))
    assert engine.fused is not old
    assert not any(isinstance(event, Failed) for events in client.events.values() for event in events)
    engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_batch": 0}, "max_batch"), ({"max_queue": 0}, "max_queue"), ({"min_confidence": 1.5}, "min_confidence")],
)
def test_bounds_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineOptions(**options)


def test_models_that_do_not_fit_are_refused_by_name(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    from dlplora.serve.slots import SlotCache

    config = MistralConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=8,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="sliding window of 8"):
        SlotCache(MistralForCausalLM(config).config, 2, 64)


def test_token_level_methods_are_refused() -> None:
    model = FusedCausalLM.from_pretrained(method="arrow_out")
    with pytest.raises(ConfigError, match="routes single tokens"):
        Engine(model)
    model.close()
    model = FusedCausalLM.from_pretrained(method="oracle")
    with pytest.raises(ConfigError, match="needs the task"):
        Engine(model)
