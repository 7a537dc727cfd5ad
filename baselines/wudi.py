"""WUDI: the delta that interferes least with every adapter on its own inputs (WUDI-Merging, arXiv:2503.08099).

``dW = argmin sum_e ||(dW - w_e dW_e) dW_e^T||^2 / ||dW_e||^2``: the rows of a task's delta represent the inputs of its task, so no data is
needed. This is linear least squares. With ``H = sum_e dW_e^T dW_e / n_e``, ``C = sum_e w_e dW_e dW_e^T dW_e / n_e`` and
``n_e = ||dW_e||^2`` (Frobenius), the gradient is ``2 (dW H - C)``, and the minimum nearest to zero is ``C H^+``.

* ``wudi``: that minimum, in core space (``core_space.CoreSpace``); its bases contain the range of H and C.
* ``wudi_adam``: what the released code does: 300 steps of Adam at a learning rate of 1e-5 from ``sum_e w_e dW_e``. An entry moves by about
  0.003 at most, so for overlapping deltas it ends near its start and far from the minimum. Adam depends on coordinates, so it runs on
  whole matrices: O I^2 a step.

Deviations: an expert that does not adapt a module is left out there (it would divide by zero). The gradient is the closed
form's, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlplora.errors import ConfigError
from dlplora.methods.base import Metadata
from dlplora.modules.lora_bank import BankEntry

from .core_space import CoreSpace
from .merges import StaticMerge, deltas_of, factored
from .singular_vectors import SingularConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class WudiAdamConfig(SingularConfig):
    """The released code's optimiser."""

    steps: int = 300
    """Steps of Adam."""
    learning_rate: float = 1e-5
    """Its learning rate."""

    def __post_init__(self) -> None:
        SingularConfig.__post_init__(self)
        if self.steps < 1 or self.learning_rate <= 0:
            raise ConfigError(f"'steps' must be at least 1 and 'learning_rate' positive, got {self.steps} and {self.learning_rate}.")


def normal_equations(deltas: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """H (I, I) and C (O, I) of the objective, for deltas (E, O, I) and their weights (E,)."""
    sizes = deltas.square().sum(dim=(1, 2))
    taking_part = sizes > 0
    deltas, scale, weights = deltas[taking_part], sizes[taking_part].rsqrt(), weights[taking_part]
    grams = (scale[:, None, None] * deltas).mT @ (scale[:, None, None] * deltas)
    return grams.sum(0), ((weights[:, None, None] * deltas) @ grams).sum(0)


class Wudi(StaticMerge):
    """The minimum in closed form."""

    name = "wudi"
    metadata = Metadata(title="WUDI", paper="https://arxiv.org/abs/2503.08099", granularity="none", exempt=("T3",))
    Config = SingularConfig

    def factors(self, entry: BankEntry, weights: Tensor, names: Sequence[str], module: str, rank: int | None) -> tuple[Tensor, Tensor]:
        """A and B of ``C H^+``."""
        space = CoreSpace.of(entry)
        h, c = normal_equations(space.cores, weights.to(space.cores))
        return space.factors(c @ torch.linalg.pinv(h, hermitian=True), rank)


class WudiAdam(StaticMerge):
    """A few steps of Adam towards the minimum, as released."""

    name = "wudi_adam"
    metadata = Metadata(title="WUDI, 300 steps", paper="https://arxiv.org/abs/2503.08099", granularity="none", exempt=("T3", "T12"))
    Config = WudiAdamConfig

    def factors(self, entry: BankEntry, weights: Tensor, names: Sequence[str], module: str, rank: int | None) -> tuple[Tensor, Tensor]:
        """A and B of Adam's last point."""
        deltas = deltas_of(entry).double()
        weights = weights.to(deltas)
        h, c = normal_equations(deltas, weights)
        merged = torch.einsum("e,eoi->oi", weights, deltas).requires_grad_()
        optimizer = torch.optim.Adam([merged], lr=self.config.learning_rate, foreach=False)
        for _ in range(self.config.steps):
            merged.grad = 2.0 * (merged.detach() @ h - c)
            optimizer.step()
        return factored(merged.detach(), rank)
