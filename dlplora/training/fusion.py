"""Train a fusion method: a LightningModule around ``FusionMethod.loss``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlplora.atomic import write_json
from dlplora.errors import MethodError
from dlplora.modules.precision import float32_by_default
from dlplora.training.answer_loss import AnswerMetrics, answer_logits, has_plain_head, weighted_loss
from dlplora.training.checkpoints import ResumableModule, planned_steps
from dlplora.training.settings import OptimizerSettings, is_logged, step_rng
from dlplora.types import PromptBatch


class LitFusion(ResumableModule):
    """Trains the parameters of one fusion method; base model and experts stay as they are.

    The method's ``loss`` receives a mapping with

    * ``prompts``: the contexts as a ``PromptBatch`` with the task names of the training rows;
    * ``expert_idx``: index of each row's own expert in the bank, int64 (B,);
    * ``input_ids``, ``attention_mask``, ``labels``: whole sequences (B, T), right-padded, -100 where there is no target;
    * ``row_share``, ``token_share``: factors for means over the batch's rows or real tokens, so that accumulated batches and processes
      add up to the mean over the whole optimiser step; 1 without either;
    * ``answer_loss``: ``answer_loss(weights)`` runs the fused model under routing weights (E,), (B, E) or (B, T, E) and returns
      the mean cross-entropy of the answer tokens; ``answer_loss(None)`` when gates inside the layers decide;
    * ``model``: the ``FusedCausalLM``.

    Args:
        method: Name of the method or path of its YAML file.
        method_params: Overrides of the method's parameters.
        pretrained, pool, multitask, router, names: As for ``FusedCausalLM.from_pretrained``; None means the embedded assets.
        optimizer: AdamW and its schedule.
        seed: Of dropout, where a method has any; None as for ``LitExpert``.
        export_folder: Where ``method.save`` writes when training ends.
        dtype: Precision of the base model.
    """

    def __init__(
        self,
        method: str,
        method_params: dict[str, Any] | None = None,
        pretrained: str | None = None,
        pool: str | None = None,
        router: str | None = None,
        multitask: str | None = None,
        names: list[str] | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(lr=1e-3, betas=(0.9, 0.999)),  # noqa: B008 (frozen)
        seed: int | None = None,
        export_folder: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.method_name = method
        self.optimizer_settings = optimizer
        self.seed = 0 if seed is None else seed
        self.export_folder = export_folder
        self._options: dict[str, Any] = {
            "pretrained": pretrained, "pool": pool, "method": method, "router": router, "multitask": multitask,
            "method_params": method_params, "names": names, "dtype": dtype,
        }  # fmt: skip
        self.fused: Any = None
        self.method: nn.Module | None = None
        self.metrics: AnswerMetrics | None = None
        self.plain_head = True
        self._step_statistics: Any = None

    def build(self) -> Any:
        """The fused model on the trainer's device (the CPU without one), with a backend that passes gradients to the routing weights."""
        from dlplora.inference.fused_model import FusedCausalLM

        device = self._trainer.strategy.root_device if self._trainer is not None else "cpu"
        with float32_by_default():  # gates are initialised and trained in float32, also if the trainer casts the base model
            return FusedCausalLM.from_pretrained(**self._options, device=device, backend="dense", untrained=True)

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return self._fused().tokenizer

    def _fused(self) -> Any:
        """The fused model, built on first use: the data module asks for the tokenizer before the model is configured."""
        if self.fused is None:
            self.fused = self.build()
            self.fused.requires_grad_(False)
            self.method = self.fused.method
            self.method.requires_grad_(True)
        return self.fused

    def setup(self, stage: str) -> None:
        """Make the metrics; check that the bank has an expert for every task of the data.

        Raises:
            MethodError: If a task has no expert.
        """
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.metrics is None:
            self.metrics = AnswerMetrics(datamodule.task_names)
        missing = [name for name in datamodule.task_names if name not in self._fused().bank.names]
        if missing:
            raise MethodError(
                f"tasks without an expert in the pool: {', '.join(missing)}. Train them first or leave them out of data.init_args.tasks."
            )

    def configure_model(self) -> None:
        """Build the fused model, freeze all but the method, and check that something trains.

        Raises:
            MethodError: If the method has no parameters.
        """
        if not any(parameter.requires_grad for parameter in self._fused().parameters()):
            raise MethodError(f"method '{self.method_name}' has no trained parameters; there is nothing to fit.")

    def configure_optimizers(self) -> Any:
        """AdamW on the method's parameters."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return self.optimizer_settings.build(parameters, planned_steps(self.trainer))

    def on_fit_start(self) -> None:
        """Find out once how the logits are made."""
        with self.fused.routing(torch.zeros(self.fused.bank.num_experts, device=self.device)):
            self.plain_head = has_plain_head(self.fused.model)

    def method_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the method's ``loss`` receives, made from a batch of ``FusionDataModule``."""
        names = batch["task_names"]
        index = {name: position for position, name in enumerate(self.fused.bank.names)}
        return {
            "prompts": PromptBatch(batch["prompt_ids"], batch["prompt_mask"], tuple(batch["prompt_texts"]), tuple(names)),
            "expert_idx": torch.tensor([index[name] for name in names], device=self.device),
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": batch["labels"],
            "row_share": batch.get("row_share", 1.0),
            "token_share": batch.get("token_share", 1.0),
            "answer_loss": lambda weights: weighted_loss(self.routed_logits(batch, weights), batch),
            "model": self.fused,
        }

    def routed_logits(self, batch: Mapping[str, Any], weights: Tensor | None) -> Tensor:
        """Logits (S, V) at the supervised positions under routing weights, or under the method's gates."""
        if weights is None:
            return answer_logits(self.fused.model, batch, self.plain_head)
        with self.fused.routing(weights):
            return answer_logits(self.fused.model, batch, self.plain_head)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The method's own loss."""
        own = self.method_batch(batch) | self._of_the_whole_step(batch, batch_idx)
        step = self.current_epoch * int(self.trainer.num_training_batches) + batch_idx
        with step_rng(self.seed, step, self.global_rank, self.device), float32_by_default():
            loss = self.fused.method.loss(own)
        if is_logged(self.trainer, batch_idx):
            self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    @torch.no_grad()
    def _of_the_whole_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """``step_statistics`` for a step of several parts, found out at its first batch by running all of them."""
        if batch["num_parts"] == 1:
            return {}
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            found = []
            for rows in batch["step_batches"]():
                part = self.trainer.strategy.batch_to_device(rows, self.device)
                statistics = self.fused.method.step_statistics(self.method_batch(part))
                if statistics is None:
                    break
                found.append(statistics)
            total = torch.stack(found).sum(dim=0) / batch["num_parts"] if found else None
            self._step_statistics = None if total is None else self.trainer.strategy.reduce(total, reduce_op="sum")
        return {} if self._step_statistics is None else {"step_statistics": self._step_statistics}

    def _evaluate(self, batch: dict[str, Any]) -> None:
        """Route by the prompts alone, as in evaluation, and score the answers."""
        assert self.metrics is not None
        if batch["task"] is None:
            return
        prompts = self.method_batch(batch)["prompts"]
        if "task_id" not in self.fused.method.metadata.needs:
            prompts = prompts.without_task_names()
        with float32_by_default():
            logits = self.routed_logits(batch, self.fused.method.route(prompts))
        self.metrics.update(batch["task"], logits, batch["targets"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count loss and accuracy."""
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count loss and accuracy on the held-out phrasing."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss``, ``val_perplexity``, ``val_accuracy`` and ``val_accuracy/<task>``."""
        assert self.metrics is not None
        self.log_dict({f"val_{key}": value for key, value in self.metrics.compute().items()}, rank_zero_only=True)

    def on_test_epoch_end(self) -> None:
        """Log the same with the prefix ``test_``."""
        assert self.metrics is not None
        self.log_dict({f"test_{key}": value for key, value in self.metrics.compute().items()}, rank_zero_only=True)

    def on_train_end(self) -> None:
        """Write the method's folder, and ``training.json`` beside it, from the first process."""
        if not self.export_folder or not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.fused.method.save(self.export_folder)
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        description = {
            "module": type(self).__name__,
            "method": self.method_name,
            "optimizer": asdict(self.optimizer_settings),
            "data": dict(datamodule.hparams),
            "seed": self.seed,
            "steps": self.trainer.global_step,
            "training_tokens": datamodule.training_tokens(datamodule.batches_trained()),
            "metrics": self.final_metrics(),
        }
        write_json(Path(self.export_folder) / "training.json", description)
