"""Numbers that are no numbers become neither records nor answers; a method's folder is read whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file

from dlplora.atomic import filling
from dlplora.baselines.mole import MoLE
from dlplora.cli.main import main
from dlplora.errors import AdapterError, GenerationError, MethodError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.loading import method_asset, nano_asset
from dlplora.lm_eval.model import DLPLoRALM
from dlplora.methods.base import MethodContext
from dlplora.methods.dlp import DLP
from dlplora.methods.references import Base
from dlplora.modules.lora_bank import AdapterBank
from tests.toy_tasks import write_tasks


def scaled(source: Path, folder: Path, factor: float, dtype: torch.dtype = torch.float32, side: str = "lora_") -> Path:
    shutil.copytree(source, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: (one.to(dtype) * factor if side in key else one.to(dtype)) for key, one in tensors.items()}, file)
    return folder


@pytest.mark.parametrize(
    ("factor", "dtype", "side"),
    [(1e30, torch.float32, "lora_"), (1e60, torch.float64, "lora_"), (1e30, torch.float32, "lora_B"), (1e50, torch.float64, "lora_A")],
)
def test_factors_that_no_model_computes_with(
    factor: float, dtype: torch.dtype, side: str, make_adapter: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled(make_adapter(tmp_path / "plain"), tmp_path / "pool" / "it", factor, dtype, side)
    assert main(["pool", "check", str(tmp_path / "pool")]) == 2
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("dlplora: error: adapter 'it': the factors of 'model.layers.0.self_attn.")
    assert "the training diverged" in first
    with pytest.raises(AdapterError, match="a layer computes with their product"):
        AdapterBank.from_pool(tmp_path / "pool")


def test_factors_that_the_banks_dtype_cannot_hold(make_adapter: Any, tmp_path: Path) -> None:
    folder = scaled(make_adapter(tmp_path / "plain"), tmp_path / "it", 1e6, side="lora_A")
    assert AdapterBank.from_peft({"it": folder}).num_experts == 1
    with pytest.raises(AdapterError, match=r"adapter 'it': the factors of 'model.layers.0.*' have values that float16 cannot hold"):
        AdapterBank.from_peft({"it": folder}, dtype=torch.float16)
    wide = scaled(make_adapter(tmp_path / "plain2"), tmp_path / "wide", 1e-200, torch.float64, "lora_B")
    file = wide / "adapter_model.safetensors"
    save_file({key: one * 1e200 if "lora_A" in key else one for key, one in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match="values that float32 cannot hold"):  # the product is moderate, the factor is not
        AdapterBank.from_peft({"wide": wide})


def test_eval_refuses_them_and_writes_no_record(make_adapter: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = tmp_path / "pool"
    shutil.copytree(nano_asset("pool"), pool)
    name = next(path.parent.name for path in sorted(pool.glob("*/adapter_model.safetensors")))
    file = pool / name / "adapter_model.safetensors"
    save_file({key: one * 1e30 for key, one in load_file(file).items()}, file)
    arguments = ["eval", "--method", "avg_delta", "--pool", str(pool), "--limit", "1", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--pretrained", str(nano_asset("backbone"))]) == 2
    assert f"adapter '{name}'" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.json"))


@pytest.fixture
def broken(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> FusedCausalLM:
    """A base model whose logits are no numbers."""
    with torch.no_grad():
        tiny_llama.lm_head.weight[7] = torch.nan
    return FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), Base())


def test_logits_that_are_no_numbers_are_not_scored(broken: FusedCausalLM) -> None:
    for share in ("auto", "never"):
        lm = DLPLoRALM(fused=broken, share_prefix=share, batch_size=2)
        with pytest.raises(GenerationError, match="logits are NaN or infinite"):
            lm.loglikelihood([Instance("loglikelihood", {}, ("the cat", " sees"), 0)], disable_tqdm=True)
        with pytest.raises(GenerationError, match="logits are NaN or infinite"):
            lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("the cat sees",), 0)], disable_tqdm=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_not_said(value: float, broken: FusedCausalLM) -> None:
    with torch.no_grad():
        broken.model.lm_head.weight.fill_(value)
    with pytest.raises(GenerationError, match="logits are NaN or infinite"):
        broken.generate("the cat sees", max_new_tokens=3)


def test_a_token_that_may_not_be_said_is_fine(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), Base())
    bias = torch.nn.Linear(32, len(tiny_tokenizer))
    with torch.no_grad():
        bias.bias[9] = -torch.inf
    fused.model.lm_head = bias
    lm = DLPLoRALM(fused=fused, share_prefix="never", batch_size=2)
    assert fused.generate("the cat sees", max_new_tokens=3).shape[0] == 1
    ((value, _),) = lm.loglikelihood([Instance("loglikelihood", {}, ("the cat", " sees"), 0)], disable_tqdm=True)
    assert value < 0


# ---------------------------------------------------------------------- a method's folder


@pytest.fixture
def trained(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path, tmp_path: Path) -> tuple[Path, AdapterBank, MethodContext]:
    bank = AdapterBank.from_pool(tiny_pool)
    context = MethodContext(tokenizer=tiny_tokenizer, embedding=tiny_llama.get_input_embeddings())
    method = MoLE()
    method.prepare(bank, context)
    method.save(tmp_path / "mole")
    return tmp_path / "mole", bank, context


def without_weights(folder: Path) -> None:
    (folder / "method.safetensors").unlink()


def all_nan(folder: Path) -> None:
    file = folder / "method.safetensors"
    save_file({key: torch.full_like(one, torch.nan) for key, one in load_file(file).items()}, file)


def one_infinite_after_the_cast(folder: Path) -> None:
    """Finite in float64, and of a tensor without rows."""
    file = folder / "method.safetensors"
    tensors = load_file(file)
    key = next(key for key, one in sorted(tensors.items()) if not one.ndim)
    save_file(tensors | {key: torch.tensor(1e300, dtype=torch.float64)}, file)


def one_huge(folder: Path) -> None:
    file = folder / "method.safetensors"
    tensors = load_file(file)
    key = sorted(tensors)[0]
    save_file(tensors | {key: torch.full_like(tensors[key], 1e30)}, file)


def whole_numbers(folder: Path) -> None:
    file = folder / "method.safetensors"
    save_file({key: one.to(torch.int32) for key, one in load_file(file).items()}, file)


def one_missing(folder: Path) -> None:
    file = folder / "method.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)


def other_shape(folder: Path) -> None:
    file = folder / "method.safetensors"
    save_file({key: one[..., :1].clone() if one.ndim else one for key, one in load_file(file).items()}, file)


def cut(folder: Path) -> None:
    file = folder / "method.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (without_weights, "has no method.safetensors"),
        (all_nan, "holds NaN or infinite values"),
        (one_infinite_after_the_cast, "log_tau.*holds NaN or infinite values"),
        (one_huge, r"or values beyond 1e\+18"),
        (whole_numbers, "is stored as int32"),
        (one_missing, "Missing key"),
        (other_shape, "size mismatch"),
        (cut, "is damaged"),
    ],
)
def test_damaged_methods_are_refused(damage: Callable[[Path], None], part: str, trained: tuple[Path, AdapterBank, MethodContext]) -> None:
    folder, bank, context = trained
    MoLE.load(folder, bank, context)
    damage(folder)
    with pytest.raises(MethodError, match=part) as caught:
        MoLE.load(folder, bank, context)
    assert "\n" not in str(caught.value)


def test_gates_that_diverged_are_not_saved(trained: tuple[Path, AdapterBank, MethodContext], tmp_path: Path) -> None:
    folder, bank, context = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    method = MoLE.load(folder, bank, context)
    with torch.no_grad():
        next(iter(method.parameters())).fill_(torch.nan)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(MethodError, match="the training diverged"):
            method.save(target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*.tmp"))


def test_saving_anew_replaces_the_files_and_leaves_others(trained: tuple[Path, AdapterBank, MethodContext]) -> None:
    folder, bank, context = trained
    (folder / "training.json").write_text("{}")
    method = MoLE.load(folder, bank, context)
    with torch.no_grad():
        next(iter(method.parameters())).add_(0.5)
    method.save(folder)
    again = MoLE.load(folder, bank, context)
    assert all(torch.equal(one, other) for one, other in zip(method.parameters(), again.parameters(), strict=True))
    assert sorted(path.name for path in folder.iterdir()) == ["method.json", "method.safetensors", "training.json"]


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("after", range(5))
def test_a_method_is_never_half_old_and_half_new(
    after: int, trained: tuple[Path, AdapterBank, MethodContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies after some of the moves: the folder holds the new method or none."""
    _, bank, context = trained
    method = DLP(DLP.Config())
    artifacts = DLP.example_artifacts(tmp_path / "router", bank, context)
    method.prepare(bank, MethodContext(tokenizer=context.tokenizer, embedding=context.embedding, artifacts=artifacts))
    method.save(tmp_path / "dlp")
    old = {path.relative_to(tmp_path): path.read_bytes() for path in (tmp_path / "dlp").rglob("*") if path.is_file()}
    real, done = os.replace, []

    def replace(source: Any, target: Any) -> None:
        if Path(target).is_relative_to(tmp_path / "dlp"):
            if len(done) == after:
                raise PowerCutError
            done.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    router, _ = method._ready()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(1.0)
    died = False
    try:
        method.save(tmp_path / "dlp")
    except PowerCutError:
        died = True
    monkeypatch.setattr(os, "replace", real)
    now = {path.relative_to(tmp_path): path.read_bytes() for path in (tmp_path / "dlp").rglob("*") if path.is_file()}
    whole = not died
    assert whole == (Path("dlp/method.json") in now)
    if whole:
        assert now[Path("dlp/router/router.safetensors")] != old[Path("dlp/router/router.safetensors")]
    else:
        with pytest.raises(MethodError, match=r"method\.json is missing"):
            DLP.load(tmp_path / "dlp", bank, context)


