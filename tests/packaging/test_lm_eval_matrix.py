"""lm-eval knows ``dlplora`` in every kind of installation, and keeps its own command: installer x kind x order x release.

In every environment the commands give a refusal that only our code gives, and Python finds the model and the tasks. ``THOROUGH`` ones,
which hold each installer, kind, order and release, run a real evaluation through all four doors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from dlplora.lm_eval.versions import TESTED
from tests.packaging.environments import ROOT, Environment, run

pytestmark = pytest.mark.packaging

RELEASES = ("0.4.10", "0.4.11", "0.4.12", "0.4.13")
THOROUGH = {("pip", "wheel", "lm-eval first"), ("uv", "editable", "dlplora first")}
TASK = "dlplora_nano_object_counting"
SMALL = ["--model", "dlplora", "--tasks", TASK, "--limit", "2", "--device", "cpu"]
KNOWN = """
import lm_eval.models
from lm_eval.api.registry import model_registry as models
from lm_eval.tasks import TaskManager
print("dlplora" in models, "hf" in models, "dlplora_nano_mcq" in TaskManager(include_defaults=False).all_groups)
"""
SIMPLE_EVALUATE = f"""
import lm_eval
from lm_eval.tasks import TaskManager
manager = TaskManager(include_defaults=False)
found = lm_eval.simple_evaluate(model="dlplora", tasks=["{TASK}"], limit=2, device="cpu", task_manager=manager)
print("{TASK}", found["results"]["{TASK}"]["acc,none"])
"""


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The wheel of a release of lm-eval, from the package index."""
    folder = tmp_path_factory.mktemp("lm_eval")

    @cache
    def download(version: str) -> Path:
        done = run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, f"lm-eval=={version}"], folder, code=None)
        if done.returncode:
            pytest.skip(f"lm-eval {version} cannot be had from the package index: {done.stderr[-200:]}")
        (found,) = folder.glob(f"lm_eval-{version}-*.whl")
        return found

    return download


def doors(environment: Environment) -> dict[str, list[str | Path]]:
    """The commands that reach lm-eval."""
    python = environment.python
    return {
        "lm_eval": [environment.script("lm_eval")],
        "python -m lm_eval": [python, "-m", "lm_eval"],
        "accelerate launch -m lm_eval": [python, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "lm_eval"],
    }


def test_the_releases_are_those_that_users_are_told() -> None:
    assert (RELEASES[0], RELEASES[-1]) == TESTED


@pytest.mark.parametrize("version", RELEASES)
@pytest.mark.parametrize("order", ["lm-eval first", "dlplora first"])
@pytest.mark.parametrize("kind", ["wheel", "editable"])
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_every_door_of_lm_eval(
    installer: str,
    kind: str,
    order: str,
    version: str,
    make_environment: Callable[[str], Environment],
    distributions: dict[str, Path],
    release: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    environment = make_environment(installer)
    ours: list[str | Path] = [distributions["wheel"]] if kind == "wheel" else ["--editable", ROOT]
    steps: list[list[str | Path]] = [[release(version)], ours]
    for what in steps if order == "lm-eval first" else reversed(steps):
        environment.install(*what)
    scripts = {name: environment.script(name).read_bytes() for name in ("lm_eval", "lm-eval")}
    for content in scripts.values():
        assert b"lm_eval.__main__" in content
        assert b"dlplora" not in content.split(b"\n", 1)[1]

    assert run([environment.python, "-c", KNOWN], tmp_path).stdout == "True True True\n"
    for door in ([environment.script("lm_eval")], [environment.script("lm-eval"), "run"], [environment.python, "-m", "lm_eval"]):
        refused = run([*door, *SMALL, "--use_cache", "c"], tmp_path, code=2).stderr
        assert refused.startswith("lm_eval: --use_cache is refused")
        assert refused.count("\n") == 1
    if (installer, kind, order) in THOROUGH:
        for name, door in doors(environment).items():
            assert f"|{TASK}|" in run([*door, *SMALL], tmp_path).stdout, name
        assert f"\n{TASK} " in "\n" + run([environment.python, "-c", SIMPLE_EVALUATE], tmp_path).stdout

    environment.uninstall("dlplora")
    place = environment.site_packages
    left = [path for path in place.rglob("*") if "dlplora" in str(path.relative_to(place)) and path.is_file() and path.suffix != ".pyc"]
    assert left == []
    for name, content in scripts.items():
        assert environment.script(name).read_bytes() == content
        assert run([environment.script(name), "--help"], tmp_path).stderr == ""
    assert run([environment.python, "-c", KNOWN], tmp_path).stdout == "False True False\n"
