"""The wheel in an environment of its own, outside the clone: what it holds, what it leaves alone, and that it works."""

from __future__ import annotations

import importlib.util
import json
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import distributions as installed_distributions
from pathlib import Path

import pytest

from dlplora import __version__
from tests.packaging.environments import Environment, run

pytestmark = pytest.mark.packaging


@pytest.fixture(scope="module")
def environment(make_environment: Callable[[str], Environment], distributions: dict[str, Path]) -> Environment:
    made = make_environment("pip")
    made.install("lm-eval", distributions["wheel"])
    return made


def test_what_the_wheel_holds(distributions: dict[str, Path]) -> None:
    names = zipfile.ZipFile(distributions["wheel"]).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "dlplora", "_dlplora_lm_eval.py", "dlplora_lm_eval.pth", f"dlplora-{__version__}.dist-info",
    }  # fmt: skip
    assert {"dlplora/py.typed", "dlplora/baselines/arrow.py", "dlplora/_configs/train/router.yaml"} <= set(names)


def test_twine_accepts_both(distributions: dict[str, Path], tmp_path: Path) -> None:
    if importlib.util.find_spec("twine") is None:
        pytest.skip("twine is not installed: pip install -e '.[packaging]'")
    run([sys.executable, "-m", "twine", "check", "--strict", *distributions.values()], tmp_path)


def test_no_file_belongs_to_another_distribution_as_well(environment: Environment, shared_packages: Path) -> None:
    owners: dict[str, set[str]] = {}
    for found in installed_distributions(path=[str(environment.site_packages), str(shared_packages)]):
        for path in found.files or ():
            owners.setdefault(str(path), set()).add(found.name)
    assert owners["dlplora/__init__.py"] == {"dlplora"}
    assert not {path: names for path, names in owners.items() if "dlplora" in names and len(names) > 1}


def test_the_commands_work_without_the_clone(environment: Environment, tmp_path: Path) -> None:
    dlplora = environment.script("dlplora")
    assert run([dlplora, "--version"], tmp_path).stdout == f"dlplora {__version__}\n"
    listed = run([dlplora, "methods"], tmp_path).stdout
    assert "| arrow_out |" in listed
    assert "| dlp |" in listed
    traced = run([dlplora, "generate", "Question: 1 + 1?", "--max-new-tokens", "4", "--trace"], tmp_path).stdout
    assert traced.strip()
    found = run([environment.python, "-c", "import dlplora.baselines.arrow as found; print(found.__file__)"], tmp_path).stdout
    assert Path(found.strip()).is_relative_to(environment.site_packages)
    for command in (["fit", "--config", "router"], ["fit", "router"]):
        assert "LitRouter" in run([dlplora, *command, "--print_config"], tmp_path).stdout
    assert "LitExpertPool" in run([environment.script("lightning"), "run", "experts", "--print_config"], tmp_path).stdout
    doctor = json.loads(run([dlplora, "doctor", "--json"], tmp_path).stdout)
    assert doctor["commands"]["lm_eval"].startswith("ok:")
    assert doctor["configs"].startswith(str(environment.site_packages))


def test_a_shipped_configuration_trains_without_the_clone(environment: Environment, tmp_path: Path) -> None:
    small = ["--data.init_args.tasks", "shelf_sorting,warehouse_codes", "--data.init_args.num_train", "8", "--trainer.max_epochs", "1"]
    done = run([environment.script("lightning"), "run", "router", *small], tmp_path)
    assert json.loads(done.stdout.splitlines()[-1])["command"] == "fit"
    assert (tmp_path / "runs" / "nano" / "router" / "router.safetensors").is_file()
