"""Errors in the engine: what belongs to one request ends that one, and nobody waits for an engine that has ended."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.errors import GenerationError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.modules.lora_bank import AdapterBank
from dlplora.serve.deciding import Decider
from dlplora.serve.engine import Engine, EngineOptions
from dlplora.serve.jobs import Failed, Piece, Target
from dlplora.serve.rows import Row
from dlplora.serve.sampling import Sampler, SamplingOptions
from tests.equivalence.serve_client import Client
from tests.equivalence.test_kv_policy import STEPS, TEXTS, ByLength, fused_with


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
