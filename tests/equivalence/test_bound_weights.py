"""Routing weights of a call or of a block hold there and nowhere else: loops, generators, threads and tasks that take turns."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dlplora.errors import GenerationError, RoutingError
from dlplora.inference.fused_model import FusedCausalLM
from tests.equivalence.taking_turns import BATCHES, ask, by_name, same


@pytest.fixture
def fuse(fuse: Any) -> Callable[[str], FusedCausalLM]:
    """By the names of ``METHODS``."""
    return functools.partial(by_name, fuse)


STEPS = 5
ROUTES = (torch.tensor([0.9, 0.1, 0.0]), torch.tensor([[0.0, 0.2, 0.8]]), torch.tensor([0.3, 0.3, 0.4]))


@torch.no_grad()
def loop(fused: FusedCausalLM, ids: list[int], how: str, weights: Tensor) -> Iterator[Tensor]:
    """Decode by hand and hand out the logits of every step; routing as an argument, or in a block around the loop."""
    tokens, past = torch.tensor([ids]), None
    given = fused.request_router.state(weights) if how == "state" else weights
    with fused.routing(weights) if how == "block" else contextlib.nullcontext():
        for _ in range(STEPS):
            options = {} if how == "block" else {"routing": given}
            out = fused(input_ids=tokens, past_key_values=past, use_cache=True, **options)
            past, tokens = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)
            yield out.logits[0, -1]


@pytest.mark.parametrize("hows", [("state", "state", "weights"), ("block", "block", "block"), ("block", "weights", "state")])
def test_decoding_loops_of_one_thread_take_turns(hows: tuple[str, ...], fuse: Any) -> None:
    fused, dice = fuse("prompt"), random.Random(str(hows))
    prompts = ([1, 5, 9, 30], [1, 7], [1, 40, 41, 42, 43])

    def fresh() -> list[Iterator[Tensor]]:
        return [loop(fused, ids, how, weights) for ids, how, weights in zip(prompts, hows, ROUTES, strict=True)]

    alone = [list(one) for one in fresh()]
    whole = ask(fused, BATCHES[0])
    for _ in range(20):
        running = dict(enumerate(fresh()))
        found: dict[int, list[Tensor]] = {place: [] for place in running}
        while running:
            place = dice.choice(list(running))
            logits = next(running[place], None)
            if logits is None:
                del running[place]
            else:
                found[place].append(logits)
        for place, logits in found.items():
            assert torch.equal(torch.stack(logits), torch.stack(alone[place]))
    # A loop that is suspended in the middle of its block does not bind its consumer.
    suspended = loop(fused, prompts[0], "block", ROUTES[0])
    next(suspended)
    assert same(ask(fused, BATCHES[0]), whole)
    with pytest.raises(RoutingError, match="no routing weights are bound"):
        fused(input_ids=torch.tensor([prompts[1]]))
    del suspended
    gc.collect()
    assert fused.slot.buffers.num_leased == 0
    assert not fused.slot._owned


@torch.no_grad()
def without_gradients(fused: FusedCausalLM, ids: Tensor) -> Tensor:
    return fused(input_ids=ids).logits  # type: ignore[no-any-return]


def test_generators_keep_their_blocks_in_other_threads(fuse: Any) -> None:
    """As a web framework resumes them: every step in another thread, with another context."""
    fused = fuse("prompt")
    prompts = ([1, 5, 9, 30], [1, 7])
    alone = [list(loop(fused, ids, "block", weights)) for ids, weights in zip(prompts, ROUTES, strict=False)]
    running = [loop(fused, ids, "block", weights) for ids, weights in zip(prompts, ROUTES, strict=False)]
    for step in range(STEPS):
        for place, one in enumerate(running):
            found: list[Tensor] = []
            thread = threading.Thread(target=lambda one=one, found=found: found.append(next(one)))
            thread.start()
            thread.join()
            assert torch.equal(found[0], alone[place][step])


def test_tasks_of_an_event_loop_keep_their_blocks(fuse: Any) -> None:
    fused = fuse("prompt")
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        alone = [fused(input_ids=ids, routing=weights).logits for weights in ROUTES]

    async def request(weights: Tensor) -> list[Tensor]:
        found = []
        with fused.routing(weights):
            for _ in range(3):
                await asyncio.sleep(0)
                with torch.no_grad():
                    found.append(fused(input_ids=ids).logits)
                    found.append(fused.model(input_ids=ids).logits)  # the plain model's forward follows the block too
                # not inside the block above: tasks that take turns would end each other's no_grad
                found.append(await asyncio.to_thread(without_gradients, fused, ids))
        return found

    async def serve() -> list[list[Tensor]]:
        return await asyncio.gather(*map(request, ROUTES))

    for found, expected in zip(asyncio.run(serve()), alone, strict=True):
        assert all(torch.equal(logits, expected) for logits in found)


def test_blocks_hold_where_python_programmers_expect_them(fuse: Any) -> None:
    """Nested blocks, context managers of one's own, blocks inside generators inside blocks."""
    fused = fuse("prompt")
    ids = torch.tensor([[1, 5, 9, 30]])

    @torch.no_grad()
    def logits(**options: Any) -> Tensor:
        return fused(input_ids=ids, **options).logits

    first, second, third = (logits(routing=weights) for weights in ROUTES)

    @contextlib.contextmanager
    def bound(weights: Tensor) -> Iterator[None]:
        with fused.routing(weights):
            yield

    def generator() -> Iterator[Tensor]:
        with bound(ROUTES[1]):
            yield logits()
            with fused.routing(ROUTES[2]):
                yield logits()
            yield logits()

    with bound(ROUTES[0]), contextlib.ExitStack() as stack:
        assert torch.equal(logits(), first)
        stack.enter_context(bound(ROUTES[2]))
        assert torch.equal(logits(), third)
        running = generator()
        for expected in (second, third, second):
            assert torch.equal(next(running), expected)
            assert torch.equal(logits(), third)
        stack.close()
        assert torch.equal(logits(), first)
        assert torch.equal(logits(routing=ROUTES[1]), second)
    assert fused.slot.state is None


