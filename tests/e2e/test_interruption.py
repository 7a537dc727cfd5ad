"""Trainings that are asked to stop (SIGTERM): exit code 143, one line, and the same command ends where an undisturbed one ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from dlplora.cli.fit import main as fit
from dlplora.interruption import Terminated, raising_on_sigterm
from dlplora.reproduce import artifacts, training
from dlplora.reproduce.recipe import Setting
from tests.toy_tasks import write_tasks

DEADLINE_S = 180
STEPS = 150


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def command(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> list[str]:
    """Training of one small adapter, with a resume file every 20 steps."""
    content = yaml.safe_load(Path("configs/train/expert.yaml").read_text())
    resume = {"class_path": "dlplora.training.checkpoints.ResumeCheckpoint", "init_args": {"every_n_steps": 20}}
    content["trainer"] |= {"callbacks": [resume], "max_epochs": 1, "logger": False}
    content["model"]["init_args"]["backbone"] = str(tiny_llama_folder)
    content["data"]["init_args"] |= {
        "suite": "local:pets", "tasks": "all", "data_root": str(rows), "batch_size": 2, "num_steps": STEPS, "num_validation": 2,
    }  # fmt: skip
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(tmp_path / "it.yaml"), "--ckpt_path", "last"]


def places(root: Path) -> list[str]:
    return [f"--model.init_args.export_folder={root / 'export'}", f"--trainer.default_root_dir={root / 'logs'}"]


def wait_for(condition: Any, process: subprocess.Popen[Any]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, "the training ended before it could be interrupted"
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
def test_sigterm_in_fit_is_no_success_and_can_be_resumed(command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit([*command, *places(tmp_path / "whole")]) == 0
    whole = load_file(tmp_path / "whole" / "export" / "adapter_model.safetensors")
    capfd.readouterr()

    cut = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, "-m", "dlplora.training", *command, *places(cut)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_for(lambda: any((cut / "logs").rglob("step=*.ckpt")), process)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 143
    assert out == ""  # no summary of a finished run
    lines = said.strip().splitlines()
    assert lines[-1] == "interrupted; --ckpt_path last continues from the newest checkpoint."
    assert not any("Traceback" in line or "SIGTERM" in line for line in lines)
    assert lines[0] == "fit: preparing data and model"
    assert f"fit: started, {STEPS} batches" in lines
    assert not (cut / "export").exists()
    last = max(int(path.stem.removeprefix("step=")) for path in (cut / "logs").rglob("step=*.ckpt"))
    assert 20 <= last < STEPS

    assert fit([*command, *places(cut)]) == 0
    told = capfd.readouterr()
    assert f"step={last:08d}.ckpt" in told.err
    assert json.loads(told.out.splitlines()[-1])["steps"] == STEPS
    resumed = load_file(cut / "export" / "adapter_model.safetensors")
    assert set(resumed) == set(whole)
    assert all(bool((resumed[key] == whole[key]).all()) for key in whole)


def test_a_run_that_was_stopped_before_its_export_exports_when_it_is_resumed(command: list[str], tmp_path: Path) -> None:
    """A kill between the last resume file and the export: nothing is left to train, and the export must be made up for."""
    short = [*command, "--data.init_args.num_steps=8", *places(tmp_path)]
    assert fit(short) == 0
    exported = tmp_path / "export" / "adapter_model.safetensors"
    before = load_file(exported)
    metrics = json.loads((exported.parent / "training.json").read_text())["metrics"]
    assert {"val_loss", "val_accuracy"} <= metrics.keys()
    for path in sorted((tmp_path / "export").iterdir()):
        path.unlink()
    assert fit(short) == 0
    after = load_file(exported)
    assert all(bool((after[key] == before[key]).all()) for key in before)
    assert json.loads((exported.parent / "training.json").read_text())["metrics"] == metrics


def test_sigterm_is_raised_in_the_block_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), raising_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def setting(tiny_llama_folder: Path, rows: Path) -> Setting:
    options = ["--trainer.accelerator=cpu", "--trainer.max_epochs=12", "--trainer.callbacks.init_args.every_n_steps=4"]
    sizes = ["--data.init_args.num_train=32", "--data.init_args.batch_size=8", "--data.init_args.num_validation=4"]
    return Setting(
        backbone=str(tiny_llama_folder),
        suite="local:pets,echo",
        data_root=str(rows),
        options={"all": [*options, *sizes]},
    )


@pytest.mark.slow
def test_a_killed_child_leaves_no_recipe_and_the_same_call_resumes(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started: list[subprocess.Popen[bytes]] = []
    start = training._start
    monkeypatch.setattr(training, "_start", lambda *a, **k: (started.append(start(*a, **k)), started[-1])[1])

    def end_first() -> None:
        while not started:
            time.sleep(0.02)
        wait_for(lambda: any((tmp_path / "router_training").rglob("step=*.ckpt")), started[0])
        started[0].terminate()

    thread = threading.Thread(target=end_first)
    thread.start()
    with pytest.raises(Terminated):
        training.train("router", tmp_path, setting=setting)
    thread.join()
    assert started[0].returncode == 143
    assert "dlplora.training" in started[0].args  # type: ignore[operator]
    assert not (tmp_path / "router" / artifacts.RECIPE).exists()
    assert artifacts.locate("router", tmp_path, fresh=False, setting=setting).source == "to be trained"

    def here(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """The same training in this process, which has imported everything already."""
        return start([sys.executable, "-c", f"raise SystemExit({fit(command[3:])})"])

    monkeypatch.setattr(training, "_start", here)
    training.train("router", tmp_path, setting=setting)
    assert artifacts.locate("router", tmp_path, fresh=False, setting=setting).source == "trained before"
    assert "resuming from" in capfd.readouterr().err


def test_a_recipe_without_weights_is_worth_nothing(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "router").mkdir()
    with pytest.raises(artifacts.ConfigError, match="without an export"):
        artifacts.write_recipe("router", tmp_path / "router", setting=setting)
    (tmp_path / "router" / artifacts.RECIPE).write_text(json.dumps({"recipe_hash": artifacts.recipe_hash("router", setting=setting)}))
    assert artifacts.locate("router", tmp_path, fresh=False, setting=setting).source == "to be trained"


@pytest.mark.parametrize(("code", "error"), [(143, Terminated), (130, KeyboardInterrupt), (1, artifacts.ConfigError)])
def test_one_process_that_fails_stops_the_others(code: int, error: type[BaseException]) -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes = [training._start(sleeping), training._start([sys.executable, "-c", f"raise SystemExit({code})"]), training._start(sleeping)]
    begun = time.monotonic()
    with pytest.raises(error):
        training._wait("the pool", processes)
    assert time.monotonic() - begun < 30
    assert all(process.poll() is not None for process in processes)
