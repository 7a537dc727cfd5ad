"""Fixtures of the packaging tests. They need the package index (for lm-eval's releases and the build backend) and ``uv``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.environments import ROOT, Environment, run

INSTALLED_FOR_REAL = ("lm_eval", "dlplora", "_dlplora", "_editable_impl_dlplora", "__editable__")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave these tests out unless ``-m packaging`` asks for them: they take half an hour."""
    if "packaging" in (config.getoption("markexpr") or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("packaging")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def shared_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to everything installed here but lm-eval, dlplora and start-up files."""
    folder = tmp_path_factory.mktemp("shared") / "site-packages"  # dill, which hashes data sets, knows packages by this name
    folder.mkdir()
    for place in sys.path:
        if not place.endswith("site-packages"):
            continue
        for entry in Path(place).iterdir():
            link = folder / entry.name
            if not entry.name.startswith(INSTALLED_FOR_REAL) and entry.suffix != ".pth" and not link.exists():
                link.symlink_to(entry)
    return folder


@pytest.fixture(scope="session")
def make_environment(shared_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Environment]:
    """Make an environment without dlplora and lm-eval."""

    def make(installer: str) -> Environment:
        if installer == "uv" and shutil.which("uv") is None:
            pytest.skip("uv is not installed: pip install -e '.[packaging]'")
        made = Environment(tmp_path_factory.mktemp("environment") / "venv", installer)
        run([sys.executable, "-m", "venv", "--without-pip", made.folder], made.folder.parent)
        (made.site_packages / "zz_shared.pth").write_text(f"{shared_packages}\n")
        return made

    return make


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source distribution and the wheel of this tree."""
    pytest.importorskip("build", reason="build is not installed: pip install -e '.[packaging]'")
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--outdir", folder, ROOT], folder)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": source}
