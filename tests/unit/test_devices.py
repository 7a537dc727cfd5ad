"""Devices and dtypes where nobody names them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dlplora.cli.main import main
from dlplora.errors import ConfigError
from dlplora.inference import devices
from dlplora.inference.devices import choose_device, resolve_dtype
from dlplora.inference.fused_model import FusedCausalLM


def here(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
@pytest.mark.parametrize("name", [None, "auto"])
def test_the_best_device_is_taken(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str, name: str | None) -> None:
    here(monkeypatch, cuda=cuda, mps=mps)
    assert choose_device(name) == torch.device(expected)
    assert choose_device("cpu") == torch.device("cpu")


def test_devices_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    with pytest.raises(ConfigError, match="unknown device 'gpuu'"):
        choose_device("gpuu")
    with pytest.raises(ConfigError, match=r"device 'cuda:3' does not exist: this machine has 0 of that kind"):
        choose_device("cuda:3")


def checkpoint(folder: Path, source: Path, dtype: torch.dtype, named: str | None) -> Path:
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config | ({} if named is None else {"dtype": named})))
    return folder


@pytest.mark.parametrize("named", ["config", None])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_the_checkpoints_dtype_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_folder: Path, stored: torch.dtype, fast: bool, named: str | None
) -> None:
    monkeypatch.setattr(devices, "cpu_bfloat16_is_faster", lambda: fast)
    name = None if named is None else str(stored).removeprefix("torch.")
    folder = str(checkpoint(tmp_path / "model", tiny_llama_folder, stored, name))
    assert resolve_dtype("auto", "cuda", folder) == stored
    on_cpu = torch.bfloat16 if stored == torch.bfloat16 and fast else torch.float32
    assert resolve_dtype("auto", "cpu", folder) == on_cpu
    assert resolve_dtype("auto", "cuda", None) == torch.float32  # the embedded model


def test_a_model_loads_in_what_auto_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_folder: Path, tiny_pool: Path) -> None:
    monkeypatch.setattr(devices, "cpu_bfloat16_is_faster", lambda: False)
    here(monkeypatch, cuda=False, mps=False)
    folder = checkpoint(tmp_path / "model", tiny_llama_folder, torch.bfloat16, "bfloat16")
    fused = FusedCausalLM.from_pretrained(folder, pool=tiny_pool, method="avg_delta")
    assert (fused.device.type, fused.dtype) == ("cpu", torch.float32)
    assert next(iter(fused.bank.modules.values())).lora_a.dtype == torch.float32
    fused.close()


@pytest.mark.parametrize(("slow", "capable", "expected"), [(2.0, True, False), (0.5, True, True), (0.5, False, False)])
def test_bfloat16_speed_is_measured(monkeypatch: pytest.MonkeyPatch, slow: float, capable: bool, expected: bool) -> None:
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: capable)
    monkeypatch.setattr(devices, "_timed", lambda left, right: slow if left.dtype == torch.bfloat16 else 1.0)
    devices.cpu_bfloat16_is_faster.cache_clear()
    assert devices.cpu_bfloat16_is_faster() is expected
    devices.cpu_bfloat16_is_faster.cache_clear()


@pytest.mark.parametrize(
    ("command", "options", "part"),
    [
        (command, options, part)
        for command in (["generate", "x"], ["eval", "--limit", "1"], ["pool", "check", "POOL"])
        for options, part in ((["--device", "gpuu"], "unknown device 'gpuu'"), (["--dtype", "float8"], "unknown dtype 'float8'"))
    ],
)
def test_bad_values_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tiny_pool: Path, command: list[str], options: list[str], part: str
) -> None:
    assert main([str(tiny_pool) if word == "POOL" else word for word in command] + options) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert said.startswith("dlplora: error: ")
    assert part in said


def test_pool_check_says_what_it_measured(capsys: pytest.CaptureFixture[str], tiny_pool: Path) -> None:
    def loaded(*options: str) -> str:
        assert main(["pool", "check", str(tiny_pool), *options]) == 0
        return capsys.readouterr().out

    assert "in float32" in loaded()
    assert "in float16" in loaded("--dtype", "float16", "--device", "cpu")