def test_blocks_closed_out_of_order_are_refused(fuse: Any) -> None:
    fused = fuse("prompt")
    one, two = fused.routing(ROUTES[0]), fused.routing(ROUTES[2])
    one.__enter__()
    two.__enter__()
    with pytest.raises(RoutingError, match=r"not closed in the reverse order.*Pass routing=WEIGHTS"):
        one.__exit__(None, None, None)
    assert fused.slot.state is not None
    assert torch.equal(fused.slot.state.weights, ROUTES[2])
    two.__exit__(None, None, None)
    assert fused.slot.state is None
    assert fused.slot.buffers.num_leased == 0


def test_weights_for_a_call_that_gates_decide_are_refused(fuse: Any) -> None:
    fused = fuse("meteora")
    with pytest.raises(RoutingError, match="method 'meteora' decides by gates"):
        fused.generate("the cat", routing=ROUTES[0])
    with pytest.raises(RoutingError, match="method 'meteora' decides by gates"):
        fused(input_ids=torch.tensor([[1, 5]]), routing=ROUTES[0])


def test_weights_of_a_call_are_those_of_a_block(fuse: Any) -> None:
    fused = fuse("sentence")
    for weights in (ROUTES[0], torch.stack([ROUTES[0], ROUTES[2]])):
        with fused.routing(weights):
            expected = ask(fused, BATCHES[2])
        assert same(ask(fused, BATCHES[2], routing=weights), expected)
        assert same(ask(fused, BATCHES[2], routing=fused.request_router.state(weights)), expected)
        # copies of a prompt are routed as the prompt is
        beams = [ask(fused, BATCHES[2], routing=weights, num_beams=2)[0]]
        with fused.routing(weights):
            beams.append(ask(fused, BATCHES[2], num_beams=2)[0])
        assert beams[0] == beams[1]
    with pytest.raises(RoutingError, match="made for 3 tokens, the batch has 2"):
        fuse("sentence_recompute")(input_ids=torch.tensor([[1, 5]]), routing=torch.ones(1, 3, 3))


def test_streams_take_turns(fuse: Any) -> None:
    fused, dice = fuse("sentence"), random.Random(3)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    prompts = [texts[0] for texts in BATCHES]
    widths = [len(fused.tokenizer(text)["input_ids"]) for text in prompts]
    alone = [
        fused.tokenizer.decode(fused.generate(text, **options)[0, width:], skip_special_tokens=True)
        for text, width in zip(prompts, widths, strict=True)
    ]
    running = {place: fused.stream_text(text, **options) for place, text in enumerate(prompts)}
    found = dict.fromkeys(running, "")
    while running:
        place = dice.choice(list(running))
        piece = next(running[place], None)
        if piece is None:
            del running[place]
        else:
            found[place] += piece
    assert list(found.values()) == alone
    # A stream that nobody reads on gives everything back; errors reach the reader.
    abandoned = fused.stream_text(prompts[0], max_new_tokens=200, do_sample=False, eos_token_id=None)
    next(abandoned)
    del abandoned
    gc.collect()
    assert fused.slot.buffers.num_leased == 0
    with pytest.raises(GenerationError, match="at least 1, got 0"):
        list(fused.stream_text("the cat", max_new_tokens=0))
    with pytest.raises(GenerationError, match="takes one prompt"):
        fused.stream_text(["the cat"])
    with fused.routing(ROUTES[0]):
        bound = fused.stream_text(prompts[0], **options)
        expected = fused.tokenizer.decode(fused.generate(prompts[0], **options)[0, widths[0] :], skip_special_tokens=True)
    assert "".join(bound) == expected
