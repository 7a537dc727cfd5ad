"""``dlplora new-method`` writes files that run as they are, and never over others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlplora.cli.main import main
from dlplora.cli.new_method import files_of
from dlplora.config import PACKAGE_ROOT
from dlplora.testing import conformance
from dlplora.testing.conformance import ConformanceError


def test_the_files_pass_their_own_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-method", "warm_start", "--dir", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert f'warm_start = "{tmp_path.name}.warm_start:WarmStart"' in printed.err
    assert {path.name for path in tmp_path.iterdir()} == {"warm_start.py", "warm_start.yaml", "test_warm_start.py"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 passed" in done.stdout
    before = (tmp_path / "warm_start.py").read_bytes()
    assert main(["new-method", "warm_start", "--dir", str(tmp_path)]) == 2
    assert "exists already; nothing was written" in capsys.readouterr().err
    assert (tmp_path / "warm_start.py").read_bytes() == before


def test_in_a_clone_the_files_go_where_the_registry_looks() -> None:
    clone = PACKAGE_ROOT.parent
    wanted = ["baselines/warm_start.py", "configs/method/warm_start.yaml", "tests/equivalence/test_warm_start.py"]
    assert [str(path.relative_to(clone)) for path in files_of("warm_start", None)] == wanted


def test_outside_the_clone_a_folder_must_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-method", "warm_start"]) == 2
    assert "pass --dir" in capsys.readouterr().err
    assert not (PACKAGE_ROOT.parent / "baselines" / "warm_start.py").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Warm", "lower-case"), ("../x", "lower-case"), ("class", "lower-case"), ("1a", "lower-case"), ("dlp", "exists already"),
        ("dlp_code", "exists already"),
    ],
)  # fmt: skip
def test_bad_names_are_one_line(name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-method", name, "--dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_weights_in_another_dtype_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["new-method", "precise", "--dir", str(tmp_path)]) == 0
    monkeypatch.syspath_prepend(str(tmp_path))
    from precise import Precise  # type: ignore[import-not-found]

    class Double(Precise):  # type: ignore[misc]
        def route(self, prompts: object) -> object:
            return super().route(prompts).double()

    with pytest.raises(ConformanceError, match=r"T8: route: weights are torch.float64"):
        conformance.check(Double)


def test_the_public_check_finds_a_wrong_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method whose weights depend on the other rows of the batch."""
    assert main(["new-method", "leaky", "--dir", str(tmp_path)]) == 0
    monkeypatch.syspath_prepend(str(tmp_path))
    from leaky import Leaky  # type: ignore[import-not-found]

    class Wrong(Leaky):  # type: ignore[misc]
        def route(self, prompts):  # type: ignore[no-untyped-def]
            return super().route(prompts) * len(prompts)

    conformance.check(Leaky, ("T4",))
    with pytest.raises(ConformanceError, match="T4"):
        conformance.check(Wrong, ("T4",))
