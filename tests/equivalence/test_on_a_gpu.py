"""On a CUDA device: eager, compiled with CUDA graphs, every backend, and the server's engine, against what a CPU says in float64."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.loading import load_backbone, nano_asset
from dlplora.kernels.backends import triton_obstacle
from dlplora.methods.base import MethodContext
from dlplora.methods.registry import build_stand_in
from dlplora.modules.lora_bank import AdapterBank
from dlplora.serve.engine import Engine, EngineOptions
from dlplora.tasks.nano import nano_suite
from dlplora.types import PromptBatch
from tests.equivalence.by_length import ByLength
from tests.equivalence.serve_client import Client
from tests.equivalence.test_kv_policy import STEPS, TEXTS, slow

DEVICE = "cuda"
OPTIONS: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class OnDevice(ByLength):
    """``ByLength`` whose weights are where the prompts are."""

    def route(self, prompts: PromptBatch) -> Tensor:
        return super().route(prompts).to(prompts.input_ids.device)


class AtMostTwo(OnDevice):
    """Keeps one or two of three experts, as ``folded`` and ``triton`` are meant for."""

    def route(self, prompts: PromptBatch) -> Tensor:
        return super().route(prompts) * torch.tensor([1.0, 1.0, 0.0], device=prompts.input_ids.device)


def on_device(model: Any, tokenizer: Any, pool: Path, method: Any, backend: str = "auto", device: str = DEVICE) -> FusedCausalLM:
    model = copy.deepcopy(model).to(device)
    bank = AdapterBank.from_pool(pool, dtype=model.dtype, device=device)
    context = MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings(), device=torch.device(device))
    return FusedCausalLM(model, tokenizer, bank, method, backend=backend, context=context)


@pytest.mark.parametrize("backend", ["reference", "dense", "folded"])
def test_eager_answers_equal_the_slow_loop(backend: str, double: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    expected = [slow(double, tiny_pool, tiny_tokenizer, text, "stale")[0] for text in TEXTS]
    fused = on_device(double, tiny_tokenizer, tiny_pool, OnDevice(), backend)
    assert fused.generate(list(TEXTS), **OPTIONS)[:, -STEPS:].tolist() == expected


@pytest.mark.triton
@pytest.mark.skipif(triton_obstacle("cuda") is not None, reason="needs Triton")
def test_the_grouped_kernels_serve_a_generation(talkative: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    dense, grouped = (on_device(talkative, tiny_tokenizer, tiny_pool, AtMostTwo(), backend) for backend in ("dense", "triton"))
    assert torch.equal(dense.generate(list(TEXTS), **OPTIONS), grouped.generate(list(TEXTS), **OPTIONS))


@pytest.mark.parametrize("backend", ["dense", "folded"])
def test_cuda_graphs_follow_rerouting(backend: str, double: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """The default of ``compile``: sentences end, further requests come, rows are in another order."""
    torch._dynamo.reset()
    plain = on_device(double, tiny_tokenizer, tiny_pool, OnDevice(), "reference", device="cpu")
    fused = on_device(double, tiny_tokenizer, tiny_pool, OnDevice(), backend)
    fused.compile(fullgraph=True)
    for texts in (TEXTS, TEXTS[::-1], TEXTS):
        assert torch.equal(fused.generate(list(texts), **OPTIONS).cpu(), plain.generate(list(texts), **OPTIONS))


@pytest.mark.parametrize("name", ["meteora_gate", "mole", "lora_flow", "phatgoose", "arrow_out"])
def test_cuda_graphs_with_gates(name: str, double: Any, tiny_tokenizer: Any, tiny_pool: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    tokens = []
    for device in ("cpu", DEVICE):
        model, method = copy.deepcopy(double).to(device), build_stand_in(name)
        bank = AdapterBank.from_pool(tiny_pool, dtype=torch.float64, device=device)
        context = MethodContext(tokenizer=tiny_tokenizer, embedding=model.get_input_embeddings(), device=torch.device(device))
        context = dataclasses.replace(context, artifacts=type(method).example_artifacts(tmp_path / device, bank, context))
        fused = FusedCausalLM(model, tiny_tokenizer, bank, method, context=context)
        if device == DEVICE:
            fused.compile(fullgraph=True)
        tokens.append([fused.generate(list(texts), **OPTIONS).cpu() for texts in (TEXTS, TEXTS[::-1])])
    assert all(torch.equal(one, other) for one, other in zip(*tokens, strict=True))


def test_the_engine_of_the_server(double: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    expected = {text: slow(double, tiny_pool, tiny_tokenizer, text, "stale")[0] for text in TEXTS}
    engine = Engine(on_device(double, tiny_tokenizer, tiny_pool, OnDevice()), EngineOptions(max_batch=3, prefill_chunk=3))
    client = Client(engine)
    for text in TEXTS:
        engine.submit(client.job(text, text))
    client.wait(len(TEXTS))
    engine.close()
    assert {text: client.tokens(text) for text in TEXTS} == expected


def test_the_shipped_model_says_what_peft_says() -> None:
    """One adapter of the embedded pool, by PEFT on the same device; then the whole method, by the CPU."""
    task = nano_suite().tasks[0]
    prompts = [item.prompt for item in task.items("test", 16, 0)]
    fixed = {"max_new_tokens": 8, "do_sample": False}
    oracle = FusedCausalLM.from_pretrained(method="oracle", device=DEVICE)
    tokenizer = oracle.tokenizer
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(DEVICE)
    named = PromptBatch.from_texts(prompts, tokenizer, device=DEVICE)
    named = dataclasses.replace(named, task_names=(task.name,) * len(prompts))
    ours = oracle.generate(**batch, prompts=named, **fixed)
    plain, _ = load_backbone(None, dtype="float32", device=torch.device(DEVICE))
    theirs = PeftModel.from_pretrained(plain, str(nano_asset("pool") / task.name)).generate(**batch, **fixed)
    assert torch.equal(ours, theirs)
    several = [task.items("test", 1, 0)[0].prompt for task in nano_suite().tasks]
    said = [FusedCausalLM.from_pretrained(device=device).generate_text(several, **fixed) for device in (DEVICE, "cpu")]
    assert said[0] == said[1]
