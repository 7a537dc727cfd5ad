"""Train the router: a LightningModule around ``MiniMLPRouter``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from dlplora.errors import ConfigError
from dlplora.modules.precision import float32_by_default
from dlplora.modules.router import MiniMLPRouter, RouterConfig
from dlplora.training.checkpoints import ResumableModule, planned_steps
from dlplora.training.frozen import load_frozen, load_tokenizer
from dlplora.training.settings import OptimizerSettings, derive_seed, is_logged, step_rng


class LitRouter(ResumableModule):
    """Cross-entropy on the task of a prompt; the best epoch on validation wins and is calibrated there.

    Training prompts are perturbed: every prompt loses some tokens and has others replaced by random ones, at rates drawn for it
    between zero and the given ones. Training has few wordings per task; without noise the router memorises them, and a single
    unknown token can change its decision.

    Args:
        backbone: Base model with the tokenizer and input embeddings that the router reads; None is the embedded nano base model.
        router: Shape of the router.
        token_drop: Largest share of a prompt's tokens that is left out in training.
        token_noise: Largest share of a prompt's tokens that is replaced by random tokens in training.
        optimizer: AdamW.
        seed: Of the initial weights and of dropout; None as for ``LitExpert``.
        export_folder: The router's folder (``router.safetensors``, ``router.json``), written when training ends.
        dtype: Precision the base model is loaded in.
    """

    def __init__(
        self,
        backbone: str | None = None,
        router: RouterConfig = RouterConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerSettings = OptimizerSettings(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01),  # noqa: B008
        seed: int | None = None,
        export_folder: str | None = None,
        dtype: str = "float32",
        token_drop: float = 0.5,
        token_noise: float = 0.3,
    ) -> None:
        super().__init__()
        if not (0.0 <= token_drop < 1.0 and 0.0 <= token_noise < 1.0):
            raise ConfigError(f"router: token_drop and token_noise must be in [0, 1), got {token_drop} and {token_noise}.")
        self.token_drop, self.token_noise = token_drop, token_noise
        self.backbone = backbone
        self.router_config = router
        self.optimizer_settings = optimizer
        self.seed = 0 if seed is None else seed
        self.export_folder = export_folder
        self.backbone_dtype = dtype
        self.router: Any = None
        self.loss_metric = MeanMetric()
        self.accuracy_metric = MeanMetric()
        self._best: dict[str, Any] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return load_tokenizer(self.backbone)

    @property
    def datamodule(self) -> Any:
        """The data module of the run."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Build the router over the base model's embeddings, with seeded initial weights; the rest of the base model is freed."""
        if self.router is not None:
            return
        embedding = None
        if self.router_config.variant == "backbone":
            embedding = load_frozen(self.backbone, self.backbone_dtype).get_input_embeddings()
        with torch.random.fork_rng(devices=[]), float32_by_default():
            torch.manual_seed(derive_seed("router", self.seed))
            self.router = MiniMLPRouter(self.datamodule.task_names, self.router_config, embedding=embedding)

    def trained_names(self) -> tuple[str, ...]:
        """The router's tensors, its temperature included."""
        return tuple(f"router.{name}" for name in self.router.state_dict())

    def configure_optimizers(self) -> Any:
        """AdamW on the router."""
        return self.optimizer_settings.build(self.router.parameters(), planned_steps(self.trainer))

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (B, E) before the temperature."""
        return self.router(batch["input_ids"], batch["attention_mask"])

    def disturbed(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The batch with tokens left out and replaced; the first token of a prompt always stays."""
        ids, mask = batch["input_ids"], batch["attention_mask"] != 0
        movable = mask & (mask.long().cumsum(dim=1) > 1)
        with float32_by_default():
            rate = torch.rand(2, len(ids), 1, device=ids.device)
            dropped = movable & (torch.rand(ids.shape, device=ids.device) < rate[0] * self.token_drop)
            replaced = movable & (torch.rand(ids.shape, device=ids.device) < rate[1] * self.token_noise)
        random_ids = torch.randint(len(self.tokenizer), ids.shape, device=ids.device)
        return {"input_ids": torch.where(replaced, random_ids, ids), "attention_mask": mask & ~dropped, "labels": batch["labels"]}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean cross-entropy of one batch, by its share of the optimiser step."""
        step = self.current_epoch * int(self.trainer.num_training_batches) + batch_idx
        with step_rng(self.seed, step, self.global_rank, self.device):
            loss = F.cross_entropy(self.logits(self.disturbed(batch)), batch["labels"]) * batch["row_share"]
        if is_logged(self.trainer, batch_idx):
            self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def _evaluate(self, batch: dict[str, Any]) -> None:
        if not len(batch["labels"]):
            return
        logits = self.logits(batch)
        self.loss_metric.update(F.cross_entropy(logits, batch["labels"], reduction="none"))
        self.accuracy_metric.update((logits.argmax(dim=-1) == batch["labels"]).float())

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count loss and accuracy."""
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count loss and accuracy on the held-out phrasing."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss`` and ``val_accuracy``; keep the weights of the best epoch."""
        loss = self._log_metrics("val_")
        if self.trainer.sanity_checking or self.trainer.state.fn != "fit":  # `trainer.training` is False while validating
            return
        if not self._best or loss < self._best["loss"]:
            weights = {name: tensor.detach().clone() for name, tensor in self.router.state_dict().items()}
            self._best = {"loss": loss, "epoch": self.current_epoch, "weights": weights}

    def on_test_epoch_end(self) -> None:
        """Log ``test_loss`` and ``test_accuracy``."""
        self._log_metrics("test_")

    def _log_metrics(self, prefix: str) -> float:
        loss, accuracy = float(self.loss_metric.compute()), float(self.accuracy_metric.compute())
        self.loss_metric.reset()
        self.accuracy_metric.reset()
        self.log_dict({prefix + "loss": loss, prefix + "accuracy": accuracy}, prog_bar=True, rank_zero_only=False)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the best epoch so far with the rest."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["router_best"] = self._best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the best epoch so far."""
        super().on_load_checkpoint(checkpoint)
        self._best = checkpoint["router_best"]

    def on_train_end(self) -> None:
        """Go back to the best epoch, calibrate on validation, measure, and export from the first process."""
        if self._best:
            self.router.load_state_dict(self._best["weights"])
        self.router.eval()
        # Undisturbed validation prompts may all be right, and the best temperature would then be the smallest one allowed.
        with step_rng(self.seed, 0, 0, torch.device("cpu")):
            self.router.calibrate(*self._all_logits("validation", disturb=True))
        if not self.export_folder or not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        metrics: dict[str, Any] = {"best_epoch": self._best.get("epoch"), "steps": self.trainer.global_step, "seed": self.seed}
        for split in ("validation", "test"):
            logits, labels = self._all_logits(split)
            metrics |= {f"{split}_{key}": value for key, value in self._quality(logits, labels).items()}
        data = self.datamodule.hparams
        metrics["data"] = {key: data[key] for key in ("suite", "num_train", "num_validation", "num_test", "batch_size")}
        if data.get("wrapper_noise"):
            metrics["data"]["wrapper_noise"] = data["wrapper_noise"]
        # last, as in the shipped file: an equal router then has an equal checksum, and its finished runs are recognised
        metrics["training_tokens"] = self.datamodule.training_tokens(self.datamodule.batches_trained())
        self.router.save(self.export_folder, metrics)

    @torch.no_grad()
    def _all_logits(self, split: str, disturb: bool = False) -> tuple[Tensor, Tensor]:
        ids, mask, labels = self.datamodule.tensors(split)
        if disturb:
            changed = self.disturbed({"input_ids": ids, "attention_mask": mask, "labels": labels})
            ids, mask = changed["input_ids"], changed["attention_mask"]
        chunks = [self.router(ids[i : i + 512].to(self.device), mask[i : i + 512].to(self.device)) for i in range(0, len(ids), 512)]
        logits = torch.cat(chunks).cpu()
        if not torch.isfinite(logits).all():
            raise ConfigError(f"the router's logits on {split} are not finite: the training diverged. Lower the learning rate.")
        return logits, labels

    def _quality(self, logits: Tensor, labels: Tensor) -> dict[str, Any]:
        """Accuracy, that of the worst task, calibrated loss and expected calibration error of one split."""
        right = (logits.argmax(dim=-1) == labels).double()
        probabilities = (logits.double() / float(self.router.temperature)).softmax(dim=-1)
        per_task = {name: float(right[labels == label].mean()) for label, name in enumerate(self.router.names)}
        worst = min(per_task, key=lambda name: per_task[name])
        return {
            "accuracy": round(float(right.mean()), 6),
            "n": len(labels),
            "worst_task": worst,
            "worst_task_accuracy": round(per_task[worst], 6),
            "nll": round(float(F.nll_loss(probabilities.clamp_min(1e-12).log(), labels)), 6),
            "calibration_error": round(expected_calibration_error(probabilities, labels), 6),
        }


def expected_calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence, weighted by their counts.

    Args:
        probabilities: (n, E).
        labels: (n,).
        num_bins: Bins over 0-1.

    Source: Guo et al., arXiv:1706.04599, equation 3.
    """
    confidence, predicted = probabilities.max(dim=-1)
    right = (predicted == labels).to(confidence.dtype)
    bins = (confidence * num_bins).long().clamp(max=num_bins - 1)
    gap = torch.zeros(num_bins, dtype=confidence.dtype).index_add_(0, bins, right - confidence)
    return float(gap.abs().sum() / len(labels))
