"""kill -9 at random points: the same command afterwards ends where an undisturbed one ends, and takes up what was finished."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlplora.cli.main import main
from dlplora.config import configs_root
from tests.campaign.killing import run
from tests.campaign.workplace import make_workplace

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SEED = 20261126
IMPORTED = (
    "dlplora.training.launch",
    "dlplora.training.expert",
    "dlplora.training.router",
    "dlplora.training.fusion",
    "dlplora.data.datamodule",
    "dlplora.training.checkpoints",
    "dlplora.training.expert_pool",
    "dlplora.lm_eval.evaluate",
    "dlplora.cli.report",
    "dlplora.reproduce.pipeline",
    "dlplora.reporting.drawing",
    "torch._dynamo",
    "lm_eval.evaluator",
    "lm_eval.tasks",
    "scipy.stats",
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace whose trainings write a resume file after every second step."""
    for module in IMPORTED:  # once, before the forks
        importlib.import_module(module)
    root = make_workplace(tmp_path_factory.mktemp("sound"))
    gates = yaml.safe_load((configs_root() / "train" / "fusion.yaml").read_text())
    gates["model"]["init_args"] |= {"method": "mole", "pretrained": "model", "pool": "pool", "export_folder": "fits/gates_export"}
    data = {"suite": "local:all", "data_root": "rows", "batch_size": 2, "num_train": 8, "num_validation": 2, "num_test": 2, "num_steps": 6}
    gates["data"]["init_args"] |= data
    gates["trainer"] |= {"default_root_dir": "fits/gates", "logger": False}
    (root / "fit_gates.yaml").write_text(yaml.safe_dump(gates))
    for name in ("expert", "router", "gates"):
        path = root / f"fit_{name}.yaml"
        content = yaml.safe_load(path.read_text())
        content["trainer"]["callbacks"][0]["init_args"]["every_n_steps"] = 2
        if name == "expert":
            content["data"]["init_args"]["num_steps"] = 6
        path.write_text(yaml.safe_dump(content))
    return root


def hashes(root: Path, within: str) -> dict[str, str]:
    """Checksums of the files of a folder, without hidden ones and without what holds times and places."""
    found = {}
    for path in sorted((root / within).rglob("*")):
        name = str(path.relative_to(root))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            content = (
                re.sub(rb'"[^"]*(seconds|time|_s)": [\d.e-]+', b"", path.read_bytes()) if path.suffix == ".json" else path.read_bytes()
            )
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def command(root: Path, *arguments: str) -> int:
    os.chdir(root)
    return main(arguments)


