"""Validation metrics of experts and gates: means over tasks, computed by hand; tasks without rows are left out."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from dlplora.training.answer_loss import AnswerMetrics


def test_means_over_tasks_leave_out_tasks_without_rows() -> None:
    metrics = AnswerMetrics(["a", "b", "c"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.update("a", torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]]), torch.tensor([1, 1]))  # probabilities 3/4 and 1/4
        metrics.update("c", torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        found = metrics.compute()
        assert metrics.compute() == {}  # the counts are reset, and nothing has no mean
    first, third = (math.log(4 / 3) + math.log(4)) / 2, math.log(2)
    assert found == pytest.approx(
        {
            "loss": (first + third) / 2,
            "perplexity": (math.exp(first) + 2) / 2,
            "accuracy": 0.75,
            "accuracy/a": 0.5,
            "accuracy/c": 1.0,
        }
    )


def test_a_loss_that_is_not_finite_stays_visible() -> None:
    metrics = AnswerMetrics(["a", "b"])
    metrics.update("a", torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))
    assert math.isnan(metrics.compute()["loss"])
