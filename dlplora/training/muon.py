"""Muon for hidden matrices and AdamW for all other parameters, in one optimiser and in float32.

Muon orthogonalises the momentum of a matrix by five Newton-Schulz steps (Jordan et al., 2024, "Muon: an optimizer for hidden layers in
neural networks"). ``torch.optim.Muon`` iterates in bfloat16, which is two orders of magnitude slower on CPUs without bfloat16 units. This
one keeps the parameter's dtype and batches equal shapes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of each (..., M, N) matrix towards 1 by Newton-Schulz iteration."""
    a, b, c = _COEFFICIENTS
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on ``matrices``, AdamW without weight decay on ``others``; one ``step`` for both.

    Args:
        matrices: 2-D hidden weights.
        others: Embeddings, norms, biases.
        lr: Muon learning rate; the update is scaled by sqrt(max(1, rows / columns)).
        adam_lr: AdamW learning rate.
        momentum: Nesterov momentum of Muon.
        weight_decay: Decoupled decay of the matrices.
        betas: AdamW moments.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        *,
        lr: float = 0.02,
        adam_lr: float = 3e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "muon": True, "lr": lr},
            {"params": list(others), "muon": False, "lr": adam_lr},
        ]
        super().__init__(groups, {"momentum": momentum, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of all groups; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._muon_step if group["muon"] else self._adam_step)(group)
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for shape, parameters in by_shape.items():
            updates = []
            for parameter in parameters:
                assert parameter.grad is not None
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                updates.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
            scale = group["lr"] * max(1.0, shape[-2] / shape[-1]) ** 0.5
            for parameter, update in zip(parameters, orthogonalize(torch.stack(updates)), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _adam_step(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = 0
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
            mean = state["exp_avg"] / (1 - beta1 ** state["step"])
            root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(1e-8)
            parameter.addcdiv_(mean, root, value=-group["lr"])
