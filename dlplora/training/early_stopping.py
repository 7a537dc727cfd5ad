"""Stop a training by its validation loss, keep the best tensors, and write a note if it ends with an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from dlplora.atomic import write_json
from dlplora.errors import ConfigError, DLPLoRAError, NotFiniteError
from dlplora.training.settings import is_logged

FAILURE = "failure.json"
"""Note in the trainer's root folder: ``reason`` and whether the training ``diverged``."""


class KeepBest(EarlyStopping):
    """Ends a training when its validation loss no longer falls, and exports the tensors with the lowest loss.

    A loss that is NaN or infinite, in training or validation, ends it with an error. The best tensors are part of the resume files.

    Args:
        monitor: Logged metric; lower is better.
        patience: Validations without an improvement until the end.
        min_delta: Smaller improvements do not count.
    """

    def __init__(self, monitor: str = "val_loss", patience: int = 3, min_delta: float = 0.0) -> None:
        if patience < 1:
            raise ConfigError(f"early stopping: 'patience' must be at least 1, got {patience}.")
        super().__init__(
            monitor=monitor, patience=patience, min_delta=min_delta, mode="min", check_finite=False, check_on_train_epoch_end=False
        )
        self._best: dict[str, Tensor] = {}
        self._ended = False

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check the training loss when it is logged; the check waits for the device.

        Raises:
            NotFiniteError: If it is NaN or infinite.
        """
        if is_logged(trainer, batch_idx):
            _require_finite(trainer, "train_loss")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decide, and keep the tensors of a new best.

        Raises:
            NotFiniteError: If the validation loss is NaN or infinite.
        """
        if trainer.sanity_checking:
            return
        _require_finite(trainer, self.monitor)
        before = self.best_score.clone()
        super().on_validation_end(trainer, pl_module)
        if not self._best or bool(self.best_score < before):
            self._best = {name: tensor.detach().cpu().clone() for name, tensor in pl_module.named_parameters() if tensor.requires_grad}

    @torch.no_grad()
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the best tensors back; the module exports after this."""
        self._ended = True
        for name, tensor in pl_module.named_parameters():
            if name in self._best:
                tensor.copy_(self._best[name])

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the best tensors of a run that was stopped after its last step: Lightning trains nothing then and ends it."""
        if not self._ended and trainer.fit_loop.done and self._best:
            self.on_train_end(trainer, pl_module)
            pl_module.on_train_end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write the reason for the process that started this one."""
        if isinstance(exception, DLPLoRAError) and trainer.is_global_zero:
            note = {"reason": " ".join(str(exception).split()), "diverged": isinstance(exception, NotFiniteError)}
            write_json(Path(trainer.default_root_dir) / FAILURE, note)

    def state_dict(self) -> dict[str, Any]:
        """Adds the best tensors."""
        return {**super().state_dict(), "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As written by ``state_dict``."""
        self._best = dict(state_dict["best"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "best"})


def _require_finite(trainer: L.Trainer, name: str) -> None:
    value = trainer.callback_metrics.get(name)
    if value is not None and not bool(torch.isfinite(value)):
        raise NotFiniteError(f"{name} is {float(value)} at step {trainer.global_step}: the training diverged. Lower the learning rate.")