def test_a_folder_that_fails_half_way_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "mark").write_text("old")

    def fail(folder: Path) -> None:
        with filling(folder, "mark") as temporary:
            (temporary / "mark").write_text("new")
            raise PowerCutError

    for folder in ("it", "new"):
        with pytest.raises(PowerCutError):
            fail(tmp_path / folder)
    assert (tmp_path / "it" / "mark").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it"]


# ---------------------------------------------------------------------- checksums


def test_a_checksum_does_not_depend_on_the_dtype(tiny_pool: Path) -> None:
    exact = AdapterBank.from_pool(tiny_pool)
    expected = exact.checksum()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert AdapterBank.from_pool(tiny_pool, dtype=dtype).checksum() == expected
        assert exact.to(dtype=dtype).checksum() == expected
    names = ("gamma", "alpha")
    assert AdapterBank.from_pool(tiny_pool, names, dtype=torch.bfloat16).checksum() == AdapterBank.from_pool(tiny_pool, names).checksum()
    changed = exact.to(dtype=torch.float32)
    next(iter(changed.modules.values())).lora_a[0, 0, 0] += 1
    assert changed.checksum() != expected


def test_shipped_gates_load_in_sixteen_bits() -> None:
    fused = FusedCausalLM.from_pretrained(method="mole", artifacts={"trained": method_asset("trained", "mole")}, dtype="float16")
    saved = json.loads((method_asset("trained", "mole") / "method.json").read_text())
    assert fused.bank.checksum() == saved["pool_sha256"]


