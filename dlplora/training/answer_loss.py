"""Cross-entropy on answer tokens; the vocabulary projection is computed only at supervised positions.

A prompt of thirty tokens may have two answer tokens. Projecting all positions onto the vocabulary would cost more than the rest of a small
model. Shapes: B rows, T tokens, S supervised tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchmetrics import MeanMetric, SumMetric

SHORT_ROWS = 160
"""Tokens up to which plain attention trains faster in 16 bits on a CPU than torch's fused kernel."""


def causal_lm(model: Any) -> Any:
    """The Hugging Face causal LM inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Whether the logits are ``lm_head(last hidden state)`` and nothing else, found out by running four tokens.

    Some families scale or cap their logits afterwards; a list of names would be wrong for the next one.
    """
    model = causal_lm(model)
    head = model.get_output_embeddings()
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    whole = model(input_ids=ids, use_cache=False).logits
    direct = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    return whole.shape == direct.shape and torch.allclose(whole.float(), direct.float(), rtol=1e-4, atol=1e-5)


def answer_logits(model: Any, batch: Mapping[str, Any], plain_head: bool) -> Tensor:
    """Logits (S, V) at the supervised positions of a batch from ``collate``.

    Args:
        model: Causal LM, possibly wrapped by PEFT, possibly with fused layers.
        batch: ``input_ids`` (B, T), right-padded, and ``hidden_index`` (S,).
        plain_head: As ``has_plain_head`` found. If false, the model's own forward computes the logits of every position.
    """
    model = causal_lm(model)
    with attention_for(model, batch["input_ids"]):
        if plain_head:
            hidden = model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
            return model.get_output_embeddings()(hidden.flatten(0, 1)[batch["hidden_index"]])
        return model(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)[batch["hidden_index"]]


def attention_for(model: Any, input_ids: Tensor) -> AbstractContextManager[Any]:
    """The attention kernel to train a batch (B, T) with; the numbers are those of the model's own up to rounding.

    On CPUs the backward pass of torch's fused kernel is slow in 16 bits: with SmolLM2's heads, forward and backward of 7 rows of 45 tokens
    took 11 ms, plain attention 3 ms; of 8 rows of 256 tokens 45 ms and 77 ms (torch 2.13). Layers that are computed again in the
    backward pass must take the same kernel twice and keep the model's.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else model.dtype
    slow = input_ids.device.type == "cpu" and dtype.itemsize == 2 and torch.is_grad_enabled() and not model.is_gradient_checkpointing
    return sdpa_kernel(SDPBackend.MATH) if slow and input_ids.shape[1] <= SHORT_ROWS else nullcontext()


def weighted_loss(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Sum over supervised tokens of ``weights`` times cross-entropy; in float32, or in float64 if the logits are.

    Autocast and the trainer's 16-bit precisions would take the product in 16 bits.
    """
    losses = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), batch["targets"], reduction="none")
    with torch.autocast(losses.device.type, enabled=False):
        return losses @ batch["weights"].to(losses.dtype)


class AnswerMetrics(nn.Module):
    """Loss, perplexity and next-token accuracy on answer tokens, per task and averaged over tasks.

    Teacher-forced; these monitor a training run and are not benchmark scores.

    Args:
        task_names: Tasks in order.
    """

    def __init__(self, task_names: Sequence[str]) -> None:
        super().__init__()
        self.task_names = tuple(task_names)
        self.losses = nn.ModuleList(MeanMetric() for _ in self.task_names)
        self.accuracies = nn.ModuleList(MeanMetric() for _ in self.task_names)
        self.counts = nn.ModuleList(SumMetric() for _ in self.task_names)

    def update(self, task: str, logits: Tensor, targets: Tensor) -> None:
        """Count the supervised tokens of one batch of one task; logits (S, V), targets (S,)."""
        index = self.task_names.index(task)
        self.counts[index].update(targets.numel())  # type: ignore[operator]
        self.losses[index].update(F.cross_entropy(logits.float(), targets, reduction="none"))  # type: ignore[operator]
        self.accuracies[index].update((logits.argmax(dim=-1) == targets).float())  # type: ignore[operator]

    def compute(self) -> dict[str, float]:
        """``loss``, ``perplexity`` and ``accuracy`` as the mean over tasks, and ``accuracy/<task>``; resets the counts.

        A task without tokens takes no part (``limit_val_batches`` may leave some out); without any task nothing is reported. In a run of
        several processes the counts of all are added first.
        """
        for metric in (*self.losses, *self.accuracies):
            metric.update(0.0, weight=0.0)  # type: ignore[operator]  # TorchMetrics warns of a metric that was never updated
        for metric in self.counts:
            metric.update(0.0)  # type: ignore[operator]
        counts, losses, accuracies = (
            torch.stack([metric.compute().float() for metric in metrics])  # type: ignore[operator]
            for metrics in (self.counts, self.losses, self.accuracies)
        )
        for metric in (*self.counts, *self.losses, *self.accuracies):
            metric.reset()  # type: ignore[operator]
        seen = counts > 0
        if not seen.any():
            return {}
        losses, accuracies = losses[seen], accuracies[seen]
        summary = {"loss": losses.mean(), "perplexity": losses.exp().mean(), "accuracy": accuracies.mean()}
        per_task = {f"accuracy/{name}": value for name, value in zip(itertools.compress(self.task_names, seen), accuracies, strict=True)}
        return {key: float(value) for key, value in (summary | per_task).items()}
