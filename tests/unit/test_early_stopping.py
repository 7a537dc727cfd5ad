"""The best tensors are exported, a loss that is no number ends the training, and the token cap bounds an epoch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from dlplora.data.datamodule import FusionDataModule
from dlplora.errors import ConfigError, NotFiniteError
from dlplora.training.early_stopping import FAILURE, KeepBest
from tests.toy_tasks import NAMES, write_tasks


class Scripted(L.LightningModule):
    """The weight counts the steps; validation losses are those of a list."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.losses = losses
        self.exported: float | None = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return -self.weight  # SGD with rate 1 adds one a step

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.losses.pop(0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def on_train_end(self) -> None:
        self.exported = float(self.weight.detach())


def fit(losses: list[float], folder: Path, **options: Any) -> tuple[Scripted, L.Trainer]:
    module = Scripted(losses)
    loaders = [torch.utils.data.DataLoader(torch.zeros(size, 1)) for size in (8, 1)]  # type: ignore[arg-type]
    trainer = L.Trainer(
        max_epochs=1, val_check_interval=0.25, callbacks=[KeepBest(**options)], default_root_dir=folder, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, *loaders)
    return module, trainer


def test_the_tensors_of_the_lowest_validation_loss_are_exported(tmp_path: Path) -> None:
    module, trainer = fit([3.0, 1.0, 2.0, 2.5], tmp_path, patience=3)  # after 2, 4, 6 and 8 steps
    assert module.exported == 4
    assert trainer.global_step == 8
    module, trainer = fit([1.0, 2.0, 3.0, 0.5], tmp_path, patience=2)
    assert module.exported == 2
    assert trainer.global_step == 6
    assert not (tmp_path / FAILURE).exists()


def test_a_loss_that_is_no_number_ends_it_with_a_note(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="val_loss is nan at step 4"):
        fit([1.0, math.nan, 1.0, 1.0], tmp_path)
    note = json.loads((tmp_path / FAILURE).read_text())
    assert note["diverged"] is True
    assert "Lower the learning rate" in note["reason"]


def test_the_best_tensors_survive_a_resume_file() -> None:
    first, second = KeepBest(), KeepBest()
    first._best = {"weight": torch.tensor(4.0)}
    second.load_state_dict(first.state_dict())
    assert second._best == first._best


def test_an_epoch_ends_before_the_token_cap(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = str(write_tasks(tmp_path))

    def module(most: int | None) -> FusionDataModule:
        made = FusionDataModule(suite=f"local:{','.join(NAMES)}", data_root=rows, num_steps=20, batch_size=4, max_tokens=most)
        made.trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=tiny_tokenizer), world_size=1, current_epoch=0)  # type: ignore[assignment]
        made.setup("fit")
        return made

    whole = module(None)
    assert len(whole.train_dataloader()) == 20
    spent = [whole.training_tokens(steps) for steps in range(1, 21)]
    assert len(module(spent[6]).train_dataloader()) == 7
    assert len(module(spent[6] - 1).train_dataloader()) == 6
    assert len(module(spent[-1] + 1).train_dataloader()) == 20
    with pytest.raises(ConfigError, match="the first batch alone"):
        module(spent[0] - 1).train_dataloader()
    with pytest.raises(ConfigError, match="'max_tokens' must be at least 1"):
        module(0)
