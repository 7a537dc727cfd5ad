"""Merges in core space and of singular vectors against numpy and scipy on whole matrices, read from the adapter files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.numpy import load_file

from dlplora.baselines.core_space import AvgCore, DareCore, TiesCore
from dlplora.baselines.merges import MergeConfig
from dlplora.baselines.singular_vectors import TSV, IsoC, IsoConfig, KnotsTies, SingularConfig, TSVConfig
from dlplora.baselines.wudi import Wudi, WudiAdam, WudiAdamConfig
from dlplora.errors import ConfigError
from dlplora.methods.base import FusionMethod, MethodContext
from dlplora.methods.registry import build_method
from dlplora.modules.lora_bank import AdapterBank

NAMES = ("alpha", "beta", "gamma")
Factors = list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def uneven_pool(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other ranks, other scalings, and other targets: gamma alone adapts k_proj, and not v_proj."""
    folder = tmp_path_factory.mktemp("uneven")
    make_adapter(folder / "alpha", seed=1)
    make_adapter(folder / "beta", seed=2, r=6, lora_alpha=3)
    make_adapter(folder / "gamma", seed=3, r=2, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "k_proj"])
    return folder


def factors_of(pool: Path) -> dict[str, Factors]:
    """Module -> (A, s B) of every expert that adapts it, float64."""
    found: dict[str, Factors] = {}
    for name in NAMES:
        config = json.loads((pool / name / "adapter_config.json").read_text())
        scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
        tensors = {key: value.astype(np.float64) for key, value in load_file(pool / name / "adapter_model.safetensors").items()}
        for key in tensors:
            if key.endswith("lora_A.weight"):
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                found.setdefault(module, []).append((tensors[key], scaling * tensors[key.replace("lora_A", "lora_B")]))
    return found


def taus_of(factors: Factors) -> list[np.ndarray]:
    return [b @ a for a, b in factors]


def merged(method: FusionMethod, pool: Path, tokenizer: Any, model: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """The one adapter's delta of every module, float64."""
    context = MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings(), seed=seed)
    bank = method.prepare(AdapterBank.from_pool(pool), context)
    assert bank.names == ("merged",)
    assert method.reported == {"num_merged": 3}
    return {
        path: float(entry.scaling[0]) * entry.lora_b[0].double().numpy() @ entry.lora_a[0].double().numpy()
        for path, entry in bank.modules.items()
    }


