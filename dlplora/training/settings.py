"""Settings of adapters and their optimisation, shared by single experts, pools of experts and fusion methods."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlplora.errors import ConfigError
from dlplora.modules.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Shape of an adapter; the names are PEFT's, except ``rank`` for ``r``."""

    rank: int = 8
    """Rank of the update."""
    lora_alpha: int = 16
    """Numerator of the scaling: alpha / rank, or alpha / sqrt(rank) with ``use_rslora``."""
    lora_dropout: float = 0.1
    """Dropout on the adapter's input, in training only."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Last part of the names of the adapted linear layers."""
    use_rslora: bool = False
    """Rank-stabilised scaling."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train. Adapters of a pool must have ``none``: biases of several adapters cannot be fused."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.lora_alpha <= 0:
            raise ConfigError(f"lora: 'rank' and 'lora_alpha' must be positive, got {self.rank} and {self.lora_alpha}.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora: 'lora_dropout' must be in [0, 1), got {self.lora_dropout}.")
        if not self.target_modules:
            raise ConfigError("lora: 'target_modules' is empty; name at least one linear layer, for instance q_proj.")

    @property
    def scaling(self) -> float:
        """Factor of B @ A."""
        return self.lora_alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    def peft_config(self, base_model_name: str | None = None) -> Any:
        """The same as a ``peft.LoraConfig`` for causal language models."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=list(self.target_modules),
            use_rslora=self.use_rslora,
            bias=self.bias,
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_model_name,
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW with linear warm-up, a constant phase, and linear decay to zero."""

    lr: float = 5e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Moments; 0.98 rather than 0.999 because adapters train for hundreds of steps, not hundreds of thousands."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 20
    """Steps until the peak; 0 starts at it. Short trainings reach it when the rate begins to fall, or after a quarter of their steps."""
    decay_fraction: float = 0.6
    """Share of all steps, at the end, over which the rate falls to zero; 0 keeps it constant."""

    def __post_init__(self) -> None:
        if not 0.0 < self.lr < math.inf or self.warmup_steps < 0 or not 0.0 <= self.decay_fraction <= 1.0:
            raise ConfigError(
                f"optimizer: needs lr > 0, warmup_steps >= 0 and decay_fraction in [0, 1], got {self.lr}, {self.warmup_steps}, "
                f"{self.decay_fraction}."
            )
        if not all(0.0 <= beta < 1.0 for beta in self.betas) or not 0.0 <= self.weight_decay < math.inf:
            raise ConfigError(f"optimizer: needs betas in [0, 1) and weight_decay >= 0, got {self.betas} and {self.weight_decay}.")

    def rate_factor(self, step: int, total_steps: int) -> float:
        """Learning rate of a step (from 0) as a fraction of the peak.

        Examples:
            >>> [OptimizerSettings(warmup_steps=2, decay_fraction=0.5).rate_factor(s, 8) for s in range(8)]
            [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        most = max(1, total_steps // 4, round((1.0 - self.decay_fraction) * total_steps))
        warm = min(1.0, (step + 1) / min(self.warmup_steps, most)) if self.warmup_steps else 1.0
        fall = min(1.0, (total_steps - step) / (self.decay_fraction * total_steps)) if self.decay_fraction else 1.0
        return warm * max(0.0, fall)

    def build(self, parameters: Iterable[nn.Parameter], total_steps: int, period: int | None = None) -> dict[str, Any]:
        """Optimizer and per-step schedule in the form Lightning takes.

        Args:
            parameters: What trains.
            total_steps: Steps the schedule spans.
            period: Number of steps after which the schedule restarts (None: never).
        """
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.rate_factor(step % period if period else step, total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@contextmanager
def step_rng(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Random numbers inside depend on seed, step and process only; the generators outside are left as they were.

    Dropout masks thus need not be saved to resume a run exactly.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed("step", seed, step, rank))
        yield


def initial_lora_a(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A fresh A (R, I) as PEFT draws it: uniform within 1 / sqrt(I) (Kaiming uniform with a = sqrt(5)); B starts at zero.

    Source: PEFT 0.21, ``LoraLayer.reset_lora_parameters``.
    """
    tensor = torch.empty(shape, device="cpu", dtype=torch.float32)
    nn.init.kaiming_uniform_(tensor, a=5**0.5, generator=generator)
    return tensor


def expert_generator(seed: int, name: str) -> torch.Generator:
    """The generator of one expert's initial weights: the same whether it trains alone or among others."""
    return torch.Generator(device="cpu").manual_seed(derive_seed("lora", seed, name))


def is_logged(trainer: Any, batch_idx: int) -> bool:
    """Whether Lightning's ``trainer`` logs this batch; with ``log_every_n_steps`` 0 it never does, as in Lightning."""
    every: int = trainer.log_every_n_steps
    return every > 0 and (batch_idx + 1) % every == 0
