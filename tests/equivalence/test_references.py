"""The reference rows against the plain model, PEFT, and deltas merged in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_truth import merged_logits

from dlplora.errors import MethodError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import MethodContext
from dlplora.methods.references import AvgDelta, Base, MultiTask, Oracle
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch

NAMES = ("alpha", "beta", "gamma")
TEXTS = ("Mia sees the red box.", "the cat", "Ann likes a dog and Tom likes a pear.")
TASKS = ("gamma", "alpha", "beta")


@pytest.fixture
def fuse(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> Callable[..., FusedCausalLM]:
    def make(method: Any, **artifacts: Path) -> FusedCausalLM:
        model = copy.deepcopy(tiny_llama)
        context = MethodContext(tokenizer=tiny_tokenizer, embedding=model.get_input_embeddings(), artifacts=artifacts)
        return FusedCausalLM(model, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), method, context=context).eval()

    return make


def prompts_of(tokenizer: Any, tasks: tuple[str | None, ...] | None = TASKS) -> PromptBatch:
    return PromptBatch.from_texts(TEXTS, tokenizer, task_names=tasks)


@torch.no_grad()
def rows_of_logits(fused: FusedCausalLM, prompts: PromptBatch) -> list[torch.Tensor]:
    with fused.routing(fused.route(prompts)):
        logits = fused(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask).logits
    return [row[mask.bool()] for row, mask in zip(logits, prompts.attention_mask, strict=True)]


def require_merged(fused: FusedCausalLM, prompts: PromptBatch, model: Any, pool: Path, weights: list[dict[str, float]]) -> None:
    for row, (actual, shares) in enumerate(zip(rows_of_logits(fused, prompts), weights, strict=True)):
        ids = prompts.input_ids[row][prompts.attention_mask[row].bool()].tolist()
        expected = merged_logits(model, pool, shares, ids)
        assert (actual.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_base_is_the_plain_model_bit_for_bit(fuse: Any, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    prompts = prompts_of(tiny_tokenizer)
    with torch.no_grad():
        expected = tiny_llama(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask).logits
    for row, actual in enumerate(rows_of_logits(fuse(Base()), prompts)):
        assert torch.equal(actual, expected[row][prompts.attention_mask[row].bool()])


def test_oracle_is_the_adapter_named_like_the_task(fuse: Any, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    prompts = prompts_of(tiny_tokenizer)
    require_merged(fuse(Oracle()), prompts, tiny_llama, tiny_pool, [{task: 1.0} for task in TASKS])


def test_oracle_is_pefts_mixed_batch(fuse: Any, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    from peft import PeftModel

    prompts = prompts_of(tiny_tokenizer)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(tiny_pool / "alpha"), adapter_name="alpha")
    for name in ("beta", "gamma"):
        peft_model.load_adapter(str(tiny_pool / name), adapter_name=name)
    peft_model.eval()
    with torch.no_grad():
        expected = peft_model(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, adapter_names=list(TASKS)).logits
    for row, actual in enumerate(rows_of_logits(fuse(Oracle()), prompts)):
        assert (actual - expected[row][prompts.attention_mask[row].bool()]).abs().max() <= 1e-5 * expected.abs().max()


def test_oracle_asks_for_the_task(fuse: Any, tiny_tokenizer: Any) -> None:
    fused = fuse(Oracle())
    with pytest.raises(MethodError, match=r"none was given\. Known tasks: alpha, beta, gamma"):
        fused.route(prompts_of(tiny_tokenizer, None))
    with pytest.raises(MethodError, match=r"prompt 1 has none\. Known tasks: alpha, beta, gamma"):
        fused.route(prompts_of(tiny_tokenizer, ("alpha", None, "beta")))
    with pytest.raises(MethodError, match=r"no adapter for task 'bta'\. Did you mean 'beta'\? Known tasks: alpha, beta, gamma"):
        fused.route(prompts_of(tiny_tokenizer, ("alpha", "bta", "beta")))


def test_average_is_the_mean_of_deltas(fuse: Any, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    third = dict.fromkeys(NAMES, 1.0 / 3.0)
    require_merged(fuse(AvgDelta()), prompts_of(tiny_tokenizer), tiny_llama, tiny_pool, [third] * 3)


def test_average_is_pefts_concatenation(make_adapter: Any, tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """PEFT's ``cat`` is exact for adapters without rsLoRA."""
    from peft import PeftModel

    for seed, name in enumerate(NAMES):
        make_adapter(tmp_path / name, seed=20 + seed, r=4, lora_alpha=6 + seed)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(tmp_path / "alpha"), adapter_name="alpha")
    for name in NAMES[1:]:
        peft_model.load_adapter(str(tmp_path / name), adapter_name=name)
    peft_model.base_model.add_weighted_adapter(list(NAMES), [1 / 3] * 3, "average", combination_type="cat")
    peft_model.set_adapter("average")
    peft_model.eval()
    prompts = prompts_of(tiny_tokenizer)
    with torch.no_grad():
        expected = peft_model(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask).logits
    model = copy.deepcopy(tiny_llama)
    context = MethodContext(tokenizer=tiny_tokenizer, embedding=model.get_input_embeddings())
    fused = FusedCausalLM(model, tiny_tokenizer, AdapterBank.from_pool(tmp_path), AvgDelta(), context=context).eval()
    for row, actual in enumerate(rows_of_logits(fused, prompts)):
        assert (actual - expected[row][prompts.attention_mask[row].bool()]).abs().max() <= 1e-5 * expected.abs().max()


def test_multitask_is_its_one_adapter(fuse: Any, make_adapter: Any, tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "all_tasks", seed=9, r=12, lora_alpha=24)
    fused = fuse(MultiTask(), multitask=folder)
    assert fused.bank.names == ("multitask",)
    assert fused.route(prompts_of(tiny_tokenizer)).weights.expand(3, -1).tolist() == [[1.0]] * 3
    require_merged(fused, prompts_of(tiny_tokenizer), tiny_llama, tmp_path, [{"all_tasks": 1.0}] * 3)


def test_multitask_says_what_is_missing(fuse: Any, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"method 'multitask' needs a multitask; none was given"):
        fuse(MultiTask())
    with pytest.raises(MethodError, match="multitask folder not found"):
        fuse(MultiTask(), multitask=tmp_path / "nowhere")


def test_only_the_oracle_sees_task_names(fuse: Any, tiny_tokenizer: Any) -> None:
    class Nosy(AvgDelta):
        seen: list[Any] = []

        def route(self, prompts: PromptBatch) -> torch.Tensor:
            self.seen.append(prompts.task_names)
            return super().route(prompts)

    fuse(Nosy()).route(prompts_of(tiny_tokenizer))
    assert Nosy.seen == [None]