# ---------------------------------------------------------------------- a full disk


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """As a full disk: a write beyond the limit fails with an error of the operating system."""
    resource = pytest.importorskip("resource", reason="limits of file sizes are POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("num_bytes", "logger", "where"),
    [(2_000, "lightning.pytorch.loggers.TensorBoardLogger", "a file of the run"), (12_000, "false", "step=00000003.ckpt")],
)
def test_a_full_disk_is_one_line(num_bytes: int, logger: str, where: str, tmp_path: Path, tiny_llama_folder: Path, capfd: Any) -> None:
    """First TensorBoard's thread cannot write, then the resume file does not fit."""
    command = ["fit", "--config", "configs/train/expert.yaml", "--data.init_args.tasks", "all", "--trainer.logger", logger]
    command += ["--trainer.logger.save_dir", str(tmp_path / "logs")] if logger != "false" else []
    command += ["--data.init_args.suite", "local:pets", "--data.init_args.data_root", str(write_tasks(tmp_path / "rows", num_train=40))]
    command += ["--data.init_args.num_steps", "3", "--data.init_args.batch_size", "2", "--trainer.log_every_n_steps", "1"]
    command += ["--model.init_args.backbone", str(tiny_llama_folder), "--model.init_args.export_folder", str(tmp_path / "out")]
    with files_of_at_most(num_bytes):
        assert main([*command, "--trainer.default_root_dir", str(tmp_path / "logs")]) == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: File too large: ")
    assert where in errors.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_adapters_and_methods_on_a_full_disk(trained: tuple[Path, AdapterBank, MethodContext], tmp_path: Path) -> None:
    from dlplora.training.adapter_export import save_adapter
    from dlplora.training.settings import LoRASettings

    folder, bank, context = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    method = MoLE.load(folder, bank, context)
    with files_of_at_most(500):
        with pytest.raises(OSError, match="File too large"):
            method.save(folder)
        with pytest.raises(OSError, match="File too large"):
            save_adapter(tmp_path / "adapter", LoRASettings().peft_config(), {"base_model.model.x.lora_A.weight": torch.ones(8, 512)})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("command", "num_bytes", "where"),
    [
        (["new-method", "mine", "--dir", "new"], 100, "new/mine.py"),
        (["tasks", "--suite", "local:pets", "--data-root", "rows", "--export", "tasks"], 100, "tasks/"),
        (["export", "merged", "merged", "--pretrained", "model", "--pool", "pool", "--weight", "alpha=1"], 2_000, "merged"),
    ],
)
def test_what_a_command_writes_is_whole_or_absent(
    command: list[str], num_bytes: int, where: str, tiny_llama_folder: Path, tiny_pool: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tasks(tmp_path / "rows")
    for name, folder in (("model", tiny_llama_folder), ("pool", tiny_pool)):
        (tmp_path / name).symlink_to(folder)
    with files_of_at_most(num_bytes):
        assert main(command) == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert re.search(rf"File too large.*: {where}", errors.splitlines()[-1])
    assert {path.name for path in tmp_path.iterdir()} <= {"rows", "model", "pool", "new", "tasks"}
    assert not [*tmp_path.glob("new/*"), *tmp_path.glob("tasks/*")]
