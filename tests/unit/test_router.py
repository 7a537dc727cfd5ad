"""The mini-MLP router: size, features, calibration, files, class order."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from dlplora.errors import ConfigError, MethodError, RoutingError
from dlplora.modules.router import MiniMLPRouter, RouterConfig, golden_section
from dlplora.modules.token_pooling import max_of_rows, select_tokens

NAMES = ("alpha", "beta", "gamma")


@pytest.fixture
def embedding() -> nn.Embedding:
    generator = torch.Generator().manual_seed(5)
    table = nn.Embedding(50, 12)
    with torch.no_grad():
        table.weight.copy_(torch.randn(50, 12, generator=generator))
    return table


def small(embedding: nn.Embedding, **options: object) -> MiniMLPRouter:
    torch.manual_seed(0)
    return MiniMLPRouter(NAMES, RouterConfig(hidden=(8, 8, 8), **options), embedding=embedding).eval()  # type: ignore[arg-type]


def gelu(x: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda value: 0.5 * value * (1.0 + math.erf(value / math.sqrt(2.0))))(x)


def by_hand(router: MiniMLPRouter, table: np.ndarray, ids: list[int], normalise: bool) -> np.ndarray:
    """The network in float64 numpy with the exact GELU, one prompt at a time."""

    def normal(x: np.ndarray) -> np.ndarray:
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) if normalise else x

    layers = [
        (module.weight.detach().double().numpy(), module.bias.detach().double().numpy())
        for module in router.modules()
        if isinstance(module, nn.Linear)
    ]
    tokens = [table[i].astype(np.float64) for i in ids]
    if router.config.pooling == "tokens":
        weight, bias = layers.pop(0)
        read = np.stack([gelu(weight @ normal(token) + bias) for token in tokens])
        x = np.concatenate([read.mean(0), read.max(0)])
    else:
        x = normal(np.mean(tokens, 0))
    for weight, bias in layers[:-1]:
        x = gelu(weight @ x + bias)
    return layers[-1][0] @ x + layers[-1][1]


def test_table_variant_has_the_papers_size() -> None:
    router = MiniMLPRouter([f"task{i}" for i in range(26)], RouterConfig(variant="table"))
    assert router.num_trained_parameters == 4_936_730
    assert sum(isinstance(module, nn.Linear) for module in router.modules()) == 4


def test_backbone_variant_counts_and_saves_no_embedding(embedding: nn.Embedding) -> None:
    router = MiniMLPRouter(NAMES, embedding=embedding)
    assert router.num_trained_parameters == (12 * 256 + 256) + (512 * 512 + 512) + (512 * 256 + 256) + (256 * 3 + 3)
    assert all("embed" not in key and "table" not in key for key in router.state_dict())
    assert sum(isinstance(module, nn.Linear) for module in router.modules()) == 4


@pytest.mark.parametrize("pooling", ["embeddings", "tokens"])
def test_forward_equals_the_formula(embedding: nn.Embedding, pooling: str) -> None:
    router = small(embedding, pooling=pooling)
    rows = [[4, 9, 4], [7], [1, 2, 3, 4, 5]]
    ids, mask = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 5, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 5 - len(row) :], mask[i, 5 - len(row) :] = torch.tensor(row), 1
    expected = np.stack([by_hand(router, embedding.weight.detach().numpy(), row, normalise=True) for row in rows])
    np.testing.assert_allclose(router(ids, mask).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["embeddings", "tokens"])
def test_table_variant_equals_the_formula_and_wraps_ids(pooling: str) -> None:
    torch.manual_seed(1)
    config = RouterConfig(variant="table", hidden=(8, 8, 8), table_rows=20, table_width=6, pooling=pooling)  # type: ignore[arg-type]
    router = MiniMLPRouter(NAMES, config).eval()
    assert router.table is not None
    ids = torch.tensor([[3, 45, 19]])
    expected = by_hand(router, router.table.weight.detach().numpy(), [3, 5, 19], normalise=False)
    np.testing.assert_allclose(router(ids, torch.ones_like(ids)).detach().numpy()[0], expected, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(3, 49), min_size=1, max_size=9), min_size=1, max_size=4),
    left=st.integers(0, 6),
    right=st.integers(0, 6),
    filler=st.integers(0, 49),
    max_tokens=st.sampled_from([2, 5, 256]),
    pooling=st.sampled_from(["embeddings", "tokens"]),
)
def test_features_ignore_padding_to_the_last_bit(
    rows: list[list[int]], left: int, right: int, filler: int, max_tokens: int, pooling: str
) -> None:
    table = nn.Embedding(50, 12)
    router = small(table, max_tokens=max_tokens, pooling=pooling)
    width = max(map(len, rows))

    def padded(before: int, after: int, align: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.full((len(rows), before + width + after), filler)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            start = before if align == "left" else before + width - len(row)
            ids[i, start : start + len(row)], mask[i, start : start + len(row)] = torch.tensor(row), 1
        return ids, mask

    plain = router.features(*padded(0, 0, "left"))
    assert torch.equal(router.features(*padded(left, right, "right")), plain)
    alone = torch.cat([router.features(torch.tensor([row]), torch.ones(1, len(row))) for row in rows])
    if pooling == "embeddings":
        assert torch.equal(alone, plain)
    else:  # the first layer is one matrix product over all rows' tokens, whose last bit may depend on their number
        torch.testing.assert_close(alone, plain, atol=1e-6, rtol=1e-5)


def test_max_of_rows_by_hand() -> None:
    features = torch.tensor([[1.0, -5.0], [3.0, -7.0], [-2.0, -1.0], [0.0, 4.0], [-9.0, 9.0]])
    assert max_of_rows(features, torch.tensor([2, 1, 2])).tolist() == [[3.0, -5.0], [-2.0, -1.0], [0.0, 9.0]]


def test_long_prompts_keep_head_and_tail() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1, 1, 1, 0]])
    kept = select_tokens(mask, 5)
    assert kept.long().tolist() == [[0, 0, 1, 1, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1, 1, 1, 0]]


def test_a_prompt_without_tokens_is_refused(embedding: nn.Embedding) -> None:
    with pytest.raises(RoutingError, match="prompt 1"):
        small(embedding)(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [0, 0, 0]]))


def test_training_moves_the_mlp_and_leaves_the_embedding(embedding: nn.Embedding) -> None:
    router = small(embedding).train()
    before = embedding.weight.detach().clone()
    ids = torch.tensor([[3, 4], [9, 10], [20, 21], [30, 31]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 1])}
    logits = router(ids, torch.ones_like(ids)).detach().double().numpy()
    shifted = logits - logits.max(1, keepdims=True)
    nll = np.log(np.exp(shifted).sum(1)) - shifted[range(4), [0, 1, 2, 1]]
    assert router.loss(batch).item() == pytest.approx(nll.mean(), abs=1e-6)
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        router.loss(batch).backward()
        optimizer.step()
    assert router(ids, torch.ones_like(ids)).argmax(1).tolist() == [0, 1, 2, 1]
    assert torch.equal(embedding.weight, before)
    assert embedding.weight.grad is None


def test_calibration_finds_the_temperature_that_made_the_labels(embedding: nn.Embedding) -> None:
    generator = torch.Generator().manual_seed(3)
    true_logits = torch.randn(4000, 3, generator=generator) * 2
    labels = torch.multinomial(true_logits.softmax(-1), 1, generator=generator)[:, 0]
    router = small(embedding)
    temperature = router.calibrate(true_logits * 3.0, labels)
    assert temperature == pytest.approx(3.0, rel=0.08)
    grid = np.linspace(0.5, 6.0, 1200)
    z = true_logits.double().numpy() * 3.0
    losses = [
        np.mean(
            np.log(np.exp(z / t - (z / t).max(1, keepdims=True)).sum(1))
            - (z / t - (z / t).max(1, keepdims=True))[range(4000), labels.numpy()]
        )
        for t in grid[::20]
    ]
    assert temperature == pytest.approx(grid[::20][int(np.argmin(losses))], abs=0.1)
    assert router.calibrate(true_logits * 3.0, labels) == temperature
    ids = torch.tensor([[3, 4]])
    probs, scaled = router.probabilities(ids, torch.ones_like(ids))
    expected = by_hand(router, embedding.weight.detach().numpy(), [3, 4], normalise=True) / temperature
    np.testing.assert_allclose(scaled.detach().numpy()[0], expected, atol=1e-5)
    np.testing.assert_allclose(probs.detach().numpy()[0], np.exp(expected) / np.exp(expected).sum(), atol=1e-5)


def test_a_faultless_router_does_not_become_infinitely_sure(embedding: nn.Embedding) -> None:
    router = small(embedding)
    temperature = router.calibrate(torch.eye(3) * 4, torch.arange(3))
    assert 0.05 <= temperature < 0.06


def test_golden_section_at_the_borders() -> None:
    assert golden_section(lambda x: x, 1.0, 3.0) == pytest.approx(1.0, abs=1e-5)
    assert golden_section(lambda x: -x, 1.0, 3.0) == pytest.approx(3.0, abs=1e-5)


@pytest.mark.parametrize("variant", ["backbone", "table"])
def test_save_and_load(tmp_path: Path, embedding: nn.Embedding, variant: str) -> None:
    torch.manual_seed(2)
    config = RouterConfig(variant=variant, hidden=(8, 7, 6), table_rows=40, table_width=5)  # type: ignore[arg-type]
    router = MiniMLPRouter(NAMES, config, embedding=embedding if variant == "backbone" else None)
    router.temperature.fill_(1.7)
    router.save(tmp_path, metrics={"accuracy": 0.98})
    written = json.loads((tmp_path / "router.json").read_text())
    assert written["names"] == list(NAMES)
    assert written["temperature"] == pytest.approx(1.7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["router.json", "router.safetensors"]
    loaded = MiniMLPRouter.load(tmp_path, embedding)
    ids = torch.tensor([[3, 4, 44]])
    mask = torch.ones_like(ids)
    assert torch.equal(loaded.probabilities(ids, mask)[0], router.eval().probabilities(ids, mask)[0])
    assert loaded.names == NAMES
    assert loaded.config == config
    assert loaded.metrics == {"accuracy": 0.98}
    assert not loaded.training


def test_load_says_what_is_wrong(tmp_path: Path, embedding: nn.Embedding) -> None:
    with pytest.raises(MethodError, match=r"router\.json is missing"):
        MiniMLPRouter.load(tmp_path, embedding)
    small(embedding).save(tmp_path)
    with pytest.raises(MethodError, match=r"\(50, 12\).*\(50, 16\)"):
        MiniMLPRouter.load(tmp_path, nn.Embedding(50, 16))
    content = (tmp_path / "router.safetensors").read_bytes()
    (tmp_path / "router.safetensors").write_bytes(content[:100])
    with pytest.raises(MethodError, match=r"cannot read .*router\.safetensors"):
        MiniMLPRouter.load(tmp_path, embedding)
    description = json.loads((tmp_path / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps({**description, "format": 1}))
    with pytest.raises(MethodError, match="format 1, expected 2"):
        MiniMLPRouter.load(tmp_path, embedding)
    (tmp_path / "router.json").write_text("{")
    with pytest.raises(MethodError, match=r"router\.json: not JSON"):
        MiniMLPRouter.load(tmp_path, embedding)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda one: torch.full_like(one, torch.nan), "holds NaN or infinite values"),
        (lambda one: torch.full_like(one, -torch.inf), "holds NaN or infinite values"),
        (lambda one: one.double() * 0 + 1e300, "holds NaN or infinite values"),
        (lambda one: torch.full_like(one, 1e30), r"holds NaN or infinite values, or values beyond 1e\+18"),
        (lambda one: one.to(torch.int16), "is stored as int16"),
    ],
)
def test_numbers_that_no_router_computes_with(damage: Any, message: str, tmp_path: Path, embedding: nn.Embedding) -> None:
    small(embedding).save(tmp_path)
    file = tmp_path / "router.safetensors"
    sound = load_file(file)
    for key in sound:
        save_file(sound | {key: damage(sound[key])}, file)
        with pytest.raises(MethodError, match=rf"'{key}' {message}") as caught:
            MiniMLPRouter.load(tmp_path, embedding)
        assert "\n" not in str(caught.value)


def test_column_order_goes_by_name(embedding: nn.Embedding) -> None:
    router = small(embedding)
    assert router.column_order(["gamma", "alpha", "beta"]).tolist() == [2, 0, 1]
    with pytest.raises(MethodError, match=r"without a router class \['delta'\].*without an adapter \['beta'\]"):
        router.column_order(["gamma", "alpha", "delta"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden": (8, 8)}, "three positive widths"),
        ({"hidden": (8, 0, 8)}, "three positive widths"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"dropout": 1.0}, "dropout"),
        ({"variant": "table", "table_rows": 0}, "table"),
    ],
)
def test_bad_shapes_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterConfig(**config)  # type: ignore[arg-type]


def test_more_than_five_million_parameters_are_refused(embedding: nn.Embedding) -> None:
    with pytest.raises(ConfigError, match="at most 5,000,000"):
        MiniMLPRouter(NAMES, RouterConfig(hidden=(2000, 2000, 600)), embedding=embedding)
    with pytest.raises(ConfigError, match="distinct"):
        MiniMLPRouter(("a", "a"), embedding=embedding)
    with pytest.raises(ConfigError, match="needs the base model's input embedding"):
        MiniMLPRouter(NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 1e-300}, r"router\.json: 'temperature' is 1e-300, but router\.safetensors, which is used, holds 1\.7"),
        ({"temperature": 1e300}, "'temperature' is 1e[+]?300"),
        ({"temperature": 1.0}, "'temperature' is 1.0, but"),
        ({"temperature": 1.7001}, "'temperature' is 1.7001, but"),
        ({"temperature": None}, "temperature"),
        ({"temperature": "1.7"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({}, "missing required key.s.: temperature"),
    ],
)
def test_the_temperature_is_that_of_the_tensors(change: Any, message: str, tmp_path: Path, embedding: nn.Embedding) -> None:
    """The tensors' value is used, so another one in the description would be believed and do nothing."""
    router = small(embedding)
    router.temperature.fill_(1.7)
    router.save(tmp_path)
    assert float(MiniMLPRouter.load(tmp_path, embedding).temperature) == pytest.approx(1.7)
    file = tmp_path / "router.json"
    description = json.loads(file.read_text())
    del description["temperature"]
    file.write_text(json.dumps(description | change))
    with pytest.raises(MethodError, match=message) as caught:
        MiniMLPRouter.load(tmp_path, embedding)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_tensors_stored_in_another_precision_keep_their_temperature(dtype: torch.dtype, tmp_path: Path, embedding: nn.Embedding) -> None:
    router = small(embedding)
    router.temperature.fill_(0.9312456250190735)
    router.save(tmp_path)
    file = tmp_path / "router.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file)
    assert float(MiniMLPRouter.load(tmp_path, embedding).temperature) == pytest.approx(0.9312, rel=0.005)


@pytest.mark.parametrize("key", ["validation_accuracy", "validation_calibration_error"])
@pytest.mark.parametrize("value", [7, -0.1, "x", "0.9", True, [0.9], 1.0000001, None, 0, 1, 0.5])
def test_measurements_that_are_used_are_shares(key: str, value: Any, tmp_path: Path, embedding: nn.Embedding) -> None:
    small(embedding).save(tmp_path, metrics={key: value, "other": "text"})
    if value is None or (not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value <= 1):
        assert MiniMLPRouter.load(tmp_path, embedding).metrics[key] == value
        return
    with pytest.raises(MethodError, match=rf"router\.json: router: '{key}' under 'metrics' must be a number from 0 to 1"):
        MiniMLPRouter.load(tmp_path, embedding)
