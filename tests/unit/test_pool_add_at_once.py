"""Several additions to one pool at the same time, and the pool's folder that they make and take away."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dlplora.adapters.add import add_adapter
from dlplora.adapters.config import WEIGHTS_NAME as WEIGHTS
from dlplora.adapters.files import file_sha256
from dlplora.adapters.pool import load_pool
from dlplora.errors import AdapterError, PoolError


def test_two_additions_at_once(tmp_path: Path, tiny_pool: Path) -> None:
    with ThreadPoolExecutor(3) as workers:
        list(workers.map(lambda name: add_adapter(tmp_path / "pool", tiny_pool / name), ("alpha", "beta", "gamma")))
    assert sorted(load_pool(tmp_path / "pool").names) == ["alpha", "beta", "gamma"]


def test_an_addition_that_fails_beside_others_harms_none(tmp_path: Path, tiny_pool: Path) -> None:
    """Whoever makes the pool's folder, and whoever takes it away again, the good adapters arrive and the bad ones leave nothing."""
    broken = Path(shutil.copytree(tiny_pool / "alpha", tmp_path / "broken"))
    (broken / WEIGHTS).write_bytes(b"not a tensor")
    expected = {name: file_sha256(tiny_pool / name / WEIGHTS) for name in ("beta", "gamma")}

    def attempt(pool: Path, source: Path) -> bool:
        try:
            add_adapter(pool, source)
        except AdapterError:
            return False
        return True

    for number in range(40):
        pool = tmp_path / f"new{number}" / "pool"
        sources = [broken, tiny_pool / "beta", broken, tiny_pool / "gamma"]
        with ThreadPoolExecutor(len(sources)) as workers:
            assert list(workers.map(attempt, [pool] * len(sources), sources)) == [False, True, False, True]
        assert sorted(load_pool(pool).names) == ["beta", "gamma"]
        assert {name: file_sha256(pool / name / WEIGHTS) for name in expected} == expected
        assert sorted(path.name for path in pool.iterdir() if path.is_dir()) == ["beta", "gamma"]


def test_a_link_to_nowhere_is_no_pool(tmp_path: Path, tiny_pool: Path) -> None:
    (tmp_path / "pool").symlink_to(tmp_path / "gone")
    with pytest.raises(PoolError, match="broken symbolic link"):
        add_adapter(tmp_path / "pool", tiny_pool / "alpha")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pool"]
