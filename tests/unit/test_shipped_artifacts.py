"""What is shipped belongs to the code beside it, and training tokens are counted right."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dlplora.data.datamodule import ExpertDataModule, ExpertPoolDataModule, FusionDataModule, RouterDataModule
from dlplora.evaluation.trained_parts import training_tokens
from dlplora.inference.loading import nano_asset
from dlplora.methods.registry import available_presets, build_method
from dlplora.reproduce import artifacts
from dlplora.reproduce.pipeline import roles_of
from dlplora.reproduce.recipe import ROUTERS
from dlplora.training.frozen import load_tokenizer

ROLES = [role for role in roles_of(sorted(available_presets())) if role not in ROUTERS]  # cheap to train


@pytest.mark.parametrize("role", ROLES)
def test_every_artifact_of_seed_0_is_shipped(role: str, tmp_path: Path) -> None:
    assert artifacts.locate(role, tmp_path, fresh=False).source == "shipped"
    assert json.loads((nano_asset(role) / "training.json").read_text())["training_tokens"] > 0


def test_trained_gates_saw_equal_numbers_of_tokens() -> None:
    gates = [name for name in available_presets() if "trained" in build_method(name).artifact_roles]
    tokens = {name: training_tokens({"trained": nano_asset(f"trained/{name}")}, ["trained"]) for name in gates}
    assert len(gates) >= 8
    assert len(set(tokens.values())) == 1, tokens
    assert training_tokens({}, []) == 0
    assert training_tokens({}, ["trained"]) is None


@pytest.mark.parametrize("kind", [ExpertDataModule, FusionDataModule, ExpertPoolDataModule, RouterDataModule])
def test_training_tokens_are_those_of_the_batches(kind: Any) -> None:
    sizes = {"num_train": 12, "num_validation": 2, "num_test": 2, "batch_size": 4}
    if kind is not RouterDataModule:
        sizes |= {"num_steps": 5}
    module = kind(tasks="shelf_sorting,table_to_text", seed=3, **sizes)
    shell = SimpleNamespace(tokenizer=load_tokenizer(None), groups=[["shelf_sorting"], ["table_to_text"]])
    module.trainer = SimpleNamespace(lightning_module=shell, world_size=1, global_rank=0, current_epoch=0)
    module.setup("fit")
    batches = list(module.train_dataloader())
    seen = [int(batch["attention_mask"].sum()) for batch in batches]
    assert module.training_tokens(len(batches)) == sum(seen)
    assert module.training_tokens(3) == sum(seen[:3])


def test_the_smallest_difference_is_said_before_a_run() -> None:
    from dlplora.evaluation.protocol import load_protocol
    from dlplora.evaluation.runner import power_note, prepare
    from dlplora.reporting.statistics import detectable_difference

    whole = power_note(prepare(load_protocol("nano"), "nano", "base", 0))
    assert "of 2600 questions" in whole
    assert f"{100 * detectable_difference(2600, 0.1):.1f} points" in whole
    assert power_note(prepare(load_protocol("nano"), "nano", "base", 0, limit=2)).startswith("too few")
