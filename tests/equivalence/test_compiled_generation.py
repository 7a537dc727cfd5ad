"""Compiled decoding: nothing is compiled again at a sentence end, for another number of kept experts, or for the next request."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlplora.errors import GenerationError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.generate_options import GenerateOptions
from dlplora.inference.request import CompiledTurns, DecodeSetting, Request
from dlplora.inference.routed_generation import RoutedGeneration
from dlplora.methods.base import FusionMethod, Metadata, MethodContext
from dlplora.methods.registry import build_stand_in
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch

TEXTS = ("the cat sees", "Mia likes the plum. Who likes it? Answer:")
MORE = ("Tom and Ann", "Leo in the tree . two three")


class ByLength(FusionMethod):
    """Keeps one, two or three experts, by the number of characters the router reads."""

    name = "by_length"
    metadata = Metadata(title="By length", granularity="sentence")

    def __init__(self) -> None:
        super().__init__()
        self.kept: set[int] = set()
        self.rows = 0

    def route(self, prompts: PromptBatch) -> Tensor:
        counts = [1 + len(text) % 3 for text in prompts.texts]
        self.kept |= set(counts)
        self.rows += len(counts)
        return torch.tensor([[1.0 / count if index < count else 0.0 for index in range(3)] for count in counts])


@pytest.fixture
def graphs() -> Iterator[tuple[Callable[..., Any], list[Any]]]:
    """A compiler that runs graphs as they are, and the graphs it was given."""
    torch._dynamo.reset()
    given: list[Any] = []

    def compiler(graph: Any, inputs: Any, **options: Any) -> Any:
        given.append(graph)
        return graph.forward

    yield compiler, given
    torch._dynamo.reset()


OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("backend", ["folded", "dense"])
def test_one_graph_serves_all_sentences_and_requests(
    backend: str, talkative: Any, tiny_tokenizer: Any, tiny_pool: Path, graphs: tuple[Any, list[Any]]
) -> None:
    compiler, given = graphs
    plain = FusedCausalLM(copy.deepcopy(talkative), tiny_tokenizer, AdapterBank.from_pool(tiny_pool), ByLength(), backend=backend)
    expected = [plain.generate(list(texts), **OPTIONS) for texts in (TEXTS, MORE)]
    method = ByLength()
    fused = FusedCausalLM(talkative, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), method, backend=backend)
    fused.compile(backend=compiler, fullgraph=True)
    addresses = set()
    for texts, tokens in zip((TEXTS, MORE), expected, strict=True):
        before = method.rows
        assert torch.equal(fused.generate(list(texts), **OPTIONS), tokens)
        assert method.rows - before >= len(texts) + 3  # sentences did end
        addresses.add(addresses_of_free_buffers(fused))
    assert method.kept == {1, 2, 3}
    assert len(addresses) == 1
    assert len(given) == 1
    # Another number of rows is another shape.
    fused.generate(TEXTS[0], **OPTIONS)
    assert len(given) == 2


@pytest.mark.parametrize("name", ["meteora_gate", "mole", "lora_flow", "phatgoose", "adafuse", "arrow_out"])
def test_gates_compile_too(
    name: str, talkative: Any, tiny_tokenizer: Any, tiny_pool: Path, graphs: tuple[Any, list[Any]], tmp_path: Path
) -> None:
    compiler, given = graphs
    tokens = []
    for compiled in (False, True):
        model, bank, method = copy.deepcopy(talkative), AdapterBank.from_pool(tiny_pool), build_stand_in(name)
        context = MethodContext(tokenizer=tiny_tokenizer, embedding=model.get_input_embeddings())
        context = dataclasses.replace(context, artifacts=type(method).example_artifacts(tmp_path / str(compiled), bank, context))
        fused = FusedCausalLM(model, tiny_tokenizer, bank, method, context=context)
        if compiled:
            fused.compile(backend=compiler, fullgraph=True)
        tokens.append([fused.generate(list(texts), **OPTIONS) for texts in (TEXTS, MORE)])
    assert len(given) == 1
    assert all(torch.equal(one, other) for one, other in zip(*tokens, strict=True))


def addresses_of_free_buffers(fused: FusedCausalLM) -> tuple[int, ...]:
    """Where the buffers lie that the last request gave back."""
    pool = fused.slot.buffers
    assert pool.num_leased == 0
    assert len(pool._free) <= 1
    return tuple(buffer.data_ptr() for buffers in pool._free for plan in buffers.by_layer.values() for buffer in plan.buffers())


def test_a_prompt_level_method_keeps_its_graph_too(
    talkative: Any, tiny_tokenizer: Any, tiny_pool: Path, graphs: tuple[Any, list[Any]]
) -> None:
    class Once(ByLength):
        name = "once"
        metadata = Metadata(title="Once", granularity="prompt")

    compiler, given = graphs
    method = Once()
    fused = FusedCausalLM(talkative, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), method, backend="folded")
    fused.compile(backend=compiler)
    for texts in (["a box", "a box a"], ["the box", "the box"], ["the box a", "a box"]):  # rows routed alike, too
        fused.generate(texts, **{**OPTIONS, "max_new_tokens": 6})
    assert len(method.kept) == 3
    assert len(given) == 1


def test_a_forward_compiled_by_hand_follows_rerouting(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path, graphs: Any) -> None:
    """``torch.compile`` around the model, a request re-routed in the middle: same graph, new answer."""
    compiler, given = graphs
    fused = FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), ByLength(), backend="folded")
    compiled = torch.compile(fused.model, backend=compiler)
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 10]])
    one, two = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.2, 0.3], [0.0, 0.0, 1.0]])
    with torch.no_grad():
        with fused.routing(one):
            first = fused(input_ids=ids).logits
        with fused.routing(two):
            second = fused(input_ids=ids).logits
        state = fused.request_router.state(one, own=True, reroutes=True)
        with fused.routing(state):
            torch.testing.assert_close(compiled(input_ids=ids).logits, first, atol=1e-5, rtol=1e-5)
            state.update_rows(torch.tensor([0, 1]), two)
            torch.testing.assert_close(compiled(input_ids=ids).logits, second, atol=1e-5, rtol=1e-5)
        with fused.routing(fused.request_router.state(one, own=True, reroutes=True)):
            torch.testing.assert_close(compiled(input_ids=ids).logits, first, atol=1e-5, rtol=1e-5)
    assert len(given) == 1


def test_no_value_reaches_the_host_between_sentence_ends(talkative: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """At a token without a sentence end, ``generate`` reads what it reads without re-routing, and the flags that a GPU has sent by then."""
    from dlplora.bench.op_counter import count

    class Once(ByLength):
        name = "once"
        metadata = Metadata(title="Once", granularity="prompt")

    silent = copy.deepcopy(talkative)
    stops = [tiny_tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (".", "!", "?", "\n")]
    with torch.no_grad():
        silent.lm_head.bias[stops] = -1e4
    reads = {}
    for method in (ByLength(), Once()):
        fused = FusedCausalLM(copy.deepcopy(silent), tiny_tokenizer, AdapterBank.from_pool(tiny_pool), method, backend="folded")
        fused.vocabulary.to("cpu")  # made once a model, and not counted
        for tokens in (8, 24):
            options = {**OPTIONS, "max_new_tokens": tokens}
            reads[method.name, tokens] = count(functools.partial(fused.generate, list(TEXTS), **options))[0].host_reads
        assert method.rows == 4  # the prompts, twice
    per_token = {name: (reads[name, 24] - reads[name, 8]) / 16 for name in ("by_length", "once")}
    assert per_token["by_length"] == per_token["once"] + 1


def test_a_loop_that_cannot_be_followed_is_refused(talkative: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = FusedCausalLM(talkative, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), ByLength())
    ids, options = torch.ones((2, 1), dtype=torch.long), {}
    with Request(fused.slot, CompiledTurns(), DecodeSetting()) as request:
        asked = GenerateOptions(fused.model, options, fused.method)
        RoutedGeneration(fused, request, PromptBatch.from_texts(TEXTS, tiny_tokenizer), ids, torch.ones_like(ids), asked, None).start(8)
        assert request.state is not None
        (watcher,) = options["stopping_criteria"]
        watcher(torch.tensor([[1, 5], [1, 6]]), None)
        with pytest.raises(GenerationError, match="runs no forward pass between two tokens"):
            watcher(torch.tensor([[1, 5, 7], [1, 6, 8]]), None)


def test_compile_is_an_option_of_from_pretrained(tiny_llama_folder: Path, tiny_pool: Path) -> None:
    options: dict[str, Any] = {"pool": tiny_pool, "method": "avg_delta"}
    assert FusedCausalLM.from_pretrained(tiny_llama_folder, **options)._compile_config is None
    fused = FusedCausalLM.from_pretrained(tiny_llama_folder, **options, compile=True)
    assert fused._compile_config is not None
    assert fused.request_router.fixed_width
