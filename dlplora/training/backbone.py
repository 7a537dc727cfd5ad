"""Pretrain a small base model: a Llama on the nano documents, or on the text of a suite's training rows."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from dlplora.atomic import save_tokenizer, tensors_written_to
from dlplora.training.checkpoints import planned_steps
from dlplora.training.muon import MuonWithAdamW


class LitBackbone(L.LightningModule):
    """Weighted next-token training of a ``LlamaForCausalLM`` with tied embeddings; exports a Hugging Face folder at the end.

    Args:
        hidden_size, intermediate_size, num_layers, num_heads: Size of the model.
        max_positions: ``max_position_embeddings``.
        lr: Muon learning rate of the hidden matrices.
        adam_lr: AdamW learning rate of embeddings and norms.
        warmup_steps: Linear warm-up.
        decay_fraction: Share of the steps, at the end, over which the rate falls linearly to zero.
        export_folder: Where the finished model, tokenizer, recipe and loss curve go; None exports nothing.
        config: What the recipe names as the configuration of the run.
    """

    def __init__(
        self,
        hidden_size: int = 128,
        intermediate_size: int = 352,
        num_layers: int = 4,
        num_heads: int = 4,
        max_positions: int = 512,
        lr: float = 0.02,
        adam_lr: float = 3e-3,
        warmup_steps: int = 100,
        decay_fraction: float = 0.4,
        export_folder: str | None = None,
        config: str = "configs/train/nano_backbone.yaml",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: Any = None
        self.validation_loss = MeanMetric()
        self._curve: list[dict[str, float]] = []

    def configure_model(self) -> None:
        """Build the model once the tokenizer is known."""
        if self.model is not None:
            return
        from transformers import LlamaConfig, LlamaForCausalLM

        h = self.hparams
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=h["hidden_size"],
            intermediate_size=h["intermediate_size"],
            num_hidden_layers=h["num_layers"],
            num_attention_heads=h["num_heads"],
            num_key_value_heads=h["num_heads"],
            max_position_embeddings=h["max_positions"],
            tie_word_embeddings=True,
            initializer_range=0.05,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        self.model = LlamaForCausalLM(config)

    def _losses(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Cross-entropy (B, T-1) and loss weights (B, T-1) of one batch of blocks."""
        ids, weights = batch[0].long(), batch[1]
        hidden = self.model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden).flatten(0, 1)
        losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        return losses.view(ids.shape[0], -1), weights[:, 1:]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Weighted mean cross-entropy."""
        losses, weights = self._losses(batch)
        loss = (losses * weights).sum() / weights.sum()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Cross-entropy on predictable tokens only."""
        losses, weights = self._losses(batch)
        predictable = weights > 0.99
        self.validation_loss.update(losses[predictable])

    def on_validation_epoch_end(self) -> None:
        """Log the mean and keep it for the loss curve."""
        value = self.validation_loss.compute()
        self.validation_loss.reset()
        self.log("val_loss", value, prog_bar=True)
        if not self.trainer.sanity_checking:
            self._curve.append({"step": self.global_step, "val_loss": round(float(value), 4)})

    def configure_optimizers(self) -> Any:
        """Muon on matrices inside the layers, AdamW on the rest; warm-up, constant, linear decay."""
        h = self.hparams
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "layers" in n]
        others = [p for n, p in self.model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
        optimizer = MuonWithAdamW(matrices, others, lr=h["lr"], adam_lr=h["adam_lr"])
        total = planned_steps(self.trainer)

        def scale(step: int) -> float:
            return min(1.0, (step + 1) / h["warmup_steps"]) * min(1.0, (total - step) / max(1.0, h["decay_fraction"] * total))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the loss curve across an interruption."""
        checkpoint["curve"] = self._curve

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the loss curve."""
        self._curve = checkpoint["curve"]

    def on_fit_end(self) -> None:
        """Export the finished model; an interrupted run exports nothing."""
        if self.hparams["export_folder"] and self.trainer.is_global_zero and not self.trainer.interrupted:
            self.export(Path(self.hparams["export_folder"]))

    def export(self, folder: Path) -> None:
        """Write model (float16 safetensors), tokenizer, recipe with checksum, and loss curve."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        folder.mkdir(parents=True, exist_ok=True)
        with tensors_written_to(folder):
            self.model.to(torch.float16).save_pretrained(folder)
        save_tokenizer(datamodule.tokenizer, folder)
        recipe = {
            "config": self.hparams["config"],
            "model": {k: v for k, v in self.hparams.items() if k not in {"export_folder", "config"}},
            "data": dict(datamodule.hparams),
            "steps": self.global_step,
            "tokens": self.global_step * datamodule.hparams["batch_size"] * datamodule.hparams["block_size"],
            "torch": torch.__version__,
            "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        }
        (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
        with (folder / "loss_curve.csv").open("w", newline="") as handle:
            writer = csv.DictWriter(handle, fieldnames=["step", "val_loss"])
            writer.writeheader()
            writer.writerows(self._curve)
