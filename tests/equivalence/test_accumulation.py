"""Accumulated gradients are the gradient of the large batch: for experts, pools, routers and gates, against a plain loop over all rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlplora.data.datamodule import ExpertDataModule, ExpertPoolDataModule, FusionDataModule, RouterDataModule
from dlplora.tasks.registry import get_suite
from dlplora.training.expert import LitExpert
from dlplora.training.expert_pool import LitExpertPool
from dlplora.training.fusion import LitFusion
from dlplora.training.router import LitRouter
from dlplora.training.settings import LoRASettings, OptimizerSettings, expert_generator, initial_lora_a

TASKS = ("alpha", "beta")
SPLITS = [(8, 1), (4, 2), (2, 4)]
"""Rows a batch, batches a step."""
LORA = LoRASettings(lora_dropout=0.0)
FLAT = OptimizerSettings(lr=1e-3, warmup_steps=0, decay_fraction=0.0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of 1 and of 25 words in turn."""
    root = tmp_path_factory.mktemp("rows")
    for offset, name in enumerate(TASKS):
        (root / name).mkdir()
        for split in ("train", "test"):
            with (root / name / f"{split}.jsonl").open("w") as handle:
                for index in range(32):
                    long = (index + offset) % 2
                    answer = " ".join(["the", "cat", "sees", "a", "plum"] * 5) if long else "yes"
                    handle.write(json.dumps({"question": f"{'a b ' * (index % 5)}who {index} ?", "answer": answer}) + "\n")
    return root


