"""``lightning run``: one process or several train the same thing; bad arguments give one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dlplora.cli import lightning_run
from dlplora.cli.fit import with_config_files
from dlplora.config import configs_root
from dlplora.data.datamodule import ExpertDataModule, RouterDataModule
from dlplora.errors import ConfigError
from tests.toy_tasks import NAMES, write_tasks


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from dlplora.cli.lightning_run import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, "run", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )


def overrides(rows: Path, out: Path, *more: str) -> list[str]:
    data = ["--data.init_args.suite", "local:" + ",".join(NAMES), "--data.init_args.data_root", str(rows)]
    return [*data, "--model.init_args.export_folder", str(out / "export"), "--trainer.default_root_dir", str(out / "logs"), *more]


@pytest.mark.slow
def test_two_processes_train_the_router_that_one_process_trains(tmp_path: Path) -> None:
    """Without disturbed prompts every random number is the same, and only the order of sums differs."""
    rows = write_tasks(tmp_path / "rows")
    same = ["--model.init_args.token_drop", "0", "--model.init_args.token_noise", "0", "--data.init_args.batch_size", "8"]
    done = {}
    for name, options in (("one", []), ("two", ["--devices", "2", "--accelerator", "cpu"])):
        result = run(*options, "configs/train/router.yaml", *overrides(rows, tmp_path / name, *same, "--trainer.max_epochs", "1"))
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
        assert len(lines) == 1  # only the first process reports
        assert result.stderr.count("GLOBAL_RANK") == (2 if options else 0)
        done[name] = json.loads(lines[0])
    assert done["one"]["steps"] == done["two"]["steps"]
    assert done["one"]["metrics"]["val_loss"] == pytest.approx(done["two"]["metrics"]["val_loss"], rel=1e-3)
    first, second = (load_file(tmp_path / name / "export" / "router.safetensors") for name in done)
    initial = [key for key in first if key.endswith("weight")]
    for key in initial:
        torch.testing.assert_close(first[key], second[key], atol=2e-4, rtol=0)


@pytest.mark.slow
def test_two_processes_train_a_pool_one_group_at_a_time(tmp_path: Path) -> None:
    rows = write_tasks(tmp_path / "rows")
    small = ["--data.init_args.num_steps", "3", "--data.init_args.batch_size", "4", "--model.init_args.lora.lora_dropout", "0"]
    losses = []
    for name, options in (("one", []), ("two", ["--devices=2", "--accelerator=cpu"])):
        result = run(*options, "configs/train/experts.yaml", *overrides(rows, tmp_path / name, *small))
        assert result.returncode == 0, result.stderr
        losses.append(json.loads(result.stdout.splitlines()[-1])["metrics"]["val_loss"])
        assert sorted(path.name for path in (tmp_path / name / "export").iterdir() if path.is_dir()) == sorted(NAMES)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_process_that_fails_gives_its_exit_code(tmp_path: Path) -> None:
    rows = write_tasks(tmp_path / "rows")
    result = run(
        "--devices", "2", "--accelerator", "cpu", "--strategy", "ddp", "configs/train/experts.yaml", *overrides(rows, tmp_path / "out")
    )
    assert result.returncode == 2
    assert "ddp_find_unused_parameters_true" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "export").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run"], "Missing argument 'CONFIG'"),
        (["run", "train.py"], "unknown training configuration 'train.py'"),
        (["run", "no/such.yaml"], "config file not found"),
        (["run", "--device", "2", "router"], "No such option '--device'"),
        (["run", "--strategy", "many", "router"], "'many' is not one of"),
        (["run", "--devices", "none", "configs/train/router.yaml"], "--devices none"),
        (["run", "--devices", "2", "--accelerator", "cuda", "configs/train/router.yaml"], "--devices 2"),
        (["run", "--devices", "2", "--accelerator", "cpu", "configs/train/router.yaml", "--trainer.max_epoch", "1"], "max_epochs"),
        (["run", "configs/train/router.yaml", "--trainer.max_epoch", "1"], "max_epochs"),
    ],
)
def test_bad_arguments_give_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], part: str) -> None:
    if "cuda" in arguments and torch.cuda.device_count() >= 2:
        pytest.skip("this machine has the two devices that the test expects to be missing")
    try:
        code = lightning_run.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    text = capsys.readouterr().err.strip()
    assert code == 2
    assert part in text
    assert text.count("\n") == 0, text


def test_options_become_trainer_keys_and_overrides_win() -> None:
    given = ["--devices", "2", "--precision", "32-true", "x.yaml", "--trainer.devices", "1", "--seed_everything", "3"]
    options = lightning_run.parse(given)
    expected = "fit --config x.yaml --trainer.devices 2 --trainer.precision 32-true --trainer.strategy ddp".split()
    assert lightning_run.fit_arguments(options, "ddp") == [*expected, "--trainer.devices", "1", "--seed_everything", "3"]
    assert "--trainer.strategy" not in lightning_run.fit_arguments(options, None)


def test_the_rest_is_forwarded_to_lightnings_own_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``fabric`` where Lightning ships no ``lightning``; the command of another distribution where one does."""
    with pytest.raises(SystemExit) as stop:
        lightning_run.main(["consolidate", "--help"])
    assert stop.value.code == 0
    assert "fabric consolidate" in capsys.readouterr().out

    def other() -> None:
        print("other", sys.argv)

    theirs = SimpleNamespace(name="lightning", value="other:main", dist=SimpleNamespace(name="lightning-sdk"), load=lambda: other)
    ours = SimpleNamespace(name="lightning", value="dlplora:main", dist=SimpleNamespace(name="dlplora"), load=None)
    found = SimpleNamespace(select=lambda name: [ours, theirs] if name == "lightning" else [])
    monkeypatch.setattr(lightning_run, "entry_points", lambda group: found)
    monkeypatch.setattr(sys, "argv", ["lightning"])
    assert lightning_run.main(["login", "--now"]) == 0
    assert capsys.readouterr().out == "other ['lightning', 'login', '--now']\n"
    monkeypatch.setattr(lightning_run, "entry_points", lambda group: SimpleNamespace(select=lambda name: []))
    assert lightning_run.main(["login"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_configuration_is_named_as_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names need neither a clone nor a working folder; a file is a file."""
    monkeypatch.chdir(tmp_path)
    file = str(configs_root() / "train" / "router.yaml")
    for given in (["fit", "router"], ["fit", "--config", "router"], ["fit", "--config", file]):
        assert with_config_files([*given, "--seed_everything", "1"]) == ["fit", "--config", file, "--seed_everything", "1"]
    assert with_config_files(["fit", "--config=router"]) == ["fit", f"--config={file}"]
    assert with_config_files(["test", "-c", "router", "--config", file]) == ["test", "-c", file, "--config", file]
    with pytest.raises(ConfigError, match=r"unknown training configuration 'rooter'\. Did you mean 'router'"):
        with_config_files(["fit", "rooter"])


@pytest.mark.slow
def test_two_processes_and_fewer_validation_rows_than_batches(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Two validation rows, one batch: the second process has nothing to validate, and the figures are those of one process."""
    rows = write_tasks(tmp_path / "rows", num_train=40)
    small = ["--data.init_args.batch_size", "4", "--data.init_args.num_train", "12", "--data.init_args.num_validation", "2"]
    small += ["--data.init_args.num_steps", "2", "--data.init_args.tasks", "pets", "--model.init_args.lora.lora_dropout", "0"]
    small += ["--model.init_args.backbone", str(tiny_llama_folder)]
    losses = []
    for name, options in (("one", []), ("two", ["--devices=2", "--accelerator=cpu"])):
        result = run(*options, "configs/train/expert.yaml", *overrides(rows, tmp_path / name, *small))
        assert result.returncode == 0, result.stderr
        losses.append(json.loads(result.stdout.splitlines()[-1])["metrics"]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("kind", [ExpertDataModule, RouterDataModule])
def test_every_process_has_a_validation_batch(kind: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    data = kind(suite="local:pets", data_root=str(write_tasks(tmp_path / "rows")), num_train=8, num_validation=1, batch_size=4)
    sizes = []
    for rank in range(3):
        shell = SimpleNamespace(tokenizer=tiny_tokenizer)
        data.trainer = SimpleNamespace(lightning_module=shell, world_size=3, global_rank=rank, current_epoch=0)
        data.setup("fit")
        loader = data.val_dataloader()
        assert len(loader) == 1
        (batch,) = loader
        sizes.append(len(batch["labels"]) if batch.get("task", "pets") is not None else 0)
    assert sizes == [1, 0, 0]
