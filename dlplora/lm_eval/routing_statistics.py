"""Routing statistics of a run: counters over prompts and gates, and the figures in the record.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dlplora.inference.generation import kept_experts

Question = tuple[str, int]
"""lm-eval's name of a task, and the index of a question in it."""
COUNTERS = (
    "routed", "gated", "preferring", "judged", "right", "kept", "entropy_nats", "several", "massed", "own_share", "reroutes", "truncated",
)  # fmt: skip


class RoutingStatistics:
    """Sums over the distinct prompts of a run; sums of several processes add up.

    A prompt is judged right when the expert of largest weight is the one trained on its task; prompts of tasks that no
    expert was trained on are not judged, and weights of zero name no expert. A method with weights that never prefer an expert
    (no adapter, an average) does not route and has no accuracy. Where gates decide, a prompt's weights are their means over its
    tokens and all gates; experts kept, entropy and the share with several experts are means over the same.

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
        """Note the routing weights (E,) of one question's prompt, once; nothing where gates decide."""
        if weights is not None and question not in self.routes:
            self.routes[question] = [(0, kept_experts(weights, self.expert_names))]

    def add_weights(self, weights: Tensor, task: str | None) -> None:
        """Count the weights of one prompt.

        Args:
            weights: Routing weights of one prompt, (E,).
            task: Name of the prompt's task, if known.
        """
        values = weights.detach().to("cpu", torch.float64)
        kept = int((values != 0).sum())
        self.sums["routed"] += 1
        self._add(values, values.abs(), task, kept=kept, several=kept > 1, entropy_nats=_entropy_nats(values))

    def add_gates(self, weights: Tensor, sizes: Tensor, task: str | None, *, kept: float, several: float, entropy_nats: float) -> None:
        """Count what the gates decided on one prompt; all figures are means over its tokens and the gates.

        Args:
            weights: Routing weights (E,). sizes: Their absolute values (E,), averaged after taking them.
            task: Name of the prompt's task, if known.
            kept: Weights that are not zero. several: Share with more than one of those. entropy_nats: Entropy.
        """
        self.sums["gated"] += 1
        self._add(weights, sizes, task, kept=kept, several=several, entropy_nats=entropy_nats)

    def _add(self, values: Tensor, sizes: Tensor, task: str | None, *, kept: float, several: float, entropy_nats: float) -> None:
        self.sums["kept"] += kept
        self.sums["several"] += several
        self.sums["entropy_nats"] += entropy_nats
        best = int(values.argmax())
        self.sums["preferring"] += int((values == values[best]).sum()) == 1
        if task in self.expert_names:
            self.sums["judged"] += 1
            self.sums["right"] += bool(values[best] > 0) and self.expert_names[best] == task
            total = float(sizes.sum())
            if total > 0:
                self.sums["massed"] += 1
                self.sums["own_share"] += float(sizes[self.expert_names.index(task)]) / total

    def count(self, name: str, by: int = 1) -> None:
        """Raise one of ``COUNTERS``."""
        self.sums[name] += by

    def as_tensor(self, device: torch.device) -> Tensor:
        """The sums as one vector, so that processes can add theirs up."""
        return torch.tensor([self.sums[name] for name in COUNTERS], dtype=torch.float64, device=device)


def summarize(sums: Mapping[str, float]) -> dict[str, float | int | None]:
    """Means over distinct prompts, as recorded; None where nothing was measured.

    Returns:
        ``router_accuracy``, ``mean_experts_kept``, ``mean_entropy_nats``, ``fraction_multi`` (prompts, or tokens and gates, with more than
        one expert), ``own_expert_share`` (of the absolute weights, what the expert of the prompt's task has), ``num_plans`` (prompts with
        routing weights), ``num_gated_prompts`` (prompts that gates decided on), ``num_reroutes`` (sentence ends that led to new
        routing weights), ``num_truncated_prompts``.
    """
    prompts, judged = sums["routed"] + sums["gated"], sums["judged"]
    return {
        "router_accuracy": sums["right"] / judged if judged and sums["preferring"] else None,
        "mean_experts_kept": sums["kept"] / prompts if prompts else None,
        "mean_entropy_nats": sums["entropy_nats"] / prompts if prompts else None,
        "fraction_multi": sums["several"] / prompts if prompts else None,
        "own_expert_share": sums["own_share"] / sums["massed"] if sums["massed"] else None,
        "num_plans": int(sums["routed"]),
        "num_gated_prompts": int(sums["gated"]),
        "num_reroutes": int(sums["reroutes"]),
        "num_truncated_prompts": int(sums["truncated"]),
    }


def _entropy_nats(weights: Tensor) -> float:
    """Entropy of |weights| / sum |weights|; 0 if all are zero."""
    size = weights.abs()
    total = size.sum()
    return float(torch.special.entr(size / total).sum()) if total > 0 else 0.0
