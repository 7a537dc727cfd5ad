"""Every kernel against a float64 loop written here, over random sizes, ranks and weights."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlplora.errors import RoutingError
from dlplora.kernels import dense, factor, folded, merged, reference
from dlplora.kernels.backends import triton_obstacle
from dlplora.modules.fused_linear import FusedLinear
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.routing_slot import RoutingSlot
from dlplora.modules.routing_state import RoutingState

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
    kernels = {"token": [reference, dense], "row": [reference, dense, folded], "static": [reference, dense, folded, merged]}[kind]
    for kernel in kernels:
        np.testing.assert_allclose(kernel.fused_delta(x, lora_a, lora_b, weights).numpy(), expected, atol=2e-4, rtol=1e-4)


needs_triton = [
    pytest.mark.triton,
    pytest.mark.skipif(triton_obstacle("cpu") is not None, reason=f"triton backend: {triton_obstacle('cpu')}"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["static", "row"])
@pytest.mark.parametrize(
    "shape",
    [(3, 4, 5, 3, 9, 7), (1, 1, 1, 1, 1, 1), (18, 1, 3, 8, 70, 66), (2, 20, 4, 20, 33, 5), (6, 1, 40, 2, 8, 8)],
    ids=["small", "one", "blocks of rows", "tiles of tokens", "more experts than rows"],
)
class TestTriton:
    pytestmark = needs_triton

    def test_grouped_kernels_equal_the_loop(self, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
        from dlplora.kernels import grouped

        x, lora_a, lora_b, weights = draw(shape, 11, kind, zeros=0.6)
        x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
        expected = loop(x, lora_a, lora_b, weights)
        got = grouped.fused_delta(x, lora_a, lora_b, weights)
        assert got.dtype == dtype
        # The interpreter cuts bfloat16 off instead of rounding it, which doubles its error.
        bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype] * max(1.0, np.abs(expected).max())
        assert np.abs(got.double().numpy() - expected).max() <= bound


@pytest.mark.triton
@pytest.mark.skipif(triton_obstacle("cpu") is not None, reason=f"triton backend: {triton_obstacle('cpu')}")
def test_a_rewritten_grouped_plan_is_a_fresh_plan_at_the_same_addresses() -> None:
    from dlplora.kernels.grouped import GroupedBuffers

    _, lora_a, _, weights = draw((20, 1, 6, 2, 4, 4), 3, "row", zeros=0.7)
    new = draw((20, 1, 6, 2, 4, 4), 4, "row", zeros=0.7)[3]
    rows = torch.arange(0, 20, 3)
    plan = GroupedBuffers(20, 6, lora_a)
    plan.write(folded.kept_first(weights, 6))
    addresses = [buffer.data_ptr() for buffer in plan.buffers()]
    plan.write(folded.kept_first(new[rows], 6), rows)
    mixed = weights.clone()
    mixed[rows] = new[rows]
    fresh = GroupedBuffers(20, 6, lora_a)
    fresh.write(folded.kept_first(mixed, 6))
    assert [buffer.data_ptr() for buffer in plan.buffers()] == addresses
    for ours, theirs in zip(plan.buffers(), fresh.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    for block, expert in enumerate(plan.block_expert.tolist()):
        pairs = [pair for pair in plan.block_pairs[block].tolist() if pair >= 0]
        assert {int(plan.experts.flatten()[pair]) for pair in pairs} == ({expert} if expert >= 0 else set())
    assert sorted(pair for pair in plan.block_pairs.flatten().tolist() if pair >= 0) == [
        pair for pair, expert in enumerate(plan.experts.flatten().tolist()) if expert >= 0
    ]


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
    plan.write(lora_a, lora_b, new[rows], rows)
    assert (plan.a_sel.data_ptr(), plan.b_sel.data_ptr()) == addresses
    mixed = weights.clone()
    mixed[rows] = new[rows]
    fresh = folded.fold(lora_a, lora_b, mixed, width)
    assert torch.equal(plan.a_sel, fresh.a_sel)
    assert torch.equal(plan.b_sel, fresh.b_sel)
    np.testing.assert_allclose(plan.delta(x).numpy(), loop(x, lora_a, lora_b, mixed), atol=2e-4, rtol=1e-4)


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
    np.testing.assert_allclose(plan.delta(x).numpy(), loop(x, lora_a, lora_b, weights), atol=1e-4, rtol=1e-4)


def fused_layer(lora_a: Tensor, lora_b: Tensor) -> tuple[FusedLinear, RoutingSlot]:
    """A fused layer around a random linear layer, every expert with a scaling of its own."""
    experts = [(a, b, 0.5 + index) for index, (a, b) in enumerate(zip(lora_a, lora_b, strict=True))]
    bank = AdapterBank.from_tensors([f"e{index}" for index in range(len(experts))], {"layer": experts})
    slot = RoutingSlot()
    base = torch.nn.Linear(lora_a.shape[2], lora_b.shape[1]).requires_grad_(False)
    return FusedLinear(base, bank.modules["layer"], slot), slot


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 10_000), kind=st.sampled_from(["static", "row"]))
def test_a_layer_gives_the_same_on_every_backend(shape: tuple[int, ...], seed: int, kind: str) -> None:
    x, lora_a, lora_b, weights = draw(shape, seed, kind)
    layer, slot = fused_layer(lora_a, lora_b)
    scaled = weights * (0.5 + torch.arange(shape[2]))
    expected = loop(x, lora_a, lora_b, scaled) + layer.base(x).double().numpy()
    before = layer.base.weight.clone()  # type: ignore[union-attr, operator]
    for backend in ("reference", "dense", "folded", "merged"):
        if backend == "merged" and kind == "row" and not bool((weights == weights[:1]).all()):
            continue
        with slot.bind(RoutingState(weights, backend)):
            np.testing.assert_allclose(layer(x).numpy(), expected, atol=5e-4, rtol=1e-4)
    assert torch.equal(layer.base.weight, before)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 10_000), backend=st.sampled_from(["dense", "folded", "merged"]))
def test_states_that_take_turns_do_not_disturb_each_other(shape: tuple[int, ...], seed: int, backend: str) -> None:
    """Each state has buffers of its own, and finds its own plan in them, re-routed or not."""
    x, lora_a, lora_b, weights = draw((1, *shape[1:]), seed, "row")
    other, third = draw((1, *shape[1:]), seed + 1, "row")[3], draw((1, *shape[1:]), seed + 2, "row")[3]
    layer, slot = fused_layer(lora_a, lora_b)
    scaling = 0.5 + torch.arange(shape[2])

    def expected(chosen: Tensor) -> np.ndarray:
        return loop(x, lora_a, lora_b, chosen * scaling) + layer.base(x).double().numpy()

    one = RoutingState(weights, backend, width=shape[2], reroutes=True)
    two = RoutingState(other, backend, width=shape[2], reroutes=True)
    with slot.bind(one):
        np.testing.assert_allclose(layer(x).numpy(), expected(weights), atol=5e-4, rtol=1e-4)
        with slot.bind(two):
            np.testing.assert_allclose(layer(x).numpy(), expected(other), atol=5e-4, rtol=1e-4)
        np.testing.assert_allclose(layer(x).numpy(), expected(weights), atol=5e-4, rtol=1e-4)
        one.update_rows(torch.tensor([0]), third)
        np.testing.assert_allclose(layer(x).numpy(), expected(third), atol=5e-4, rtol=1e-4)
    two.update_rows(torch.tensor([0]), weights)
    with slot.bind(two):
        np.testing.assert_allclose(layer(x).numpy(), expected(weights), atol=5e-4, rtol=1e-4)
    assert torch.equal(other, draw((1, *shape[1:]), seed + 1, "row")[3])  # the caller's tensor is not written into


def test_a_plan_made_in_inference_mode_can_be_rewritten_outside() -> None:
    x, lora_a, lora_b, weights = draw((2, 3, 4, 2, 5, 5), 5, "row")
    layer, slot = fused_layer(lora_a, lora_b)
    with torch.inference_mode(), slot.bind(RoutingState(weights, "folded", width=4)):
        layer(x)
    new = weights.flip(0)
    with slot.bind(RoutingState(new, "folded", width=4)):
        expected = loop(x, lora_a, lora_b, new * (0.5 + torch.arange(4))) + layer.base(x).double().numpy()
        np.testing.assert_allclose(layer(x).numpy(), expected, atol=5e-4, rtol=1e-4)


def test_buffers_stay_where_they_are_between_requests_of_one_size() -> None:
    x, lora_a, lora_b, weights = draw((2, 3, 6, 2, 5, 5), 5, "row")
    layer, slot = fused_layer(lora_a, lora_b)
    seen = set()
    for keep in (1, 4, 2):
        few = weights * (torch.arange(6) < keep)
        state = RoutingState(few, "folded", width=4, reroutes=True)
        with slot.bind(state):
            seen.add(tuple(buffer.data_ptr() for buffer in state.buffers[layer.key].buffers()))
            state.update_rows(torch.tensor([1]), weights[:1] * (torch.arange(6) < 3))
            seen.add(tuple(buffer.data_ptr() for buffer in state.buffers[layer.key].buffers()))
            layer(x)
    assert len(seen) == 1
    with pytest.raises(RoutingError, match=r"keeps 5 experts, the buffers have room for 4.*max_kept"):
        RoutingState((torch.arange(6) < 5).float()[None], "folded", width=4)
    with pytest.raises(RoutingError, match=r"keeps 6 experts, the buffers have room for 4.*max_kept"):
        state.update_rows(torch.tensor([0]), torch.ones(1, 6))


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.skipif(triton_obstacle("cuda") is not None or not torch.cuda.is_available(), reason="needs Triton and a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 1, 26, 8, 256, 520), (3, 70, 5, 20, 130, 64)])
def test_grouped_kernels_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from dlplora.kernels import grouped

    x, lora_a, lora_b, weights = draw(shape, 21, "row", zeros=0.8)
    x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
    expected = loop(x, lora_a, lora_b, weights)
    got = grouped.fused_delta(*(tensor.cuda() for tensor in (x, lora_a, lora_b, weights))).cpu()
    assert np.abs(got.double().numpy() - expected).max() <= (1e-5 if dtype == torch.float32 else 2e-2) * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_in_half_precision_rounds_once(dtype: torch.dtype) -> None:
    """The merged weight is the exact sum, rounded to the weight's precision, whatever was merged before."""
    _, lora_a, lora_b, weights = draw((1, 1, 4, 3, 8, 6), 9, "row")
    layer, slot = fused_layer(lora_a, lora_b)
    layer.base.to(dtype)  # type: ignore[union-attr, operator]
    layer.to(dtype)
    base: Tensor = layer.base.weight.clone()  # type: ignore[union-attr, operator]
    scaling = (0.5 + torch.arange(4)).double()
    for chosen in (weights, weights.flip(1), torch.zeros(1, 4).index_fill(1, torch.tensor([2]), 1.0)):
        with slot.bind(RoutingState(chosen, "merged")) as state:
            exact = base.double() + torch.einsum(
                "e,eor,eri->oi", chosen[0].double() * scaling, layer.lora_b.double(), layer.lora_a.double()
            )
            bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6
            assert bool(((state.buffers[layer.key].weight.double() - exact).abs() <= bound).all())
    assert torch.equal(layer.base.weight, base)  # type: ignore[arg-type]


