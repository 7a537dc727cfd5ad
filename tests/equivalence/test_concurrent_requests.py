"""Requests that run at the same time, or take turns, get what they get alone, to the last bit of the logits."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria

from dlplora.baselines.lora_flow import LoRAFlow
from dlplora.baselines.meteora import MeteoRA
from dlplora.baselines.mole import MoLE
from dlplora.baselines.xlora import XLoRA
from dlplora.errors import GenerationError, RoutingError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import FusionMethod, Metadata, MethodContext
from dlplora.methods.references import AvgDelta
from dlplora.modules.lora_bank import AdapterBank

BATCHES = (
    ("the cat sees",),
    ("Mia likes the plum. Who likes it? Answer:",),
    ("a", "Tom and Ann and Leo in the tree . two three"),
    ("who sees the red box", "no"),
)


class ByLength(FusionMethod):
    """Routes by the number of characters it reads: every further sentence changes the weights."""

    name = "by_length"
    metadata = Metadata(title="By length", granularity="sentence")
    policy, pieces = "stale", "whole"

    def route(self, prompts: Any) -> Tensor:
        turns = torch.tensor([len(text) % 7 for text in prompts.texts]).float()[:, None]
        return torch.cat([turns / 10, 1 - turns / 10, (turns % 2) / 5], dim=1)

    @property
    def kv_policy(self) -> str:
        return self.policy

    @property
    def prompt_routing(self) -> str:
        return self.pieces


class Recomputed(ByLength):
    policy, pieces = "recompute", "sentence"


class Once(ByLength):
    metadata = Metadata(title="Once", granularity="prompt")


METHODS: dict[str, tuple[Callable[[], FusionMethod], str]] = {
    "sentence": (ByLength, "folded"),
    "sentence_dense": (ByLength, "dense"),
    "sentence_recompute": (Recomputed, "auto"),
    "prompt": (Once, "folded"),
    "static": (AvgDelta, "auto"),
    "static_merged": (AvgDelta, "merged"),
    "meteora": (MeteoRA, "auto"),
    "xlora": (XLoRA, "auto"),
    "lora_flow": (LoRAFlow, "auto"),
    "mole": (MoLE, "auto"),
}


@pytest.fixture
def fuse(talkative: Any, tiny_tokenizer: Any, tiny_pool: Path) -> Callable[..., FusedCausalLM]:
    def make(name: str) -> FusedCausalLM:
        build, backend = METHODS[name]
        model, method = copy.deepcopy(talkative), build()
        context = MethodContext(tokenizer=tiny_tokenizer, embedding=model.get_input_embeddings())
        fused = FusedCausalLM(model, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), method, backend=backend, context=context)
        generator = torch.Generator().manual_seed(5)
        for parameter in method.parameters():  # untrained gates weigh all experts alike, whatever they read
            parameter.data.normal_(0, 0.7, generator=generator)
        return fused

    return make


def ask(fused: FusedCausalLM, texts: Sequence[str], steps: int = 9, **options: Any) -> tuple[list[list[int]], Tensor]:
    """Tokens and logits of one request."""
    found: Any = fused.generate(
        list(texts), max_new_tokens=steps, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True, **options
    )
    return found.sequences.tolist(), torch.stack(found.logits)


def same(one: tuple[list[list[int]], Tensor], other: tuple[list[list[int]], Tensor]) -> bool:
    return one[0] == other[0] and torch.equal(one[1], other[1])


class Baton(StoppingCriteria):
    """Stops a request after every token until it is its turn again."""

    def __init__(self, number: int) -> None:
        self.go, self.paused, self.number = threading.Semaphore(0), threading.Semaphore(0), number
        self.answer: Any = None
        self.ended = False
        self.fail_at: int | None = None
        self._steps = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.paused.release()
        self.go.acquire()
        self._steps += 1
        if self._steps == self.fail_at:
            raise KeyError("a caller's own error")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def run(self, fused: FusedCausalLM, texts: Sequence[str]) -> None:
        self.go.acquire()
        try:
            self.answer = ask(fused, texts, stopping_criteria=[self])
        except KeyError as error:
            self.answer = error
        self.ended = True
        self.paused.release()


def take_turns(fused: FusedCausalLM, batches: Sequence[Sequence[str]], dice: random.Random, failing: int | None = None) -> list[Any]:
    """Run requests token by token, the next one drawn by lot; their answers."""
    batons = [Baton(number) for number in range(len(batches))]
    if failing is not None:
        batons[failing].fail_at = 4
    threads = [threading.Thread(target=baton.run, args=(fused, texts)) for baton, texts in zip(batons, batches, strict=True)]
    for thread in threads:
        thread.start()
    while any(not baton.ended for baton in batons):
        baton = dice.choice([one for one in batons if not one.ended])
        baton.go.release()
        baton.paused.acquire()
    for thread in threads:
        thread.join()
    return [baton.answer for baton in batons]


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


# ---------------------------------------------------------------------- one thread

STEPS = 5
ROUTES = (torch.tensor([0.9, 0.1, 0.0]), torch.tensor([[0.0, 0.2, 0.8]]), torch.tensor([0.3, 0.3, 0.4]))


@torch.no_grad()
def loop(fused: FusedCausalLM, ids: list[int], how: str, weights: Tensor) -> Iterator[Tensor]:
    """Decode by hand and hand out the logits of every step; routing as an argument, or in a block around the loop."""
    tokens, past = torch.tensor([ids]), None
    given = fused.planner.state(weights) if how == "state" else weights
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


class Nested(StoppingCriteria):
    """Asks the same model something else after every token."""

    def __init__(self, fused: FusedCausalLM, expected: Any) -> None:
        self.fused, self.expected, self.num_right = fused, expected, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.num_right += same(ask(self.fused, BATCHES[3]), self.expected)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


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
    with pytest.raises(GenerationError, match="from inside another such call"):
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
    state = fused.planner.state(ROUTES[0])
    with fused.routing(state):
        other = copy.copy(state)
        assert not other.plans


def test_buffers_of_many_requests_do_not_add_up(fuse: Any) -> None:
    """200 requests of changing sizes: one set of buffers in memory, none of them in use."""
    fused = fuse("prompt")
    for number in range(200):
        ask(fused, BATCHES[number % 4], steps=1)
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
        assert same(ask(fused, BATCHES[2], routing=fused.planner.state(weights)), expected)
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
