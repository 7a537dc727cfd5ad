"""Resume files of a training run: small, atomic, and read without unpickling code.

A resume file holds the trained tensors, the optimiser state and the loop counters; the frozen base model is loaded from its own files.
Trained experts and routers are exported as safetensors and JSON, never as resume files.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
from pathlib import Path
from typing import IO, Any, cast

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dlplora.atomic import replacing
from dlplora.errors import ConfigError

log = logging.getLogger(__name__)

SUFFIX = ".ckpt"
UNREADABLE = (OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError, ValueError)
"""What ``torch.load`` raises for a missing, truncated, foreign or unsafe file."""


class _KeepsError:
    """A file for ``torch.save``, whose zip writer ends with another error (``unexpected pos``) and hides that of a full disk."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._handle.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._handle.flush()


def write_checkpoint(checkpoint: Any, path: Path) -> None:
    """``torch.save`` to a file.

    Raises:
        OSError: If the file cannot be written, as any other file.
    """
    with path.open("wb") as handle:  # by handle: by name, the name would become part of the file
        kept = _KeepsError(handle)
        try:
            torch.save(checkpoint, cast("IO[bytes]", kept))
        except RuntimeError as error:
            if kept.error is None:
                raise
            raise kept.error from error


class AtomicCheckpointIO(CheckpointIO):
    """Write to a temporary name, flush to disk, read back, then rename; load with ``weights_only=True`` always."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None) -> None:
        """Write one resume file; after a crash at any moment the old file or the new one is there, whole."""
        with replacing(path) as temporary:
            write_checkpoint(checkpoint, temporary)
            torch.load(temporary, map_location="cpu", weights_only=True)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None, **_: Any
    ) -> dict[str, Any]:
        """Read one resume file.

        Raises:
            ConfigError: If it is missing, truncated, or holds anything but tensors and plain values.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"checkpoint not found: {path}. Pass an existing file, or 'last'.")
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except UNREADABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"cannot read checkpoint {path}: {reason} Delete it or resume from another one.") from error

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a resume file; a missing one is not an error."""
        Path(path).unlink(missing_ok=True)


def find_latest(folder: str | os.PathLike[str]) -> Path | None:
    """The readable checkpoint of a folder with the most steps, or None; damaged ones are skipped with a warning."""
    best: tuple[int, str, Path] | None = None
    for path in sorted(Path(folder).glob(f"*{SUFFIX}")):
        try:
            step = int(torch.load(path, map_location="cpu", weights_only=True)["global_step"])
        except (*UNREADABLE, TypeError) as error:
            log.warning("skipping unreadable checkpoint %s (%s)", path, type(error).__name__)
            continue
        if best is None or (step, path.name) > best[:2]:
            best = (step, path.name, path)
    return None if best is None else best[2]


class ResumableModule(L.LightningModule):
    """A Lightning module with checkpoints of the trained tensors only.

    The frozen rest is built again in ``configure_model``; loading checks that exactly the trained tensors are there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # the frozen tensors are absent by design; on_load_checkpoint checks the others
        self._earlier_metrics: dict[str, float] = {}

    def final_metrics(self) -> dict[str, float]:
        """The trainer's metrics; those of the resume file where this process has measured none, as after a kill before the export."""
        now = {key: round(float(value), 6) for key, value in self.trainer.callback_metrics.items()}
        return {**self._earlier_metrics, **now}

    def trained_names(self) -> tuple[str, ...]:
        """Names of the tensors a checkpoint holds."""
        return tuple(name for name, parameter in self.named_parameters() if parameter.requires_grad)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the frozen tensors; keep the metrics."""
        state = checkpoint["state_dict"]
        checkpoint["metrics"] = self.final_metrics()
        checkpoint["state_dict"] = {name: state[name] for name in self.trained_names()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another configuration.

        Raises:
            ConfigError: If its tensors are not the ones this run trains, or have other shapes.
        """
        self._earlier_metrics = dict(checkpoint.get("metrics") or {})
        saved = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        state = self.state_dict()
        expected = {name: tuple(state[name].shape) for name in self.trained_names()}
        if saved != expected:
            different = sorted(name for name in saved.keys() | expected.keys() if saved.get(name) != expected.get(name))
            raise ConfigError(
                f"the checkpoint holds {len(saved)} trained tensors, this run trains {len(expected)}; first difference: {different[0]} "
                f"(checkpoint {saved.get(different[0])}, run {expected.get(different[0])}). Resume with the configuration it was made with."
            )


class ResumeCheckpoint(L.Callback):
    """Write a resume file at regular optimizer steps, at the end, and when the process is asked to stop (SIGTERM).

    Args:
        every_n_steps: Optimizer steps between two files.
        folder: Where; None is ``checkpoints`` under the trainer's root folder.
        keep: Files kept; older ones are deleted only after a new one has been written and read back.
    """

    def __init__(self, every_n_steps: int = 200, folder: str | None = None, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ConfigError(f"checkpoints: 'every_n_steps' and 'keep' must be at least 1, got {every_n_steps} and {keep}.")
        self.every_n_steps = every_n_steps
        self.folder = folder
        self.keep = keep
        self._saved_step = -1
        self._due = self._ended = False

    def directory(self, trainer: L.Trainer) -> Path:
        """The folder of the files."""
        return Path(self.folder) if self.folder else Path(trainer.default_root_dir) / "checkpoints"

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save after every ``every_n_steps``-th optimizer step; after an epoch's last one wait for its validation.

        A run that is resumed after the last step of an epoch does not validate that epoch any more.
        """
        if trainer.global_step % self.every_n_steps == 0 and self._between_steps(trainer):
            self._due = bool(trainer.is_last_batch)
            if not self._due:
                self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after a validation that had to be awaited."""
        if self._due:
            self._due = False
            self._save(trainer)

    @staticmethod
    def _between_steps(trainer: L.Trainer) -> bool:
        """Whether no gradient waits for the rest of its optimizer step; a resume file does not hold gradients."""
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return batches % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the finished run, so that it can be validated and tested later."""
        self._ended = True
        self._save(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish a run that was stopped after its last step and before its export: Lightning finds nothing left to train and ends it."""
        if not self._ended and trainer.fit_loop.done and trainer.global_step > 0:
            pl_module.on_train_end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save when asked to stop: Lightning raises this one between two batches, where the state is whole."""
        if isinstance(exception, SIGTERMException) and self._between_steps(trainer):
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        if step == self._saved_step or step == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = self.directory(trainer)
        trainer.save_checkpoint(folder / f"step={step:08d}{SUFFIX}")
        self._saved_step = step
        if trainer.is_global_zero:
            for old in sorted(folder.glob(f"step=*{SUFFIX}"))[: -self.keep]:
                old.unlink()


def planned_steps(trainer: L.Trainer) -> int:
    """Optimizer steps of the whole run, for schedules.

    ``trainer.estimated_stepping_batches`` would set up the loader before a resume file has been read, and Lightning then never
    tells the loader its position: a resumed run would begin again with the first batch.
    """
    batches = len(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    planned = steps * trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else trainer.max_steps
    return planned if trainer.max_steps == -1 else min(planned, trainer.max_steps)
