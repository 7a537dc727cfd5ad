"""Selection and renormalisation against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlplora.errors import RoutingError
from dlplora.modules import routing

PROBS = torch.tensor([0.1, 0.6, 0.3])


def kept(mask: torch.Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.0, [1]),  # the first has nothing before it; the second has 0.6 before it
        (0.5, [1]),
        (0.6, [1, 2]),  # exactly 0.6 before the second: kept, as in the released code
        (0.89, [1, 2]),
        (0.95, [0, 1, 2]),
        (1.0, [0, 1, 2]),
        (2.0, [0, 1, 2]),
    ],
)
def test_nucleus_keeps_what_has_at_most_p_before_it(p: float, expected: list[int]) -> None:
    assert kept(routing.nucleus_mask(PROBS, p)) == expected


def test_threshold_and_top_k() -> None:
    assert kept(routing.threshold_mask(PROBS, 0.3)) == [1, 2]
    assert kept(routing.threshold_mask(PROBS, 0.7)) == [1]  # never nobody
    assert kept(routing.threshold_mask(PROBS, 0.7, min_keep=2)) == [1, 2]
    assert kept(routing.nucleus_mask(PROBS, 0.0, min_keep=9)) == [0, 1, 2]
    assert kept(routing.top_k_mask(PROBS, 2)) == [1, 2]
    for k in (0, 4):
        with pytest.raises(RoutingError, match=f"between 1 and the number of experts \\(3\\), got {k}"):
            routing.top_k_mask(PROBS, k)


def test_ties_go_to_the_smaller_index() -> None:
    even = torch.full((4,), 0.25)
    assert kept(routing.top_k_mask(even, 2)) == [0, 1]
    assert kept(routing.nucleus_mask(even, 0.3)) == [0, 1]
    assert kept(routing.nucleus_mask(even, 0.25)) == [0, 1]


def test_one_expert_is_always_kept() -> None:
    only = torch.ones(2, 1)
    for mask in (routing.nucleus_mask(only, 0.0), routing.threshold_mask(only, 2.0), routing.top_k_mask(only, 1)):
        assert mask.all()


def test_renormalisation_by_hand() -> None:
    mask = torch.tensor([False, True, True])
    softmax = [math.exp(0.6) / (math.exp(0.6) + math.exp(0.3)), math.exp(0.3) / (math.exp(0.6) + math.exp(0.3))]
    assert softmax == pytest.approx([0.574442516811659, 0.425557483188341])
    logits = torch.tensor([5.0, 2.0, 1.0])
    of_logits = [math.exp(2) / (math.exp(2) + math.exp(1)), math.exp(1) / (math.exp(2) + math.exp(1))]
    by_hand = {"softmax": softmax, "sum": [2 / 3, 1 / 3], "none": [0.6, 0.3], "uniform": [0.5, 0.5], "logits": of_logits}
    for how, expected in by_hand.items():
        assert routing.renormalize(PROBS, mask, how, logits).tolist() == pytest.approx([0.0, *expected], abs=1e-6), how  # type: ignore[arg-type]
    with pytest.raises(RoutingError, match="needs the router's logits"):
        routing.renormalize(PROBS, mask, "logits")
    with pytest.raises(RoutingError, match="got 'mean'"):
        routing.renormalize(PROBS, mask, "mean")  # type: ignore[arg-type]


def test_entropy_and_count() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [2.0, 2.0, 0.0]])
    assert routing.num_kept(weights).tolist() == [2, 1, 2]
    assert routing.entropy(weights).tolist() == pytest.approx([math.log(2), 0.0, math.log(2)], abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(raw=st.lists(st.floats(-8, 8), min_size=1, max_size=9), p=st.floats(0, 0.99))
def test_the_nucleus_is_the_smallest_prefix_with_more_than_p(raw: list[float], p: float) -> None:
    probs = torch.tensor(raw, dtype=torch.float64).softmax(0)
    order = sorted(range(len(raw)), key=lambda i: -float(probs[i]))
    mass, expected = 0.0, []
    for index in order:
        if mass > p + 1e-12:
            break
        expected.append(index)
        mass += float(probs[index])
    got = set(kept(routing.nucleus_mask(probs, p)))
    borderline = abs(sum(float(probs[i]) for i in order[: len(got)]) - p) < 1e-9 or abs(mass - p) < 1e-9
    assert borderline or got == set(expected)
