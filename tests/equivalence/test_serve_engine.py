"""The engine's answers, with requests that join and leave, against loops without a cache, PEFT and the unpatched model."""

from __future__ import annotations

import copy
import queue
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from dlplora.errors import ConfigError, GenerationError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.modules.lora_bank import AdapterBank
from dlplora.serve.deciding import Decider
from dlplora.serve.engine import Engine, EngineOptions
from dlplora.serve.jobs import Failed, Finished, Job, Piece, QueueFullError, Sentence, Started, Target
from dlplora.serve.rows import Row
from dlplora.serve.sampling import Sampler, SamplingOptions
from tests.equivalence.test_kv_policy import STEPS, TEXTS, ByLength, fused_with, slow

GREEDY = SamplingOptions(temperature=0.0)


class Client:
    """Submits jobs and collects their events."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: dict[Any, list[Any]] = {}
        self._queue: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def job(self, key: Any, text: str, target: Target | None = None, **options: Any) -> Job:
        tokenizer = self.engine.fused.tokenizer
        self.events[key] = []
        settings: dict[str, Any] = {"sampling": GREEDY, "max_tokens": STEPS, "ignore_eos": True, **options}
        return Job(
            prompt_ids=tuple(tokenizer(text)["input_ids"]), routed_text=text, target=target or Target(),
            report=lambda event: self._queue.put((key, event)), **settings,
        )  # fmt: skip

    def wait(self, num: int) -> None:
        """Until so many jobs have ended."""
        while num:
            key, event = self._queue.get(timeout=120)
            self.events[key].append(event)
            num -= isinstance(event, (Finished, Failed))

    def tokens(self, key: Any) -> list[int]:
        return [chosen.token for event in self.events[key] if isinstance(event, Piece) for chosen in event.tokens]

    def text(self, key: Any) -> str:
        return "".join(event.text for event in self.events[key] if isinstance(event, Piece))


@pytest.fixture
def double(talkative: Any) -> Any:
    return talkative.double()


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


@pytest.fixture
def truths(double: Any, tiny_tokenizer: Any, tiny_pool: Path) -> dict[str, dict[str, list[int]]]:
    """What the unpatched model, PEFT with ``beta`` and the slow loop say to each text."""
    prompts = {text: tiny_tokenizer(text, return_tensors="pt") for text in TEXTS}
    fixed = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    adapted = PeftModel.from_pretrained(copy.deepcopy(double), str(tiny_pool / "beta"), autocast_adapter_dtype=False).double()
    found = {
        name: {text: model.generate(**ids, **fixed)[0, ids["input_ids"].shape[1] :].tolist() for text, ids in prompts.items()}
        for name, model in (("base", double), ("beta", adapted))
    }
    assert found["base"] != found["beta"]
    return {**found, "auto": {text: slow(double, tiny_pool, tiny_tokenizer, text, "stale")[0] for text in TEXTS}}


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


def test_a_failing_step_fails_its_requests_only(double: Any, tiny_tokenizer: Any, tiny_pool: Path, monkeypatch: Any) -> None:
    fused = fused_with(copy.deepcopy(double), tiny_tokenizer, tiny_pool, "stale")
    engine = Engine(fused, EngineOptions(max_batch=4))
    client = Client(engine)
    with monkeypatch.context() as patch:

        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("out of memory: tried to allocate 3 GiB\nat somewhere")

        patch.setattr(type(fused), "forward", broken)
        engine.submit(client.job("unlucky", TEXTS[0]))
        client.wait(1)
    failed = client.events["unlucky"][-1]
    assert isinstance(failed, Failed)
    assert "out of memory" in str(failed.error)
    assert "somewhere" not in str(failed.error)
    engine.submit(client.job("next", TEXTS[0]))
    client.wait(1)
    assert len(client.tokens("next")) == STEPS
    engine.close()


UNLUCKY = SamplingOptions(temperature=0.0, seed=13, top_logprobs=0)
PLACES = [
    (Sampler, "choose", lambda sampler, *_: sampler.options is UNLUCKY),
    (Row, "ended_sentence", lambda row, *_: row.job.sampling is UNLUCKY),
    (Engine, "_process_chunk", lambda _, chunk: any(row.job.sampling is UNLUCKY for row, _ in chunk)),
    (Decider, "decide", lambda _, targets, texts, **given: any(text.startswith(TEXTS[1]) for text in texts)),
    (Decider, "decide", lambda _, targets, texts, prompts=True: not prompts and any(text.startswith(TEXTS[1]) for text in texts)),
]


@pytest.mark.parametrize(("owner", "name", "hits"), PLACES, ids=["sampling", "text", "prefill", "routing", "sentence"])
def test_an_error_of_one_request_is_its_own(
    owner: Any, name: str, hits: Any, truths: Any, double: Any, tiny_tokenizer: Any, tiny_pool: Path, monkeypatch: Any
) -> None:
    """A request that decodes and one that is admitted together with the unlucky one get what they would get alone."""
    engine = Engine(fused_with(copy.deepcopy(double), tiny_tokenizer, tiny_pool, "stale"), EngineOptions(max_batch=4, prefill_chunk=40))
    client, decodes, real = Client(engine), threading.Event(), getattr(owner, name)

    def failing(*given: Any, **named: Any) -> Any:
        if hits(*given, **named):
            raise KeyError("of one request")
        return real(*given, **named)

    monkeypatch.setattr(owner, name, failing)
    first = client.job("decodes", TEXTS[0])
    report = first.report
    first.report = lambda event: (report(event), decodes.set() if isinstance(event, Piece) else None)  # type: ignore[func-returns-value]
    engine.submit(first)
    assert decodes.wait(60)
    beside = {} if name == "_process_chunk" else {"beside": TEXTS[2]}
    engine.submit(client.job("unlucky", TEXTS[1], sampling=UNLUCKY), *(client.job(key, text) for key, text in beside.items()))
    client.wait(2 + len(beside))
    engine.submit(client.job("later", TEXTS[3]))
    client.wait(1)
    engine.close()
    assert isinstance(client.events["unlucky"][-1], Failed)
    for key, text in {"decodes": TEXTS[0], "later": TEXTS[3], **beside}.items():
        assert client.tokens(key) == truths["auto"][text]


class Unexpected(Exception):
    """Not among the errors that the engine survives."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("place", ["routing", "call"])
