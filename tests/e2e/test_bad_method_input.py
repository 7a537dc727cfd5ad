"""What a user may get wrong about a method: exit 2, one line that says what was wrong and where, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlplora.adapters.pool import write_manifest
from dlplora.cli.main import main
from dlplora.inference.loading import nano_asset


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``dlplora eval`` with the arguments, checks that it was refused and wrote nothing, and returns its last line."""

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        out = tmp_path / "out"
        assert main(["eval", "--tasks", "shelf_sorting", "--limit", "1", "--out", str(out), *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        return captured.err.strip().splitlines()[-1]

    return run


def test_an_unknown_method(refused: Callable[..., str]) -> None:
    said = refused("--method", "arow_out")
    assert "unknown method 'arow_out'. Did you mean 'arrow_out'?" in said
    assert all(name in said for name in ("arrow_factor", "dlp_composite", "lorahub_in_pool", "xlora_frozen"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("method: mole\nparams: {balence: 1.0}\n", ["mine.yaml", "'balence'", "Did you mean 'balance'?"]),
        ("method: mole\nparms: {balance: 1.0}\n", ["mine.yaml", "'parms'", "Did you mean 'params'?"]),
        ("method: mole\nbatch_size: 4\n", ["mine.yaml", "'batch_size' belongs to the evaluation protocol", "method, params"]),
        ("method: mole\nparams: {dtype: float16}\n", ["mine.yaml", "'dtype' belongs to the evaluation protocol", "balance, projection"]),
    ],
)
def test_a_key_that_does_not_belong(refused: Callable[..., str], tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    said = refused("--method", str(tmp_path / "mine.yaml"))
    assert all(part in said for part in parts), said


FACTOR = ["avg_factor", "arrow_factor", "retriever_fusion", "lorahub_in_pool", "lorahub_leave_one_out"]


@pytest.mark.parametrize("preset", FACTOR)
def test_unequal_ranks_for_a_sum_of_factors(
    preset: str, refused: Callable[..., str], tiny_llama_folder: Path, tiny_pool: Path, tmp_path: Path
) -> None:
    for name, source in (("beta", "beta"), ("gamma", "gamma"), ("shelf_sorting", "alpha")):
        shutil.copytree(tiny_pool / source, tmp_path / "pool" / name)
    said = refused("--method", preset, "--pretrained", str(tiny_llama_folder), "--pool", str(tmp_path / "pool"))
    assert "module 'model.layers.0.self_attn.q_proj' has: beta 6, gamma 2, shelf_sorting 4" in said
    assert "sums the factors" in said


@pytest.mark.parametrize("preset", FACTOR)
def test_unequal_targets_for_a_sum_of_factors(
    preset: str, refused: Callable[..., str], tiny_llama_folder: Path, make_adapter: Any, tmp_path: Path
) -> None:
    make_adapter(tmp_path / "pool" / "shelf_sorting", seed=1)
    make_adapter(tmp_path / "pool" / "values", seed=2, target_modules=["v_proj"])
    said = refused("--method", preset, "--pretrained", str(tiny_llama_folder), "--pool", str(tmp_path / "pool"))
    assert "module 'model.layers.0.self_attn.q_proj' has: shelf_sorting 4, values not adapted" in said


def exchanged_pool(folder: Path, names: list[str]) -> Path:
    """The embedded pool with the adapters of two experts exchanged: the same names in the same order, other weights."""
    for name, source in zip(names, [names[1], names[0], *names[2:]], strict=True):
        shutil.copytree(nano_asset("pool") / source, folder / name)
    write_manifest(folder, names, None)
    return folder


def test_gates_of_another_pool(refused: Callable[..., str], tmp_path: Path) -> None:
    gates = nano_asset("trained") / "xlora"
    made_for = json.loads((gates / "method.json").read_text())
    said = refused("--method", "xlora", "--trained", str(gates), "--pool", str(exchanged_pool(tmp_path / "exchanged", made_for["experts"])))
    assert f"was made for a pool with checksum {made_for['pool_sha256'][:12]}, this pool has " in said
    assert said.count(made_for["pool_sha256"][:12]) == 1
    for name in made_for["experts"][:3]:
        shutil.copytree(nano_asset("pool") / name, tmp_path / "fewer" / name)
    write_manifest(tmp_path / "fewer", made_for["experts"][:3], None)
    said = refused("--method", "xlora", "--trained", str(gates), "--pool", str(tmp_path / "fewer"))
    assert f"was made for experts {made_for['experts']}, the bank has {made_for['experts'][:3]}" in said
    said = refused("--method", "xlora", "--trained", str(nano_asset("trained") / "mole"))
    assert "holds method 'mole', expected 'xlora'" in said
