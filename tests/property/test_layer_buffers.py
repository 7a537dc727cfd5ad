"""Buffers of many layers that are written together, and banks whose factors allow it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlplora.inference.loading import nano_asset
from dlplora.kernels.allocation import as_stack
from dlplora.modules.fused_linear import FusedLinear
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.routing_slot import RoutingSlot
from dlplora.modules.routing_state import RoutingState
from tests.property.test_kernels import loop


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 4), stacked=st.booleans(), own_scaling=st.booleans())
def test_buffers_of_many_layers_are_those_of_each_layer(seed: int, rows: int, stacked: bool, own_scaling: bool) -> None:
    """Layers of two sizes, written in a random order of whole batches and single rows, answer as the sum over experts in float64."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    experts, rank = 5, 4
    sizes = {f"block{index}.{name}": size for index in range(3) for name, size in (("q", (16, 16)), ("v", (16, 8)))}
    drawn = {
        path: [
            (torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator), 0.5 + expert)
            for expert in range(experts)
        ]
        for path, (d_in, d_out) in sizes.items()
    }
    bank = AdapterBank.from_tensors([f"e{index}" for index in range(experts)], drawn)
    slot = RoutingSlot()
    layers = {path: FusedLinear(torch.nn.Linear(*sizes[path], bias=False), entry, slot) for path, entry in bank.modules.items()}
    if not stacked:
        layers["block1.q"].lora_a = layers["block1.q"].lora_a.clone()
    if own_scaling:
        layers["block2.v"].scaling = layers["block2.v"].scaling * 3
    x = torch.randn(rows, 2, 16, generator=generator)

    def some(number: int) -> Tensor:
        kept = rng.random((number, experts)) * (rng.random((number, experts)) < rng.random())
        return torch.tensor(kept, dtype=torch.float32)

    state = RoutingState(some(rows), "folded", width=experts, reroutes=True)
    for _ in range(6):
        if rng.random() < 0.4:
            state = RoutingState(some(rows), "folded", width=experts, reroutes=True)
        slot.prepare(state)
        if rng.random() < 0.7:
            chosen = torch.tensor(rng.permutation(rows)[: rng.integers(1, rows + 1)])
            state.update_rows(chosen, some(len(chosen)))
        if rng.random() < 0.2:
            layers["block0.q"].scaling = layers["block0.q"].scaling * 0.5
            state.release()
            slot.prepare(state)
        with slot.bind(state), torch.no_grad():
            for layer in layers.values():
                got = layer(x) - layer.base(x)
                expected = loop(x, layer.lora_a, layer.lora_b, state.weights * layer.scaling)
                np.testing.assert_allclose(got.numpy(), expected, atol=2e-3, rtol=1e-3)


def test_factors_of_equal_modules_stay_in_one_block() -> None:
    """In a loaded bank, and in what is made of it: other experts, another dtype. Values are those of the experts."""
    loaded = AdapterBank.from_pool(nano_asset("pool"))
    names = loaded.names[5:1:-2]
    for bank in (loaded, loaded.select(names), loaded.to(dtype=torch.bfloat16), loaded.select(names).to(dtype=torch.float64)):
        by_size: dict[tuple[int, ...], list[str]] = {}
        for path, entry in bank.modules.items():
            by_size.setdefault((*entry.lora_a.shape, *entry.lora_b.shape), []).append(path)
        assert max(map(len, by_size.values())) > 1
        for paths in by_size.values():
            stack_a = as_stack([bank.modules[path].lora_a for path in paths])
            stack_b = as_stack([bank.modules[path].lora_b.mT for path in paths])
            assert stack_a is not None
            assert stack_b is not None
            for place, path in enumerate(paths):
                old, chosen = loaded.modules[path], [loaded.index(name) for name in bank.names]
                assert torch.equal(stack_a[place], old.lora_a[chosen].to(stack_a.dtype))
                assert torch.equal(stack_b[place].mT, old.lora_b[chosen].to(stack_b.dtype))
                assert torch.equal(bank.modules[path].scaling, old.scaling[chosen])