def test_nobody_waits_for_an_engine_that_has_ended(place: str, double: Any, tiny_tokenizer: Any, tiny_pool: Path, monkeypatch: Any) -> None:
    """A request in a slot, those taken from the queue, one that still waits, and calls of other threads."""
    engine = Engine(fused_with(copy.deepcopy(double), tiny_tokenizer, tiny_pool, "stale"), EngineOptions(max_batch=2))
    client, blocker = Client(engine), threading.Event()

    def broken(*_: Any, **__: Any) -> None:
        raise Unexpected

    with ThreadPoolExecutor(3) as threads:
        held = threads.submit(engine.call, lambda: blocker.wait(60))
        engine.submit(*(client.job(number, TEXTS[number]) for number in range(3)))
        if place == "routing":
            monkeypatch.setattr(engine.decider, "decide", broken)
            waits = threads.submit(engine.run_idle, lambda: None)
        else:
            waits = threads.submit(engine.call, broken)
        while not (engine._tasks or engine._calls):
            pass
        blocker.set()
        client.wait(3)
        assert held.result(60) is True
        if place == "call":
            with pytest.raises(GenerationError):
                waits.result(60)
        engine._thread.join(60)
    assert all(isinstance(client.events[number][-1], Failed) for number in range(3))
    assert not engine.is_alive
    for late in (
        lambda: engine.submit(client.job("late", TEXTS[0])),
        lambda: engine.call(lambda: 1),
        lambda: engine.run_idle(lambda: None),
    ):
        with pytest.raises(GenerationError, match="closed"):
            late()
    engine.close()


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


def test_no_nan_is_left_in_a_slot(double: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """A short request in the slot of a failed long one reads the slot up to the length of its longest neighbour."""
    long = " ".join(TEXTS) * 3
    truth = FusedCausalLM(copy.deepcopy(double).float(), tiny_tokenizer, AdapterBank.from_pool(tiny_pool), ByLength())
    ids = tiny_tokenizer([TEXTS[2], long])["input_ids"]
    target = Target(kind="base")
    zeros = torch.zeros(3)
    wanted = {
        row: truth.generate(input_ids=torch.tensor([row_ids]), routing=zeros, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
        for row, row_ids in enumerate(ids)
    }
    engine = Engine(FusedCausalLM(double.float(), tiny_tokenizer, AdapterBank.from_pool(tiny_pool), ByLength()), EngineOptions(max_batch=2))
    client = Client(engine)
    engine.submit(*(client.job(name, long, Target(kind="weights", weights={"alpha": 1e38})) for name in ("huge", "huge too")))
    client.wait(2)
    engine.submit(client.job("short", TEXTS[2], target), client.job("long", long, target))
    client.wait(2)
    engine.close()
    assert isinstance(client.events["huge"][-1], Failed)
    for row, name in enumerate(("short", "long")):
        assert client.tokens(name) == wanted[row][0, -STEPS:].tolist()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e38])
def test_weights_that_give_no_numbers_fail_their_own_request(weight: float, double: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = FusedCausalLM(double.float(), tiny_tokenizer, AdapterBank.from_pool(tiny_pool), ByLength())
    engine = Engine(fused, EngineOptions(max_batch=4))
    client = Client(engine)
    engine.submit(client.job("huge", TEXTS[0], Target(kind="weights", weights={"alpha": weight})), client.job("fine", TEXTS[0]))
    client.wait(2)
    engine.close()
    assert isinstance(client.events["huge"][-1], Failed)
    assert len(client.tokens("fine")) == STEPS
