"""Every kernel against a float64 loop written here, over random sizes, ranks and weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlplora.errors import RoutingError
from dlplora.kernels import dense, factor, folded, reference
from dlplora.kernels.backends import BACKENDS, select_backend

SHAPES = st.tuples(*(st.integers(1, top) for top in (4, 5, 6, 3, 9, 7)))  # B, T, E, R, I, O


def draw(shape: tuple[int, ...], seed: int, kind: str, zeros: float = 0.4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, A, B with experts of different ranks (zero padded), weights of which some are exactly zero."""
    b, t, e, r, i, o = shape
    rng = np.random.default_rng(seed)
    x, lora_a, lora_b = rng.normal(size=(b, t, i)), rng.normal(size=(e, r, i)), rng.normal(size=(e, o, r))
    for expert, rank in enumerate(rng.integers(1, r + 1, size=e)):
        lora_a[expert, rank:], lora_b[expert, :, rank:] = 0.0, 0.0
    sizes = {"static": (e,), "row": (b, e), "token": (b, t, e)}[kind]
    weights = rng.normal(size=sizes) * (rng.random(size=sizes) > zeros)
    return tuple(torch.tensor(array, dtype=torch.float32) for array in (x, lora_a, lora_b, weights))  # type: ignore[return-value]


def loop(x: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor) -> np.ndarray:
    x64, a64, b64, w64 = (tensor.double().numpy() for tensor in (x, lora_a, lora_b, weights))
    out = np.zeros((*x64.shape[:2], b64.shape[1]))
    for row in range(x64.shape[0]):
        for token in range(x64.shape[1]):
            for expert in range(a64.shape[0]):
                weight = w64[expert] if w64.ndim == 1 else w64[row, expert] if w64.ndim == 2 else w64[row, token, expert]
                out[row, token] += weight * (b64[expert] @ (a64[expert] @ x64[row, token]))
    return out


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 10_000), kind=st.sampled_from(["static", "row", "token"]))
def test_delta_kernels_equal_the_loop(shape: tuple[int, ...], seed: int, kind: str) -> None:
    x, lora_a, lora_b, weights = draw(shape, seed, kind)
    expected = loop(x, lora_a, lora_b, weights)
    kernels = [reference, dense] if kind == "token" else [reference, dense, folded]
    for kernel in kernels:
        np.testing.assert_allclose(kernel.fused_delta(x, lora_a, lora_b, weights).numpy(), expected, atol=2e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 10_000), kind=st.sampled_from(["static", "row", "token"]))
def test_factor_fusion_equals_summed_factors(shape: tuple[int, ...], seed: int, kind: str) -> None:
    x, lora_a, lora_b, weights = draw(shape, seed, kind)
    scaling = torch.tensor(np.random.default_rng(seed + 1).uniform(0.5, 3.0, size=shape[2]), dtype=torch.float32)
    got = factor.fused_delta(x, lora_a, lora_b, weights, scaling).numpy()
    x64, a64, b64, w64, s64 = (tensor.double().numpy() for tensor in (x, lora_a, lora_b, weights, scaling))
    for row in range(shape[0]):
        for token in range(shape[1]):
            w = w64 if w64.ndim == 1 else w64[row] if w64.ndim == 2 else w64[row, token]
            summed_a, summed_b = np.einsum("e,eri->ri", w, a64), np.einsum("e,eor->or", w * s64, b64)
            np.testing.assert_allclose(got[row, token], summed_b @ summed_a @ x64[row, token], atol=1e-3, rtol=1e-3)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 10_000))
def test_an_updated_plan_is_a_fresh_plan_at_the_same_addresses(shape: tuple[int, ...], seed: int) -> None:
    x, lora_a, lora_b, weights = draw(shape, seed, "row")
    new = draw(shape, seed + 1, "row")[3]
    rows = torch.arange(0, shape[0], 2)
    width = max(folded.kept_width(weights), folded.kept_width(new[rows]))
    plan = folded.fold(lora_a, lora_b, weights, width)
    addresses = plan.a_sel.data_ptr(), plan.b_sel.data_ptr()
    plan.update_rows(lora_a, lora_b, rows, new[rows])
    assert (plan.a_sel.data_ptr(), plan.b_sel.data_ptr()) == addresses
    mixed = weights.clone()
    mixed[rows] = new[rows]
    fresh = folded.fold(lora_a, lora_b, mixed, width)
    assert torch.equal(plan.a_sel, fresh.a_sel)
    assert torch.equal(plan.b_sel, fresh.b_sel)
    np.testing.assert_allclose(folded.apply(x, plan).numpy(), loop(x, lora_a, lora_b, mixed), atol=2e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 10_000))
def test_order_of_rows_and_of_experts_does_not_matter(shape: tuple[int, ...], seed: int) -> None:
    x, lora_a, lora_b, weights = draw(shape, seed, "row")
    rng = np.random.default_rng(seed)
    rows, experts = torch.tensor(rng.permutation(shape[0])), torch.tensor(rng.permutation(shape[2]))
    for kernel in (reference, dense, folded):
        plain = kernel.fused_delta(x, lora_a, lora_b, weights)
        torch.testing.assert_close(kernel.fused_delta(x[rows], lora_a, lora_b, weights[rows]), plain[rows], atol=1e-4, rtol=1e-4)
        moved = kernel.fused_delta(x, lora_a[experts], lora_b[experts], weights[:, experts])
        torch.testing.assert_close(moved, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", [reference, dense, folded])
def test_half_precision_stays_near_and_keeps_the_dtype(kernel: object, dtype: torch.dtype) -> None:
    x, lora_a, lora_b, weights = draw((3, 4, 5, 3, 8, 6), 7, "row")
    expected = loop(x, lora_a, lora_b, weights)
    got = kernel.fused_delta(x.to(dtype), lora_a.to(dtype), lora_b.to(dtype), weights)  # type: ignore[attr-defined]
    assert got.dtype == dtype
    assert np.abs(got.double().numpy() - expected).max() < 0.05 * np.abs(expected).max()


def test_one_plan_for_all_rows_is_shared() -> None:
    x, lora_a, lora_b, weights = draw((3, 4, 5, 3, 8, 6), 3, "static")
    plan = folded.fold(lora_a, lora_b, weights[None])
    assert plan.a_sel.shape[0] == 1
    np.testing.assert_allclose(folded.apply(x, plan).numpy(), loop(x, lora_a, lora_b, weights), atol=1e-4, rtol=1e-4)


def test_backends_are_chosen_by_what_the_weights_allow() -> None:
    few, many = torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.full((2, 4), 0.25)
    assert select_backend("auto", few, 4, 8) == "folded"
    assert select_backend("auto", many, 4, 8) == "dense"
    assert select_backend("auto", torch.rand(2, 3, 4), 4, 8) == "dense"
    assert select_backend("auto", None, 4, 8) == "dense"
    for name in BACKENDS:
        assert select_backend(name, few, 4, 8) == name


@pytest.mark.parametrize("weights", [None, torch.rand(2, 3, 4)])
def test_a_backend_that_cannot_serve_is_refused_by_name(weights: Tensor | None) -> None:
    with pytest.raises(RoutingError, match=r"'folded'.*per token.*dense, reference"):
        select_backend("folded", weights, 4, 8)
    with pytest.raises(RoutingError, match=r"unknown backend 'fold'.*folded"):
        select_backend("fold", torch.rand(4), 4, 8)
