"""What a run's routing looked like: counters of plans, and the figures that go into a record.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dlplora.inference.generation import kept_experts

Question = tuple[str, int]
"""lm-eval's name of a task, and the index of a question in it."""
COUNTERS = ("plans", "preferring", "judged", "right", "kept", "entropy_nats", "several", "reroutes", "truncated")


class RoutingStatistics:
    """Sums over the distinct prompts of a run; sums of several processes add up.

    A prompt is judged right when the expert of largest weight is the one trained on its task; prompts of tasks that no
    expert was trained on are not judged, and a plan of zeros names no expert. A method none of whose plans prefers an expert
    (no adapter, an average) does not route, and has no accuracy.

    Args:
        expert_names: Expert index to name, which is the name of the task it was trained on.

    Attributes:
        routes: Of every question (characters generated so far, experts kept), for the prompt and every re-route; of this process.
    """

    def __init__(self, expert_names: Sequence[str]) -> None:
        self.expert_names = tuple(expert_names)
        self.sums: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        self.routes: dict[Question, list[tuple[int, dict[str, float]]]] = {}

    def add_route(self, question: Question, weights: Tensor | None) -> None:
        """Note the plan (E,) of one question's prompt, once; nothing where gates decide."""
        if weights is not None and question not in self.routes:
            self.routes[question] = [(0, kept_experts(weights, self.expert_names))]

    def add_plan(self, weights: Tensor, task: str | None) -> None:
        """Count one plan.

        Args:
            weights: Routing weights of one prompt, (E,).
            task: Name of the prompt's task, if known.
        """
        values = weights.detach().to("cpu", torch.float64)
        kept = int((values != 0).sum())
        self.sums["plans"] += 1
        self.sums["kept"] += kept
        self.sums["several"] += kept > 1
        self.sums["entropy_nats"] += _entropy_nats(values)
        best = int(values.argmax())
        self.sums["preferring"] += int((values == values[best]).sum()) == 1
        if task in self.expert_names:
            self.sums["judged"] += 1
            self.sums["right"] += bool(values[best] > 0) and self.expert_names[best] == task

    def count(self, name: str, by: int = 1) -> None:
        """Raise one of ``COUNTERS``."""
        self.sums[name] += by

    def as_tensor(self, device: torch.device) -> Tensor:
        """The sums as one vector, so that processes can add theirs up."""
        return torch.tensor([self.sums[name] for name in COUNTERS], dtype=torch.float64, device=device)


def summarize(sums: Mapping[str, float]) -> dict[str, float | int | None]:
    """Means over plans, as recorded; None where nothing was measured.

    Returns:
        ``router_accuracy``, ``mean_experts_kept``, ``mean_entropy_nats``, ``fraction_multi`` (plans with more than one expert),
        ``num_plans`` (distinct prompts), ``num_reroutes`` (sentence ends that led to a new plan), ``num_truncated_prompts``.
    """
    plans, judged = sums["plans"], sums["judged"]
    return {
        "router_accuracy": sums["right"] / judged if judged and sums["preferring"] else None,
        "mean_experts_kept": sums["kept"] / plans if plans else None,
        "mean_entropy_nats": sums["entropy_nats"] / plans if plans else None,
        "fraction_multi": sums["several"] / plans if plans else None,
        "num_plans": int(plans),
        "num_reroutes": int(sums["reroutes"]),
        "num_truncated_prompts": int(sums["truncated"]),
    }


def _entropy_nats(weights: Tensor) -> float:
    """Entropy of |weights| / sum |weights|; 0 if all are zero."""
    size = weights.abs()
    total = size.sum()
    return float(torch.special.entr(size / total).sum()) if total > 0 else 0.0