def pool_of(root: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The files of a pool and what its manifest says, but for the places that the adapters came from."""
    files, manifest = hashes(root, "pool"), json.loads((root / "pool" / "pool.json").read_text())
    del files["pool/pool.json"]
    for row in manifest["adapters"]:
        del row["source"]
    return files, manifest


def points(work: Callable[[Path], Any], sound: Path, tmp_path: Path, number: int, name: str) -> tuple[Path, list[int]]:
    """The undisturbed workplace, and the changes before which the work is going to be killed."""
    undisturbed = Path(shutil.copytree(sound, tmp_path / "undisturbed"))
    count = run(partial(work, undisturbed), undisturbed, tmp_path / "undisturbed.log")
    rng = random.Random(f"{SEED}{name}")
    return undisturbed, sorted(rng.sample(range(count), number))  # fails if the work makes fewer changes


def check_fit(name: str, number: int, sound: Path, tmp_path: Path) -> None:
    arguments = ("fit", "--config", f"fit_{name}.yaml", "--ckpt_path", "last")

    def fit(root: Path) -> int:
        return command(root, *arguments)

    undisturbed, steps = points(fit, sound, tmp_path, number, name)
    expected = hashes(undisturbed, f"fits/{name}_export")
    assert expected
    resumed = 0
    for step in steps:
        place, log = Path(shutil.copytree(sound, tmp_path / f"{name}{step}")), tmp_path / f"{name}{step}.log"
        assert run(partial(fit, place), place, log, kill_before=step) == -1
        there = sorted((place / "fits" / name).rglob("step=*.ckpt"))
        run(partial(fit, place), place, log)
        said = log.read_text()
        if there:  # finished work was taken up, from the newest file that is whole
            assert f"resuming from {there[-1].relative_to(place)}" in said or f"resuming from {there[-2].relative_to(place)}" in said, said
            resumed += 1
        assert hashes(place, f"fits/{name}_export") == expected, f"killed before change {step}"
        shutil.rmtree(place)
    assert resumed or number < 3


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["expert", "router", "gates"])
def test_fit(name: str, sound: Path, tmp_path: Path) -> None:
    check_fit(name, 9, sound, tmp_path)


def add(root: Path) -> int:
    return command(root, "pool", "add", "pool", "delta")


@pytest.mark.campaign
def test_pool_add(sound: Path, tmp_path: Path) -> None:
    undisturbed, steps = points(add, sound, tmp_path, 6, "add")
    for step in steps:
        place, log = Path(shutil.copytree(sound, tmp_path / f"add{step}")), tmp_path / "add.log"
        assert run(partial(add, place), place, log, kill_before=step) == -1
        run(partial(add, place), place, log)
        assert pool_of(place) == pool_of(undisturbed)
        assert [path.name for path in (place / "pool").iterdir() if path.name.startswith(".")] in ([], [".lock"])


def report(root: Path) -> int:
    return command(root, "report", "all", "--out", "results")


@pytest.mark.campaign
def test_report(sound: Path, tmp_path: Path) -> None:
    undisturbed, steps = points(report, sound, tmp_path, 6, "report")
    records = hashes(sound, "results")
    expected = {name: value for name, value in hashes(undisturbed, "results").items() if not name.endswith((".svg", ".html", ".png"))}
    names = set(hashes(undisturbed, "results"))
    for step in steps:
        place, log = Path(shutil.copytree(sound, tmp_path / f"report{step}")), tmp_path / "report.log"
        assert run(partial(report, place), place, log, kill_before=step) == -1
        assert {name: value for name, value in hashes(place, "results").items() if name in records} == records
        run(partial(report, place), place, log)
        found = hashes(place, "results")
        assert set(found) == names
        assert {name: found[name] for name in expected} == expected


def reproduce(root: Path) -> int:
    """What ``dlplora reproduce`` does over a setting of its own: train, evaluate, write tables. Trainings run in this process."""
    from dlplora.evaluation.protocol import load_protocol
    from dlplora.reproduce import pipeline, training
    from dlplora.reproduce.recipe import Setting

    os.chdir(root)

    class Done:
        """A training that has ended."""

        returncode = 0

        def poll(self) -> int:
            return 0

        def wait(self, timeout: float | None = None) -> int:
            return 0

    def here(arguments: list[str], **_: Any) -> Any:
        assert main(arguments[3:]) == 0
        return Done()

    training._start = here  # type: ignore[assignment]
    resume = "--trainer.callbacks.init_args.every_n_steps=2"
    sizes = ["--data.init_args.num_train=8", "--data.init_args.batch_size=2", "--data.init_args.num_validation=2"]
    setting = Setting(
        backbone="model",
        suite="local:alpha,beta,gamma",
        data_root="rows",
        options={
            "all": [*sizes, resume, "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.logger=false"],
            "pool": ["--data.init_args.num_steps=6"],
        },
        processes=1,
    )
    job = pipeline.make_job(["avg_delta", "dlp"], [0], Path("runs"), fresh=False, setting=setting)
    folders = pipeline.train_missing(job, Path("runs"), print)
    protocol = load_protocol("protocol.yaml", {"suite": setting.suite, "tasks": None})
    planned = pipeline.runs_of(job, protocol, "protocol", folders, 2)
    pipeline.evaluate_missing(planned, Path("out"), print)
    return 0


def numbers(root: Path) -> Mapping[str, Any]:
    """What the records say of the tasks, and the checksums of what was trained."""
    records = [json.loads(path.read_text()) for path in sorted((root / "out").rglob("*.json"))]
    found: dict[str, Any] = {record["method_name"]: (record["cell"], record["tasks"], record["pool_hash"]) for record in records}
    for path in sorted((root / "runs").rglob("*.safetensors")):
        if not any(part.startswith(".") or "training" in part for part in path.relative_to(root).parts):
            found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.campaign
def test_reproduce(sound: Path, tmp_path: Path) -> None:
    undisturbed, steps = points(reproduce, sound, tmp_path, 11, "reproduce")
    expected = numbers(undisturbed)
    assert {"avg_delta", "dlp"} <= set(expected)
    for step in steps:
        place, log = Path(shutil.copytree(sound, tmp_path / f"reproduce{step}")), tmp_path / f"reproduce{step}.log"
        assert run(partial(reproduce, place), place, log, kill_before=step) == -1
        finished = {path: path.stat().st_mtime_ns for path in [*(place / "out").rglob("*.json"), *(place / "runs").rglob("recipe.json")]}
        run(partial(reproduce, place), place, log)
        said = log.read_text()
        assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished work was done again"
        assert said.count("reused") == sum(path.parts[-4:-1] != () and "out" in path.parts for path in finished)
        assert numbers(place) == expected, f"killed before change {step}"
        shutil.rmtree(place)


def test_a_short_sample(sound: Path, tmp_path: Path) -> None:
    """Two points of an addition."""
    undisturbed, steps = points(add, sound, tmp_path, 2, "short")
    for step in steps:
        place, log = Path(shutil.copytree(sound, tmp_path / f"short{step}")), tmp_path / "short.log"
        assert run(partial(add, place), place, log, kill_before=step) == -1
        run(partial(add, place), place, log)
        assert pool_of(place) == pool_of(undisturbed)