@pytest.mark.triton
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
def test_the_grouped_kernels_compile_for_a_gpu() -> None:
    """To machine code for compute capability 9.0, without a GPU; in a process of its own, where nothing is interpreted."""
    code = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from dlplora.kernels import grouped
target = GPUTarget("cuda", 90, 32)
sizes = dict.fromkeys(("tokens", "width", "d_in", "d_out", "rank"), "i32")
pointers = {"x": "*bf16", "a": "*bf16", "b": "*bf16", "out": "*bf16", "scales": "*fp32", "z": "*fp32"}
pointers |= dict.fromkeys(("block_expert", "block_pairs", "experts"), "*i32")
constants = {"PAIRS": 16, "BLOCK_M": 16, "BLOCK_I": 64, "BLOCK_T": 16, "BLOCK_O": 64, "BLOCK_R": 16, "UPCAST": False}
for kernel in (grouped._shrink, grouped._expand):
    kinds = {**sizes, **pointers, **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds[name] for name in kernel.arg_names}
    fixed = {name: value for name, value in constants.items() if name in kernel.arg_names}
    print(len(triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=fixed), target=target).asm["cubin"]) > 0)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize("tokens", [1, 5])
def test_room_that_no_row_uses_is_left_out(tokens: int) -> None:
    """Three rows keep at most two of six experts in a plan with room for five: reading two or five differs by rounding at most."""
    torch.manual_seed(0)
    lora_a, lora_b, x = torch.randn(6, 4, 32), torch.randn(6, 16, 4), torch.randn(3, tokens, 32)
    weights = torch.tensor([[0.0, 1, 0, 0, 0, 0], [0.5, 0, 0, 0.5, 0, 0], [0, 0, 0, 0, 0, 1]])
    plan = folded.FoldedBuffers(3, 5, lora_a, lora_b)
    plan.write(lora_a, lora_b, weights)
    whole = plan.delta(x)
    plan.use(2)
    assert plan.used == 2
    torch.testing.assert_close(plan.delta(x), whole, rtol=1e-5, atol=1e-5)
    by_hand = torch.einsum("be,eor,eri,bti->bto", weights, lora_b, lora_a, x)
    torch.testing.assert_close(whole, by_hand, rtol=1e-5, atol=1e-5)


