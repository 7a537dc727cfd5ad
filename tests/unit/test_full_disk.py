"""A full disk is an error of the operating system wherever a library writes: one line, and no half a file."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.adapters.add import convert_pickle
from dlplora.atomic import save_tokenizer
from dlplora.cli.main import main
from dlplora.errors import ConfigError
from dlplora.interruption import DISK_FAILED
from dlplora.reproduce import training
from dlplora.training.checkpoints import AtomicCheckpointIO
from dlplora.training.command import main as train_command
from tests.unit.test_broken_numbers import files_of_at_most

CHECKPOINT = {"state_dict": {f"layer.{i}": torch.ones(40_000) for i in range(4)}, "optimizer": {"exp_avg": torch.ones(9)}, "global_step": 3}


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 4_000, 8_192, 100_000, 160_100, 300_001, 480_700, 640_000, 641_000])
def test_a_checkpoint_that_does_not_fit(num_bytes: int, tmp_path: Path) -> None:
    """Wherever the zip writer is when the disk is full: in a tensor, between two, in the directory at the end."""
    path = tmp_path / "step=3.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, path)
    before = path.read_bytes()
    with files_of_at_most(num_bytes), pytest.raises(OSError, match="File too large") as caught:
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["layer.3"], torch.ones(40_000))


def test_what_cannot_be_pickled_keeps_its_own_error(tmp_path: Path) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        AtomicCheckpointIO().save_checkpoint({"function": lambda: 0}, tmp_path / "x.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_kilobytes", [8, 40, 300, 1_000, 1_162])
def test_a_router_that_does_not_fit(num_kilobytes: int, tmp_path: Path, capfd: Any) -> None:
    command = ["fit", "--config", "configs/train/router.yaml", "--data.init_args.num_train", "4", "--data.init_args.num_validation", "2"]
    command += ["--model.init_args.export_folder", str(tmp_path / "out"), "--trainer.default_root_dir", str(tmp_path / "logs")]
    command += ["--trainer.logger", "false", "--trainer.max_epochs", "1"]
    with files_of_at_most(num_kilobytes * 1024):
        assert main(command) == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: File too large: ")
    assert ".ckpt" in errors.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_who_starts_a_training_is_told_that_the_disk_failed(tmp_path: Path) -> None:
    """A worker of a matrix gives the cell back then, instead of marking it as failed."""
    command = ["fit", "--config", "configs/train/router.yaml", "--data.init_args.num_train", "4", "--data.init_args.num_validation", "2"]
    command += ["--model.init_args.export_folder", str(tmp_path / "out"), "--trainer.default_root_dir", str(tmp_path / "logs")]
    with files_of_at_most(40 * 1024):
        assert train_command([*command, "--trainer.logger", "false"], disk_failed=DISK_FAILED) == DISK_FAILED
    for code, error in ((DISK_FAILED, OSError), (2, ConfigError)):
        process = training._start([sys.executable, "-c", f"raise SystemExit({code})"])
        with pytest.raises(error, match="its message is above"):
            training._wait("router", [process])


@pytest.mark.parametrize("num_bytes", [100, 1_000, 5_000])
def test_a_tokenizer_that_does_not_fit(num_bytes: int, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """The library under fast tokenizers raises a bare ``Exception``."""
    with files_of_at_most(num_bytes), pytest.raises(OSError, match="File too large"):
        save_tokenizer(tiny_tokenizer, tmp_path / "new")
    save_tokenizer(tiny_tokenizer, tmp_path / "ours")
    tiny_tokenizer.save_pretrained(tmp_path / "theirs")
    for one in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / one.name).read_bytes() == one.read_bytes()


def test_converted_pickles_that_do_not_fit(tmp_path: Path) -> None:
    torch.save({"a.lora_A.weight": torch.ones(50, 50)}, tmp_path / "in.bin")
    with files_of_at_most(500), pytest.raises(OSError, match="File too large"):
        convert_pickle(tmp_path / "in.bin", tmp_path / "out.safetensors")


@pytest.mark.parametrize("num_bytes", [200, 1_000, 3_000, 5_000, 12_000])
@pytest.mark.parametrize("kind", ["peft", "merged", "gguf"])
def test_exports_that_do_not_fit(
    kind: str, num_bytes: int, tiny_llama_folder: Path, tiny_pool: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    for name, folder in (("model", tiny_llama_folder), ("pool", tiny_pool)):
        (tmp_path / name).symlink_to(folder)
    target = "new.gguf" if kind == "gguf" else "new"
    with files_of_at_most(num_bytes):
        code = main(["export", kind, target, "--pretrained", "model", "--pool", "pool", "--weight", "alpha=1"])
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    left = {path.name for path in tmp_path.iterdir()}
    if code == 0:
        assert left == {"model", "pool", target}
    else:
        assert code == 2
        assert left == {"model", "pool"}
        assert "too large" in errors.splitlines()[-1]
        assert "new" in errors.splitlines()[-1]


def test_a_trained_adapter_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    from dlplora.training.adapter_export import save_adapter
    from dlplora.training.settings import LoRASettings

    for num_bytes in (50, 1_500):
        with files_of_at_most(num_bytes), pytest.raises(OSError, match="File too large"):
            save_adapter(tmp_path / "adapter", LoRASettings().peft_config(), {"base_model.model.x.lora_A.weight": torch.ones(8, 512)})
        assert not list(tmp_path.iterdir())