class FirstGradient(L.Callback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.found:
            named = pl_module.named_parameters()
            self.found = {name: one.grad.clone().double() for name, one in named if one.grad is not None}


def first_gradient(
    module: L.LightningModule, data: L.LightningDataModule, accumulate: int, root: Path, **options: Any
) -> dict[str, Tensor]:
    watch = FirstGradient()
    settings = {"max_steps": 1, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    settings |= {"limit_val_batches": 0, "enable_model_summary": False, "accelerator": "cpu", "devices": 1, "max_epochs": 1}
    trainer = L.Trainer(callbacks=[watch], accumulate_grad_batches=accumulate, default_root_dir=root, **{**settings, **options})
    trainer.fit(module, datamodule=data)
    return watch.found


def distance(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert set(found) == set(truth)
    assert truth
    length = torch.stack([one.norm() for one in truth.values()]).norm()
    return float(torch.stack([(found[name] - one).norm() for name, one in truth.items()]).norm() / length)


def plain_gradient(backbone: Path, root: Path, task: str, dtype: torch.dtype, plan: Any) -> dict[str, Tensor]:
    """PEFT's layers and transformers' own loss over all rows of the step in one batch."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    ).eval()
    generator = expert_generator(0, task)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(initial_lora_a((parameter.shape[0], parameter.shape[1]), generator))
    model.to(dtype)
    items = get_suite(f"local:{task}", str(root)).task(task).items("train", 3000, 0)
    ids, labels = [], []
    for _, index in plan:
        item = items[index]
        prompt = tokenizer(item.prompt)["input_ids"]
        whole = tokenizer(f"{item.prompt} {item.answer}")["input_ids"] + [tokenizer.eos_token_id]
        ids.append(whole)
        labels.append([-100] * len(prompt) + whole[len(prompt) :])
    width = max(map(len, ids))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    targets = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
    model(input_ids=batch, attention_mask=mask, labels=targets).loss.backward()
    gradients = [(name, one.grad) for name, one in model.named_parameters()]
    return {name: one.double() for name, one in gradients if one is not None}


def data_of(cls: Any, root: Path, batch: int, accumulate: int, tasks: str = "alpha", **options: Any) -> Any:
    return cls(suite=f"local:{tasks}", data_root=str(root), batch_size=batch, num_steps=4 * accumulate, length_group=1, **options)


@pytest.mark.parametrize(("batch", "accumulate"), SPLITS)
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_an_expert(precision: Any, batch: int, accumulate: int, tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    data = data_of(ExpertDataModule, rows, batch, accumulate)
    module = LitExpert(backbone=str(tiny_llama_folder), lora=LORA, optimizer=FLAT)
    found = first_gradient(module, data, accumulate, tmp_path, precision=precision)
    plan = [row for step in range(accumulate) for row in data.schedule(["alpha"]).batch(step)]
    assert len(plan) == 8
    dtype = {"32-true": torch.float32, "64-true": torch.float64}[precision]
    truth = plain_gradient(tiny_llama_folder, rows, "alpha", dtype, plan)
    assert distance({name.removeprefix("model."): one for name, one in found.items()}, truth) < 1e-5


@pytest.mark.parametrize(("batch", "accumulate"), SPLITS)
@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_a_pool(mode: Any, batch: int, accumulate: int, tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    data = data_of(ExpertPoolDataModule, rows, batch, accumulate, ",".join(TASKS))
    module = LitExpertPool(backbone=str(tiny_llama_folder), lora=LORA, optimizer=FLAT, mode=mode)
    found = first_gradient(module, data, accumulate, tmp_path)
    for place, name in enumerate(module.groups[0]):
        plan = [row for step in range(accumulate) for row in data.schedule([name]).batch(step)]
        truth = plain_gradient(tiny_llama_folder, rows, name, torch.float32, plan)
        assert module.patch is not None
        mine = {}
        for index, path in enumerate(module.patch.module_names):
            for side in ("A", "B"):
                key = f"base_model.model.{path}.lora_{side}.default.weight"
                mine[key] = found[f"experts.0.lora_{side.lower()}.{index}"][place]
        assert distance(mine, truth) < 1e-5


def test_the_last_step_of_an_expert_is_shorter(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    """Three batches where a step has room for four, because the epoch or ``limit_train_batches`` ends there; and what the step counts."""
    for num_steps, limit in ((3, 1.0), (8, 3)):
        data = ExpertDataModule(suite="local:alpha", data_root=str(rows), batch_size=2, num_steps=num_steps, length_group=1)
        module = LitExpert(backbone=str(tiny_llama_folder), lora=LORA, optimizer=FLAT)
        found = first_gradient(module, data, 4, tmp_path, limit_train_batches=limit)
        plan = [row for step in range(3) for row in data.schedule(["alpha"]).batch(step)]
        truth = plain_gradient(tiny_llama_folder, rows, "alpha", torch.float32, plan)
        assert distance({name.removeprefix("model."): one for name, one in found.items()}, truth) < 1e-5
        assert data.batches_trained() == 3


def test_batches_of_several_epochs(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    """Two epochs of five batches, four batches a step: four steps of ten batches, not of sixteen."""
    data = ExpertDataModule(suite="local:alpha", data_root=str(rows), batch_size=2, num_steps=5, length_group=1)
    module = LitExpert(backbone=str(tiny_llama_folder), lora=LORA, optimizer=FLAT)
    first_gradient(module, data, 4, tmp_path, max_steps=-1, max_epochs=2)
    assert (module.trainer.global_step, data.batches_trained()) == (4, 10)


def same_for_all_splits(run: Callable[[int, int], dict[str, Tensor]]) -> None:
    large = run(8, 1)
    for batch, accumulate in SPLITS[1:]:
        assert distance(run(batch, accumulate), large) < 1e-5


def test_a_router(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    """Against the mean cross-entropy of the rows of one epoch's first steps, and in the shorter last step of an epoch."""

    def run(batch: int, accumulate: int, **options: Any) -> tuple[dict[str, Tensor], LitRouter, Any]:
        data = RouterDataModule(suite="local:alpha,beta", data_root=str(rows), num_train=11, num_validation=4, num_test=4, batch_size=batch)
        module = LitRouter(backbone=str(tiny_llama_folder), optimizer=FLAT, token_drop=0.0, token_noise=0.0)
        module.on_train_end = lambda: None  # type: ignore[method-assign]
        return first_gradient(module, data, accumulate, tmp_path, **options), module, data

    def truth(module: LitRouter, data: Any, steps: int) -> dict[str, Tensor]:
        again = LitRouter(backbone=str(tiny_llama_folder), optimizer=FLAT)
        again._trainer = module._trainer
        again.configure_model()
        again.router.eval()
        ids, mask, labels = data.tensors("train")
        chosen = torch.tensor([row for step in range(steps) for row in data._rows_of_step()(step)])
        torch.nn.functional.cross_entropy(again.router(ids[chosen], mask[chosen]), labels[chosen]).backward()
        return {f"router.{name}": one.grad.double() for name, one in again.router.named_parameters() if one.grad is not None}

    for batch, accumulate in SPLITS:
        found, module, data = run(batch, accumulate)
        assert distance(found, truth(module, data, accumulate)) < 1e-5
    found, module, data = run(4, 4, limit_train_batches=3)  # three batches, where a step has room for four
    assert distance(found, truth(module, data, 3)) < 1e-5


@pytest.mark.parametrize("method", ["meteora_gate", "mole", "phatgoose", "lora_flow", "xlora_frozen", "xlora"])
def test_gates(method: str, tiny_llama_folder: Path, rows: Path, make_adapter: Any, tmp_path: Path) -> None:
    for seed, name in enumerate(TASKS):
        make_adapter(tmp_path / "pool" / name, seed=seed)

    def run(batch: int, accumulate: int) -> dict[str, Tensor]:
        data = data_of(FusionDataModule, rows, batch, accumulate, ",".join(TASKS))
        module = LitFusion(method=method, pretrained=str(tiny_llama_folder), pool=str(tmp_path / "pool"), optimizer=FLAT)
        return first_gradient(module, data, accumulate, tmp_path)

    same_for_all_splits(run)


def test_the_last_step_of_gates_is_shorter(tiny_llama_folder: Path, rows: Path, make_adapter: Any, tmp_path: Path) -> None:
    for seed, name in enumerate(TASKS):
        make_adapter(tmp_path / "pool" / name, seed=seed)

    def run(batch: int, accumulate: int, num_steps: int) -> dict[str, Tensor]:
        options = {"batch_size": batch, "num_steps": num_steps, "length_group": 1}
        data = FusionDataModule(suite=f"local:{','.join(TASKS)}", data_root=str(rows), **options)
        module = LitFusion(method="mole", pretrained=str(tiny_llama_folder), pool=str(tmp_path / "pool"), optimizer=FLAT)
        return first_gradient(module, data, accumulate, tmp_path)

    assert distance(run(2, 4, 3), run(6, 1, 1)) < 1e-5
