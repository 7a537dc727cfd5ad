"""Progress of a training: steps, rate, time left and the last loss, as a bar or as lines."""

from __future__ import annotations

from typing import Any

import lightning as L

from dlplora.progress import Progress


class TrainingProgress(L.Callback):
    """Shows batches of the whole run; after each validation the averaged metrics on a line of their own."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to count, from where a resume file left off."""
        if not trainer.is_global_zero:
            return
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self._progress = Progress("fit", _total(trainer), unit="batch", plural="batches", done=done)
        self._progress.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One more batch."""
        if self._progress is None:
            return
        self._progress.update()
        loss = trainer.callback_metrics.get("train_loss")
        if loss is not None:
            self._progress.note = f"train_loss {float(loss):.4f}"

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The metrics averaged over tasks."""
        if self._progress is None or trainer.sanity_checking:
            return
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val_") and "/" not in key}
        if values:
            self._progress.say("  ".join(f"{key} {value:.4f}" for key, value in values.items()))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how long it took."""
        self._close(finished=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal to the error message."""
        self._close(finished=False)

    def _close(self, *, finished: bool) -> None:
        if self._progress is not None:
            self._progress.close(finished=finished)
            self._progress = None


def _total(trainer: L.Trainer) -> int | None:
    """Batches of the whole run; None if neither their number nor that of the epochs is known."""
    per_epoch, epochs = trainer.num_training_batches, trainer.max_epochs
    known = per_epoch != float("inf") and epochs is not None and epochs > 0
    counts = [int(per_epoch) * epochs] if known and epochs is not None else []
    if trainer.max_steps > 0:
        counts.append(trainer.max_steps * trainer.accumulate_grad_batches)
    return min(counts, default=None)