def test_a_re_route_that_changes_nothing_rewrites_nothing() -> None:
    """Only the row whose weights change is handed to the layers."""
    state = RoutingState(torch.eye(3), "folded", width=2, reroutes=True)
    written: list[list[int]] = []
    slot = RoutingSlot()
    slot.rewrite = lambda state, rows, weights: written.append(rows.tolist())  # type: ignore[method-assign]
    with slot.bind(state):
        state.update_rows(torch.tensor([0, 2]), torch.eye(3)[[0, 2]])
        assert written == []
        state.update_rows(torch.tensor([0, 2]), torch.eye(3)[[0, 1]])
    assert written == [[2]]
    assert torch.equal(state.weights, torch.eye(3)[[0, 1, 1]])


def test_a_plan_that_was_moved_or_copied_follows_its_own_buffers() -> None:
    """Products read views of the buffers; a copy or another precision must not leave them with the old ones."""
    generator = torch.Generator().manual_seed(3)
    lora_a, lora_b = torch.randn(4, 2, 5, generator=generator), torch.randn(4, 6, 2, generator=generator)
    x = torch.randn(1, 3, 5, generator=generator)
    first, second = torch.tensor([[0.0, 1.0, 0.0, 0.5]]), torch.tensor([[2.0, 0.0, 0.0, -1.0]])
    plan = folded.fold(lora_a, lora_b, first, width=3)
    for moved in (copy.deepcopy(plan), copy.deepcopy(plan).double().float(), copy.deepcopy(plan).double()):
        dtype = moved.a_sel.dtype
        moved.write(lora_a.to(dtype), lora_b.to(dtype), second.to(dtype))
        expected = reference.fused_delta(x, lora_a, lora_b, second)
        torch.testing.assert_close(moved.delta(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plan.delta(x), reference.fused_delta(x, lora_a, lora_b, first), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_one_token_in_half_precision_is_rounded_once(dtype: torch.dtype, rows: int) -> None:
    """A CPU multiplies single tokens in float32; what is rounded is the sum alone."""
    x, lora_a, lora_b, weights = draw((rows, 1, 5, 3, 8, 6), 7, "row")
    x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
    plan = folded.fold(lora_a, lora_b, weights)
    folded_b = plan.b_sel.double()
    expected = torch.bmm(torch.bmm(x.double(), plan.a_sel.double().mT), folded_b).to(dtype)
    torch.testing.assert_close(plan.delta(x), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
