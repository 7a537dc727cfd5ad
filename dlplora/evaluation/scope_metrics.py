"""How well a score separates prompts of known tasks from other prompts, and right answers from wrong ones. Shapes: n, m, k prompts.

AUROC and the ROC curve come from torchmetrics. It applies a sigmoid to scores outside [0, 1], which makes large ones equal, so it is given
their ranks; ranks do not change the metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlplora.errors import ConfigError


def _ranks(scores: Tensor) -> Tensor:
    """Ranks of scores (k,) in (0, 1], float64; equal scores have equal ranks."""
    values, places = torch.unique(scores, return_inverse=True)
    return (places.double() + 1.0) / len(values)


def detection(in_scope: Tensor, out_of_scope: Tensor, tpr: float = 0.95) -> dict[str, float]:
    """``auroc``, and ``fpr``: the share of out-of-scope prompts kept by the largest threshold that keeps ``tpr`` of the in-scope ones.

    Args:
        in_scope: Scores (n,), larger where a prompt looks known.
        out_of_scope: Scores (m,).
        tpr: Share of the in-scope prompts to keep.

    Raises:
        ConfigError: If one of the classes has no prompts, or a score is not a number.
    """
    from torchmetrics.functional.classification import binary_auroc, binary_roc

    for scores, what in ((in_scope, "in-scope"), (out_of_scope, "out-of-scope")):
        if len(scores) == 0:
            raise ConfigError(f"AUROC needs both classes, and there are no {what} prompts.")
        _require_numbers(scores)
    ranks = _ranks(torch.cat([in_scope.double(), out_of_scope.double()]))
    truth = torch.cat([torch.ones(len(in_scope)), torch.zeros(len(out_of_scope))]).long()
    false, true, _ = binary_roc(ranks, truth)
    return {"auroc": float(binary_auroc(ranks, truth)), "fpr": float(false[true >= tpr - 1e-6].min())}


def risk_coverage(scores: Tensor, right: Tensor, coverages: Sequence[float] = (0.5, 0.8, 0.9, 1.0)) -> dict[str, Any]:
    """Accuracy of the most confident prompts, at given coverages and over all of them.

    Args:
        scores: (k,), larger where the method is surer.
        right: Whether each prompt was routed right, bool (k,).
        coverages: Shares of the prompts that are answered.

    Returns:
        ``aurc``: the mean over all coverages 1/k … k/k of the share of wrong ones among the most confident (Geifman et al.,
        arXiv:1805.08206);
        ``accuracy``: coverage -> accuracy. Equal scores share their mean, so no order among them matters.

    Raises:
        ConfigError: If there are no prompts, or a score is not a number.
    """
    if len(scores) == 0:
        raise ConfigError("risk against coverage needs prompts, and there are none.")
    _require_numbers(scores)
    _, groups, counts = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    wrong = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, groups, (~right.bool()).double()) / counts
    risks = wrong[groups.sort(descending=True).values].cumsum(0) / torch.arange(1, len(scores) + 1)
    at = {f"{share:g}": float(1.0 - risks[max(round(share * len(scores)), 1) - 1]) for share in coverages}
    return {"aurc": float(risks.mean()), "accuracy": at}


def _require_numbers(scores: Tensor) -> None:
    if bool(scores.isnan().any()):
        raise ConfigError("a score is not a number (NaN); the method's features or weights are damaged.")
