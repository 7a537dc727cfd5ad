"""The common part of the Lightning modules for a single adapter and for a pool of adapters."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlplora.atomic import write_json
from dlplora.errors import ConfigError
from dlplora.modules.precision import keeping_trained_precision
from dlplora.training.adapter_export import EXPORT_DTYPES
from dlplora.training.answer_loss import AnswerMetrics, weighted_loss
from dlplora.training.checkpoints import ResumableModule
from dlplora.training.frozen import DTYPES, base_name_of, load_tokenizer
from dlplora.training.recomputation import keep_recomputing
from dlplora.training.settings import LoRASettings, OptimizerSettings, is_logged, step_rng


class AdapterModule(ResumableModule):
    """Trains low-rank adapters on answer tokens over a frozen base model. See the subclasses for the arguments."""

    def __init__(
        self,
        backbone: str | None,
        lora: LoRASettings,
        optimizer: OptimizerSettings,
        seed: int | None,
        export_folder: str | None,
        export_dtype: str,
        base_model_name: str | None,
        dtype: str,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        for name, value, known in (("export_dtype", export_dtype, EXPORT_DTYPES), ("dtype", dtype, DTYPES)):
            if value not in known:
                raise ConfigError(f"model: '{name}' must be one of {', '.join(known)}, got {value!r}.")
        self.backbone = backbone
        self.lora = lora
        self.optimizer_settings = optimizer
        self.seed = 0 if seed is None else seed
        self.export_folder = export_folder
        self.export_dtype = export_dtype
        self.base_model_name = base_name_of(backbone, base_model_name)
        self.backbone_dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self._recomputed: list[Any] = []
        self.metrics: AnswerMetrics | None = None
        self.plain_head = True
        self._started = 0.0
        self._first_step = 0

    def _apply(self, fn: Any, recurse: bool = True) -> AdapterModule:
        """The trainer's precision is the base model's; adapters are trained in float32 at least."""
        return super()._apply(keeping_trained_precision(fn), recurse)

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return load_tokenizer(self.backbone)

    @property
    def datamodule(self) -> Any:
        """The data module of the run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        """Make the metrics of the tasks in the data."""
        if self.metrics is None:
            self.metrics = AnswerMetrics(self.datamodule.task_names)

    @abstractmethod
    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (S, V) at the supervised positions of a training batch."""

    @abstractmethod
    def evaluation_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (S, V) of a validation or test batch, which holds rows of the one task ``batch["task"]``."""

    @abstractmethod
    def export(self) -> list[Path]:
        """Write the adapters; returns their folders."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Weighted cross-entropy of one batch; logged every ``log_every_n_steps`` steps only, since logging costs time."""
        step = self.current_epoch * int(self.trainer.num_training_batches) + batch_idx
        keep_recomputing(self._recomputed)
        if self.lora.lora_dropout > 0:
            with step_rng(self.seed, step, self.global_rank, self.device):
                logits = self.logits(batch)
        else:
            logits = self.logits(batch)
        loss = weighted_loss(logits, batch)
        if is_logged(self.trainer, batch_idx):
            self.log("train_loss", self.logged_loss(loss.detach(), batch), prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def logged_loss(self, loss: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The number shown for a training loss."""
        return loss

    def _evaluate(self, batch: dict[str, Any]) -> None:
        assert self.metrics is not None
        if batch["task"] is None:
            return
        self.metrics.update(batch["task"], self.evaluation_logits(batch), batch["targets"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count loss and accuracy."""
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count loss and accuracy on the held-out phrasing."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss``, ``val_perplexity``, ``val_accuracy`` and ``val_accuracy/<task>``."""
        self._log_metrics("val_")

    def on_test_epoch_end(self) -> None:
        """Log the same with the prefix ``test_``."""
        self._log_metrics("test_")

    def _log_metrics(self, prefix: str) -> None:
        assert self.metrics is not None
        self.log_dict({prefix + key: value for key, value in self.metrics.compute().items()}, rank_zero_only=True)

    def on_train_start(self) -> None:
        """Note time and step."""
        self._started = time.perf_counter()
        self._first_step = self.trainer.global_step

    def on_train_end(self) -> None:
        """Export the finished adapters from the first process; an interrupted run exports nothing.

        Resuming a finished run does not change its exports.
        """
        if not self.export_folder or not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.trainer.global_step > self._first_step or not Path(self.export_folder, "training.json").is_file():
            self.export()

    def describe_run(self, folder: Path) -> None:
        """Write ``training.json``: what was trained, on what, for how long, and the last validation metrics."""
        metrics = self.final_metrics()
        description = {
            "module": type(self).__name__,
            "backbone": self.base_model_name,
            "lora": asdict(self.lora),
            "optimizer": asdict(self.optimizer_settings),
            "data": dict(self.datamodule.hparams),
            "seed": self.seed,
            "steps": self.trainer.global_step,
            "training_tokens": self.datamodule.training_tokens(self.datamodule.batches_trained()),
            "num_truncated": self.datamodule.num_truncated("train"),
            "metrics": metrics,
            "train_s": round(time.perf_counter() - self._started, 2),
            "torch": torch.__version__,
        }
        write_json(folder / "training.json", description)