def bases(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """U (O, P) and V (Q, I) of the stacked factors."""
    left = np.linalg.svd(np.concatenate([b for _, b in factors], axis=1), full_matrices=False)[0]
    right = np.linalg.svd(np.concatenate([a for a, _ in factors]), full_matrices=False)[2]
    return left, right


def trimmed(values: np.ndarray, density: float) -> np.ndarray:
    out = np.zeros(values.size)
    order = np.argsort(-np.abs(values), axis=None)[: int(density * values.size)]
    out[order] = values.flatten()[order]
    return out.reshape(values.shape)


def elected(parts: list[np.ndarray]) -> np.ndarray:
    """TIES without trimming: the mean of what agrees with the sign of the sum."""
    stacked = np.stack(parts)
    sign = np.where(stacked.sum(0) >= 0, 1, -1)
    agrees = np.sign(stacked) == sign
    return (stacked * agrees).sum(0) / np.maximum(1, agrees.sum(0))


def every_module(pool: Path, got: dict[str, np.ndarray], truth: Callable[[Factors], np.ndarray], atol: float = 2e-5) -> None:
    factors = factors_of(pool)
    assert set(got) == set(factors)
    for path, delta in got.items():
        np.testing.assert_allclose(delta, truth(factors[path]), atol=atol, err_msg=path)


@pytest.mark.parametrize("pool", ["tiny_pool", "uneven_pool"])
def test_the_mean_of_the_cores_is_the_mean_of_the_deltas(pool: str, request: Any, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    """Lossless, ranks and targets as they come; the adapter has the sum of the ranks."""
    folder = request.getfixturevalue(pool)
    every_module(folder, merged(AvgCore(), folder, tiny_tokenizer, tiny_llama), lambda factors: sum(taus_of(factors)) / 3, atol=1e-5)
    bank = AvgCore().prepare(
        AdapterBank.from_pool(folder), MethodContext(tokenizer=tiny_tokenizer, embedding=tiny_llama.get_input_embeddings())
    )
    for path, factors in factors_of(folder).items():
        assert bank.modules[path].ranks == (min(sum(len(a) for a, _ in factors), *factors[0][1].shape[:1]),)


def test_twins_share_their_directions(make_adapter: Callable[..., Path], tiny_tokenizer: Any, tiny_llama: Any, tmp_path: Path) -> None:
    """A base has as many vectors as the stack has independent rows: three copies of a rank-4 adapter give rank 4."""
    for name in NAMES:
        make_adapter(tmp_path / name, seed=1)
    every_module(tmp_path, merged(AvgCore(), tmp_path, tiny_tokenizer, tiny_llama), lambda factors: taus_of(factors)[0], atol=1e-5)
    bank = TSV().prepare(
        AdapterBank.from_pool(tmp_path), MethodContext(tokenizer=tiny_tokenizer, embedding=tiny_llama.get_input_embeddings())
    )
    assert all(entry.ranks == (4,) for entry in bank.modules.values())


@pytest.mark.parametrize("pool", ["tiny_pool", "uneven_pool"])
def test_ties_in_the_coordinates_of_the_common_bases(pool: str, request: Any, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    def truth(factors: Factors) -> np.ndarray:
        left, right = bases(factors)
        cores = [trimmed(left.T @ tau @ right.T, 0.4) for tau in taus_of(factors)]
        return 0.7 * left @ elected(cores) @ right

    folder = request.getfixturevalue(pool)
    method = TiesCore(MergeConfig(density=0.4, weight=0.7))
    every_module(folder, merged(method, folder, tiny_tokenizer, tiny_llama), truth)


def test_dare_drops_entries_of_cores(tiny_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    """Every entry is TIES of a subset of the rescaled entries; one in eight lost all three; the seed decides which."""
    got = merged(DareCore(MergeConfig(density=0.5, weight=1.0)), tiny_pool, tiny_tokenizer, tiny_llama)
    other = merged(DareCore(MergeConfig(density=0.5, weight=1.0)), tiny_pool, tiny_tokenizer, tiny_llama, seed=1)
    lost = []
    for path, factors in factors_of(tiny_pool).items():
        left, right = bases(factors)
        cores = [2.0 * left.T @ tau @ right.T for tau in taus_of(factors)]
        options = np.stack([elected([core * (bits >> i & 1) for i, core in enumerate(cores)]) for bits in range(8)])
        core = left.T @ got[path] @ right.T
        assert np.abs(options - core).min(0).max() < 1e-4
        lost.append(np.isclose(core, 0.0, atol=1e-6).mean())
        assert np.abs(got[path] - other[path]).max() > 0.01
    assert np.mean(lost) == pytest.approx(1 / 8, abs=0.04)
    every_module(
        tiny_pool,
        merged(DareCore(MergeConfig(density=1.0, weight=1.0)), tiny_pool, tiny_tokenizer, tiny_llama),
        lambda factors: (
            bases(factors)[0] @ elected([bases(factors)[0].T @ t @ bases(factors)[1].T for t in taus_of(factors)]) @ bases(factors)[1]
        ),
    )


def tsv_by_hand(taus: list[np.ndarray], keep: list[int], weight: float = 1.0) -> np.ndarray:
    triples = [np.linalg.svd(tau) for tau in taus]
    left = np.concatenate([u[:, :k] for (u, _, _), k in zip(triples, keep, strict=True)], axis=1)
    right = np.concatenate([vt[:k] for (_, _, vt), k in zip(triples, keep, strict=True)])
    values = np.concatenate([s[:k] for (_, s, _), k in zip(triples, keep, strict=True)])
    return weight * scipy.linalg.polar(left)[0] @ np.diag(values) @ scipy.linalg.polar(right)[0]


def test_tsv_keeps_an_equal_share_of_whole_matrices(tiny_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    """min(I, O) / 3 is 10 at q_proj, which cuts nothing, and 5 at v_proj, which cuts one of beta's six triples."""

    def truth(factors: Factors) -> np.ndarray:
        share = min(taus_of(factors)[0].shape) // 3
        return tsv_by_hand(taus_of(factors), [min(share, len(a)) for a, _ in factors], 0.3)

    assert {min(taus_of(factors)[0].shape) // 3 for factors in factors_of(tiny_pool).values()} == {10, 5}
    every_module(tiny_pool, merged(TSV(TSVConfig(weight=0.3)), tiny_pool, tiny_tokenizer, tiny_llama), truth)


def test_tsv_in_core_space_cuts_nothing_of_adapters_of_one_rank(uniform_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    got = merged(TSV(TSVConfig(space="core")), uniform_pool, tiny_tokenizer, tiny_llama)
    every_module(uniform_pool, got, lambda factors: tsv_by_hand(taus_of(factors), [4, 4, 4]))


@pytest.mark.parametrize("mean_over", ["nonzero", "full"])
def test_iso_flattens_the_sum(mean_over: Any, tiny_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    def truth(factors: Factors) -> np.ndarray:
        u, s, vt = np.linalg.svd(sum(taus_of(factors)), full_matrices=False)
        rank = sum(len(a) for a, _ in factors)  # 12 of 32 or 16
        mean = s[:rank].mean() if mean_over == "nonzero" else s.mean()
        return 0.5 * mean * u[:, :rank] @ vt[:rank]

    every_module(tiny_pool, merged(IsoC(IsoConfig(mean_over=mean_over, weight=0.5)), tiny_pool, tiny_tokenizer, tiny_llama), truth)


@pytest.mark.parametrize("rank", [None, 5])
def test_knots_merges_the_parts_of_one_decomposition(rank: int | None, tiny_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    def truth(factors: Factors) -> np.ndarray:
        u, s, vt = np.linalg.svd(np.concatenate(taus_of(factors), axis=1), full_matrices=False)
        keep = sum(len(a) for a, _ in factors)
        parts = np.split(np.diag(s[:keep]) @ vt[:keep], 3, axis=1)
        whole = 0.7 * u[:, :keep] @ elected([trimmed(part, 0.3) for part in parts])
        left, values, right = np.linalg.svd(whole, full_matrices=False)
        return left[:, :rank] @ np.diag(values[:rank]) @ right[:rank]

    method = KnotsTies(MergeConfig(density=0.3, weight=0.7, svd_rank=rank))
    every_module(tiny_pool, merged(method, tiny_pool, tiny_tokenizer, tiny_llama), truth)


def wudi_loss(tau: Any, taus: list[Any]) -> Any:
    """The objective as the paper prints it; numpy or torch."""
    return sum((((tau - one) @ one.T) ** 2).sum() / (one**2).sum() for one in taus)


def least_squares(taus: list[np.ndarray]) -> np.ndarray:
    """The smallest minimiser, by a solver that never forms the normal equations."""
    columns = np.concatenate([one.T / np.linalg.norm(one) for one in taus], axis=1)
    targets = np.concatenate([one @ one.T / np.linalg.norm(one) for one in taus], axis=1)
    return scipy.linalg.lstsq(columns.T, targets.T, cond=1e-10)[0].T


@pytest.mark.parametrize("pool", ["tiny_pool", "uneven_pool"])
def test_wudi_is_the_least_squares_solution(pool: str, request: Any, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    folder = request.getfixturevalue(pool)
    got = merged(Wudi(), folder, tiny_tokenizer, tiny_llama)
    every_module(folder, got, lambda factors: least_squares(taus_of(factors)), atol=1e-4)
    for path, factors in factors_of(folder).items():
        taus = taus_of(factors)
        if len(taus) > 1:
            assert wudi_loss(got[path], taus) < wudi_loss(sum(taus), taus)


def overlapping(make_adapter: Callable[..., Path], folder: Path) -> Path:
    """Adapters that share inputs: 3 x 14 rows in 32 dimensions, so that no delta serves all of them."""
    for seed, name in enumerate(NAMES):
        make_adapter(folder / name, seed=seed, r=14, lora_alpha=14, target_modules=["q_proj"])
    return folder


def test_adam_approaches_the_closed_form(make_adapter: Callable[..., Path], tiny_tokenizer: Any, tiny_llama: Any, tmp_path: Path) -> None:
    """As released (300 steps of 1e-5) it hardly leaves its start; with larger steps it reaches the minimum, which nothing undercuts."""
    pool = overlapping(make_adapter, tmp_path)
    taus = taus_of(next(iter(factors_of(pool).values())))
    closed = merged(Wudi(), pool, tiny_tokenizer, tiny_llama)
    path = next(iter(closed))
    np.testing.assert_allclose(closed[path], least_squares(taus), atol=1e-4)
    start, losses, distances = sum(taus), [wudi_loss(sum(taus), taus)], []
    for steps, rate in ((300, 1e-5), (300, 1e-3), (1500, 2e-2)):
        found = merged(WudiAdam(WudiAdamConfig(steps=steps, learning_rate=rate)), pool, tiny_tokenizer, tiny_llama)[path]
        losses.append(wudi_loss(found, taus))
        distances.append(np.linalg.norm(found - closed[path]) / np.linalg.norm(closed[path] - start))
    losses.append(wudi_loss(closed[path], taus))
    assert losses == sorted(losses, reverse=True)
    assert distances[0] > 0.99
    assert distances == sorted(distances, reverse=True)
    assert distances[2] < 0.05


def test_adam_takes_the_steps_of_autograd_on_the_printed_loss(tiny_pool: Path, tiny_tokenizer: Any, tiny_llama: Any) -> None:
    def truth(factors: Factors) -> np.ndarray:
        taus = [torch.from_numpy(tau) for tau in taus_of(factors)]
        tau = torch.nn.Parameter(sum(taus))
        optimizer = torch.optim.Adam([tau], lr=1e-3)
        for _ in range(40):
            optimizer.zero_grad()
            wudi_loss(tau, taus).backward()
            optimizer.step()
        return tau.detach().numpy()

    method = WudiAdam(WudiAdamConfig(steps=40, learning_rate=1e-3))
    every_module(tiny_pool, merged(method, tiny_pool, tiny_tokenizer, tiny_llama), truth, atol=1e-5)


@pytest.mark.parametrize("name", ["avg_core", "ties_core", "dare_core", "tsv", "iso_c", "knots_ties", "wudi", "wudi_adam"])
def test_experts_that_do_not_adapt_a_module_leave_it_alone(name: str, uneven_pool: Path) -> None:
    """Gamma alone adapts k_proj: without gamma nothing is added there, and no merge divides by zero."""
    bank = build_method(name).merge(AdapterBank.from_pool(uneven_pool, NAMES), torch.tensor([0.5, 0.5, 0.0]))
    for path, entry in bank.modules.items():
        delta = entry.lora_b[0] @ entry.lora_a[0]
        assert torch.isfinite(delta).all()
        assert bool((delta == 0).all()) == ("k_proj" in path), path


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("tsv", {"svd_rank": 0}, "svd_rank"),
        ("tsv", {"space": "half"}, "space"),
        ("iso_c", {"mean_over": "most"}, "mean_over"),
        ("wudi_adam", {"steps": 0}, "steps"),
        ("wudi_adam", {"learning_rate": 0.0}, "learning_rate"),
        ("ties_core", {"density": 0.0}, "density"),
        ("avg_core", {"desnity": 0.5}, "density"),
    ],
)
def test_settings_out_of_range(name: str, options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        build_method(name, options)


def test_defaults_are_stated() -> None:
    assert build_method("iso_c").config == IsoConfig(mean_over="nonzero", weight=1.0)
    assert build_method("tsv").config == TSVConfig(space="full", weight=1.0)
    assert build_method("wudi").config == SingularConfig(weight=1.0)
    assert build_method("wudi_adam").config == WudiAdamConfig(steps=300, learning_rate=1e-5)
