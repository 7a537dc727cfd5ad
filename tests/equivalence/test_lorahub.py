"""LoRAHub's weights, objective and search against PEFT, float64 and the properties its paper states."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dlplora.baselines.lorahub import LoRAHub, LoRAHubConfig
from dlplora.cli.main import main
from dlplora.errors import ConfigError, IncompatibleAdapterError, MethodError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.tasks.registry import get_suite
from dlplora.tasks.types import Item
from dlplora.types import PromptBatch

NAMES = ("alpha", "beta", "gamma")
IDS = torch.tensor([[1, 5, 9, 40, 33, 7], [1, 80, 12, 3, 61, 90]])
WORDS = {"alpha": "the cat", "beta": "Mia likes", "gamma": "two three"}


def examples(task: str, num: int) -> list[Item]:
    return [Item(task, f"{WORDS[task]} {i} ?", ["a box", "plum", "red"][i % 3]) for i in range(num)]


def fuse(model: Any, tokenizer: Any, pool: Path, few_shot: Any = examples, **settings: Any) -> FusedCausalLM:
    model = copy.deepcopy(model)
    context = MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings(), few_shot=few_shot)
    method = LoRAHub(LoRAHubConfig(**settings))
    return FusedCausalLM(model, tokenizer, AdapterBank.from_pool(pool, NAMES), method, context=context)


@pytest.fixture
def spoken(tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path) -> Any:
    """Examples whose answers are what each adapter itself would say, so that the adapters have something to offer."""
    said = {}
    for name in NAMES:
        adapted = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(uniform_pool / name)).eval()
        for item in examples(name, 5):
            ids = torch.tensor([tiny_tokenizer(item.prompt)["input_ids"]])
            new = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
            said[name, item.prompt] = tiny_tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).strip() or "x"
    return lambda task, num: [Item(task, item.prompt, said[task, item.prompt]) for item in examples(task, num)]


@torch.no_grad()
def logits(fused: Any, weights: Tensor | None = None) -> Tensor:
    if weights is None:
        return fused(input_ids=IDS).logits
    with fused.routing(weights):
        return fused(input_ids=IDS).logits


def test_one_hot_is_that_adapter_and_zero_is_the_base(tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, uniform_pool)
    assert torch.equal(logits(fused, torch.zeros(3)), logits(tiny_llama))
    for index, name in enumerate(NAMES):
        adapted = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(uniform_pool / name)).eval()
        weights = torch.nn.functional.one_hot(torch.tensor(index), 3).float()
        torch.testing.assert_close(logits(fused, weights), logits(adapted), atol=1e-5, rtol=1e-5)


def test_the_delta_is_quadratic_and_even_in_the_weights(tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, uniform_pool)
    weights = torch.tensor([0.4, -0.7, 0.2])
    layer = next(iter(fused.patched.layers.values()))
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))

    def delta(given: Tensor) -> Tensor:
        with torch.no_grad(), fused.routing(given):
            return layer(x) - layer.base(x)

    torch.testing.assert_close(delta(-weights), delta(weights), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(delta(0.5 * weights), 0.25 * delta(weights), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("hub_code_loss", [False, True])
def test_the_objective_is_the_answers_cross_entropy(hub_code_loss: bool, tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, uniform_pool, hub_code_loss=hub_code_loss)
    total, count = 0.0, 0
    for item in examples("beta", 5):
        prompt = tiny_tokenizer(item.prompt)["input_ids"]
        whole = torch.tensor(tiny_tokenizer(f"{item.prompt} {item.answer}")["input_ids"] + [tiny_tokenizer.eos_token_id])
        with torch.no_grad():
            log_probs = tiny_llama(input_ids=whole[None]).logits[0].double().log_softmax(-1)
        for position in range(len(prompt), len(whole)):
            total -= float(log_probs[position - 1, whole[position]])
            count += 1
    expected = total / count / (5 if hub_code_loss else 1)
    assert fused.method.objective("beta")(torch.zeros(3)) == pytest.approx(expected, rel=1e-5)  # type: ignore[operator]


def test_the_search_improves_repeats_and_changes_no_adapter(tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path, spoken: Any) -> None:
    found = []
    for _ in range(2):
        fused = fuse(tiny_llama, tiny_tokenizer, uniform_pool, spoken, leave_one_out=False, budget=60)
        checksum = fused.bank.checksum()
        prompts = PromptBatch.from_texts(["Mia", "two"], tiny_tokenizer, task_names=["beta", "gamma"])
        plan = fused.route(prompts)
        assert plan is not None
        assert fused.bank.checksum() == checksum
        found.append(plan.weights)
        for row, task in enumerate(("beta", "gamma")):
            loss = fused.method.objective(task)  # type: ignore[operator]
            better = loss(plan.weights[row]) + 0.05 * float(plan.weights[row].abs().mean())
            assert better < loss(torch.zeros(3)) - 0.01
        assert float(plan.weights.abs().max()) <= 1.5
    assert torch.equal(found[0], found[1])


def test_the_number_of_threads_changes_nothing() -> None:
    """On the embedded model, whose products are large enough to be divided among threads."""
    before = torch.get_num_threads()
    few_shot = lambda task, num: get_suite("nano").task(task).items("train", num)  # noqa: E731
    fused = FusedCausalLM.from_pretrained(None, method="lorahub_in_pool", few_shot=few_shot)
    found, losses = [], []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(fused.method.search("object_counting"))  # type: ignore[operator]
            losses.append(fused.method.objective("object_counting")(torch.full((26,), 0.1)))  # type: ignore[operator]
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
        fused.close()
    assert torch.equal(found[0], found[1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_leaving_one_out_leaves_out_exactly_that_one(tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, uniform_pool)
    prompts = PromptBatch.from_texts(["a", "b", "c", "d"], tiny_tokenizer, task_names=["alpha", "beta", "gamma", "beta"])
    plan = fused.route(prompts)
    assert plan is not None
    assert all(float(plan.weights[row, own]) == 0.0 for row, own in enumerate((0, 1, 2, 1)))
    assert torch.equal(plan.weights[1], plan.weights[3])
    seen: list[Tensor] = []
    objective = fused.method.objective  # type: ignore[union-attr]
    fused.method.objective = lambda task: lambda weights: seen.append(weights.clone()) or objective(task)(weights)  # type: ignore[union-attr, assignment]
    fused.method.search("beta")  # type: ignore[operator]
    tried = torch.stack(seen)
    assert bool((tried[:, 1] == 0).all())
    assert bool((tried[:, [0, 2]] != 0).any(0).all())


def test_budget_and_number_of_searches_are_reported(tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path) -> None:
    """And the budget is what the search takes: the objective is asked that often and not once more."""
    fused = fuse(tiny_llama, tiny_tokenizer, uniform_pool)
    assert dict(fused.method.reported) == {"search_budget": 40, "search_examples": 5, "searched_tasks": 0}  # type: ignore[union-attr]
    fused.route(PromptBatch.from_texts(["a", "b"], tiny_tokenizer, task_names=["beta", "beta"]))
    assert fused.method.reported["searched_tasks"] == 1  # type: ignore[union-attr]
    assert [LoRAHub(LoRAHubConfig()).budget(size) for size in (2, 8, 25, 26)] == [40, 40, 125, 130]
    asked: list[int] = []
    objective = fused.method.objective  # type: ignore[union-attr]
    fused.method.objective = lambda task: lambda weights: asked.append(1) or objective(task)(weights)  # type: ignore[union-attr, assignment]
    fused.method.search("gamma")  # type: ignore[operator]
    assert 0 < len(asked) <= 40


def test_what_it_cannot_do_is_said(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path, uniform_pool: Path) -> None:
    with pytest.raises(IncompatibleAdapterError, match=r"'lorahub'.*alpha 4, beta 6, gamma 2"):
        fuse(tiny_llama, tiny_tokenizer, tiny_pool)
    fused = fuse(tiny_llama, tiny_tokenizer, uniform_pool)
    with pytest.raises(MethodError, match=r"has no task 'betta'.*beta"):
        fused.route(PromptBatch.from_texts(["a"], tiny_tokenizer, task_names=["betta"]))
    with pytest.raises(MethodError, match="has no task None"):
        fused.route(PromptBatch.from_texts(["a"], tiny_tokenizer))
    without = fuse(tiny_llama, tiny_tokenizer, uniform_pool, few_shot=None)
    with pytest.raises(MethodError, match=r"needs 5 training examples per task, but no suite was given"):
        without.route(PromptBatch.from_texts(["a"], tiny_tokenizer, task_names=["beta"]))
    with pytest.raises(ConfigError, match="'num_examples'"):
        LoRAHubConfig(num_examples=0)


def test_nevergrads_branch_finds_a_minimum_and_keeps_to_its_budget() -> None:
    from dlplora.baselines.lorahub import _nevergrad

    seen: list[tuple[float, np.ndarray]] = []

    def value(point: np.ndarray) -> float:
        seen.append((float(((point - np.array([0.3, -0.2])) ** 2).sum()), point.copy()))
        return seen[-1][0]

    _nevergrad(value, 2, 1.5, 60, seed=0)
    assert len(seen) == 60
    assert all(np.abs(point).max() <= 1.5 for _, point in seen)
    assert min(score for score, _ in seen) < 0.01


def test_the_original_optimiser_searches_the_model_and_says_when_it_is_missing(
    tiny_llama: Any, tiny_tokenizer: Any, uniform_pool: Path, spoken: Any, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Both optimisers stay within bounds and budget and find what is better than the base; they are not the same search."""
    found = {}
    for optimizer in ("nevergrad", "cobyla"):
        hub = fuse(tiny_llama, tiny_tokenizer, uniform_pool, spoken, leave_one_out=False, optimizer=optimizer).method
        assert isinstance(hub, LoRAHub)
        found[optimizer] = hub.search("beta")
        assert torch.equal(hub.search("beta"), found[optimizer])
        assert hub.objective("beta")(found[optimizer]) < hub.objective("beta")(torch.zeros(3))
        assert found[optimizer].abs().max() <= 1.5
    assert not torch.equal(found["nevergrad"], found["cobyla"])
    assert not [str(warning.message) for warning in recwarn if "RHOEND" in str(warning.message)]
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(MethodError, match=r"'lorahub' needs the package nevergrad.*dlplora\[search\].*optimizer=cobyla"):
        fuse(tiny_llama, tiny_tokenizer, uniform_pool, spoken, optimizer="nevergrad")


def test_a_run_that_lacks_the_optimiser_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    folders = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    assert main(["reproduce", "nano", "--methods", "base,lorahub_in_pool_nevergrad", "--limit", "1", *folders]) == 2
    assert "needs the package nevergrad" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
