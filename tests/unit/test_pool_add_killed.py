"""``pool add`` killed at every change it makes on disk: the next one of the same adapter completes it, and nothing is left over."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dlplora.adapters.add import LOCK_NAME, add_adapter, place_adapter
from dlplora.adapters.config import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from dlplora.adapters.files import file_sha256
from dlplora.adapters.pool import MANIFEST_NAME, load_pool
from dlplora.cli.main import main

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
STEPS = {"open", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.chmod", "shutil.copyfile", "shutil.rmtree"}
KILLED = 137


def contents(folder: Path) -> dict[str, str]:
    found = (path for path in sorted(folder.rglob("*")) if path.name != LOCK_NAME)
    return {str(path.relative_to(folder)): file_sha256(path) if path.is_file() else "folder" for path in found}


def killed_at(step: int, folder: Path, work: Callable[[], Any]) -> bool:
    """Run ``work`` in a child process that ends without any clean-up before a change below ``folder``; False if it finished."""
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in STEPS and not reads and any(str(folder) in str(one) for one in arguments):
                left -= 1
                if left < 0:
                    os._exit(KILLED)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in {0, KILLED}
    return code == KILLED


def _new(place: Path, tiny_pool: Path) -> None:
    """No pool yet, nor its parent."""


def _listed(place: Path, tiny_pool: Path) -> None:
    add_adapter(place / "deep" / "pool", tiny_pool / "alpha")


def _unlisted(place: Path, tiny_pool: Path) -> None:
    shutil.copytree(tiny_pool / "alpha", place / "deep" / "pool" / "alpha")


def _empty(place: Path, tiny_pool: Path) -> None:
    (place / "deep" / "pool").mkdir(parents=True)


@pytest.mark.parametrize(("prepare", "pickled"), [(_new, False), (_new, True), (_listed, True), (_unlisted, False), (_empty, False)])
def test_the_next_addition_completes_it(prepare: Callable[[Path, Path], None], pickled: bool, tiny_pool: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_pool / "gamma", tmp_path / "gamma"))
    if pickled:
        torch.save(load_file(source / WEIGHTS_NAME), source / PICKLE_NAME)
        (source / WEIGHTS_NAME).unlink()

    def add(place: Path) -> Any:
        return place_adapter(place / "deep" / "pool", source, allow_pickle=pickled)

    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    prepare(undisturbed, tiny_pool)
    before = contents(undisturbed)
    add(undisturbed)
    expected = contents(undisturbed)
    step, completed, there = 0, 0, 0
    while True:
        place = tmp_path / f"killed{step}"
        place.mkdir()
        prepare(place, tiny_pool)
        if not killed_at(step, place, lambda place=place: add(place)):  # type: ignore[misc]
            break
        left = {name for name in contents(place) if not any(part.startswith(".") for part in Path(name).parts)}
        assert left <= set(expected)
        if prepare is _new:  # a pool appears whole
            assert left & {"deep/pool"} == set() or left == set(expected)
        there += add(place).was_there
        completed += 1
        assert contents(place).keys() == expected.keys(), step
        found = {name: value for name, value in contents(place).items() if not name.endswith(MANIFEST_NAME)}
        assert found == {name: value for name, value in expected.items() if not name.endswith(MANIFEST_NAME)}
        assert load_pool(place / "deep" / "pool").names == load_pool(undisturbed / "deep" / "pool").names
        assert load_pool(place / "deep" / "pool").checksum() == load_pool(undisturbed / "deep" / "pool").checksum()
        shutil.rmtree(place)
        step += 1
    assert completed >= 8
    assert there < completed
    assert contents(place).keys() == expected.keys()
    assert before.keys() < expected.keys()


def test_a_repeated_addition_says_so(tiny_pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("alpha", "beta"):
        assert main(["pool", "add", str(tmp_path / "pool"), str(tiny_pool / name)]) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert main(["pool", "add", str(tmp_path / "pool"), str(tiny_pool / "alpha")]) == 0
    assert capsys.readouterr().out.startswith("already there, with the same files: alpha: rank 4")
    assert contents(tmp_path) == before
    assert main(["pool", "add", str(tmp_path / "pool"), str(tiny_pool / "gamma"), "--name", "alpha"]) == 2
    assert "already has an adapter 'alpha'" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_folder_of_other_files_is_never_taken_for_the_adapter(
    tiny_pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_adapter(tmp_path / "pool", tiny_pool / "alpha")
    for spoilt in (CONFIG_NAME, WEIGHTS_NAME):
        folder = Path(shutil.copytree(tiny_pool / "beta", tmp_path / "pool" / "beta"))
        (folder / spoilt).unlink()
        before = contents(tmp_path)
        assert main(["pool", "add", str(tmp_path / "pool"), str(tiny_pool / "beta")]) == 2
        assert "is not listed in the pool" in capsys.readouterr().err
        assert contents(tmp_path) == before
        shutil.rmtree(folder)


def test_a_file_is_no_pool(tiny_pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pool").write_text("x")
    assert main(["pool", "add", str(tmp_path / "pool"), str(tiny_pool / "beta")]) == 2
    assert "is a file; a pool is a folder" in capsys.readouterr().err
    assert (tmp_path / "pool").read_text() == "x"
