"""Every precision of the trainer trains every kind of module or is one line; a fused model can be cast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dlplora.cli.fit import main as fit
from dlplora.errors import AdapterError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.references import Base
from dlplora.modules.lora_bank import AdapterBank
from tests.toy_tasks import NAMES, write_tasks

PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"]
KINDS = ["expert", "experts", "router", "fusion"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def pool(make_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    for seed, name in enumerate(NAMES):
        make_adapter(folder / name, seed=seed)
    return folder


def train(kind: str, precision: str, backbone: Path, pool: Path, rows: Path, out: Path) -> dict[str, torch.Tensor]:
    """What a few steps train."""
    arguments = ["fit", "--config", f"configs/train/{kind}.yaml", "--trainer.precision", precision, "--trainer.logger", "false"]
    arguments += ["--data.init_args.suite", "local:" + ",".join(NAMES), "--data.init_args.data_root", str(rows)]
    arguments += ["--data.init_args.batch_size", "4", "--data.init_args.num_train", "16", "--trainer.max_epochs", "1"]
    arguments += ["--model.init_args.export_folder", str(out), "--trainer.default_root_dir", f"{out}_logs"]
    arguments += [] if kind == "router" else ["--data.init_args.num_steps", "2"]
    if kind == "fusion":
        arguments += ["--model.init_args.pretrained", str(backbone), "--model.init_args.pool", str(pool)]
        arguments += ["--model.init_args.method", "meteora_gate"]
    else:
        arguments += ["--model.init_args.backbone", str(backbone)]
    if kind == "expert":
        arguments += ["--data.init_args.tasks", "pets"]
    assert fit(arguments) == 0
    files = sorted(out.rglob("*.safetensors"))
    return {f"{file.relative_to(out)}/{key}": one for file in files for key, one in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_precision_trains(
    kind: str, tiny_llama_folder: Path, pool: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, trained = {}, {}
    for precision in PRECISIONS:
        if precision == "16-mixed" and kind != "expert":
            continue  # on a CPU Lightning trains bf16-mixed instead, and says so
        trained[precision] = train(kind, precision, tiny_llama_folder, pool, rows, tmp_path / precision)
        losses[precision] = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["val_loss"]
    for precision, loss in losses.items():
        assert loss == pytest.approx(losses["32-true"], rel=1e-5 if precision == "64-true" else 0.05), precision
        for name, tensor in trained[precision].items():
            assert tensor.dtype == torch.float32
            assert torch.isfinite(tensor).all()
            torch.testing.assert_close(tensor, trained["32-true"][name], atol=1e-4 if precision == "64-true" else 0.03, rtol=0)
        # trained in float32 at least: with 16 bits every number would be one of 16 bits
        parts = torch.cat([tensor.flatten() for tensor in trained[precision].values()])
        assert bool((parts.to(torch.bfloat16).float() != parts).any() and (parts.to(torch.float16).float() != parts).any())


@pytest.mark.parametrize(
    ("precision", "part"),
    [("8-true", "precision"), ("transformer-engine", "transformer_engine"), ("bf16", None), ("nonsense", "precision")],
)
def test_other_precisions_are_one_line(
    precision: str, part: str | None, tiny_llama_folder: Path, pool: Path, rows: Path, tmp_path: Path, capsys: Any
) -> None:
    if part is None:
        train("expert", precision, tiny_llama_folder, pool, rows, tmp_path / "out")  # an old name of bf16-mixed
        return
    with pytest.raises(AssertionError):
        train("expert", precision, tiny_llama_folder, pool, rows, tmp_path / "out")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert part in lines[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_model_is_pefts_in_that_dtype(
    dtype: torch.dtype, tiny_llama_folder: Path, tiny_tokenizer: Any, make_adapter: Any, tmp_path: Path
) -> None:
    """rsLoRA's scaling is no 16-bit number; it stays float32, as in a model that was loaded in the dtype."""
    folders = {name: make_adapter(tmp_path / name, seed=seed, use_rslora=True, r=3) for seed, name in enumerate(("first", "second"))}
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    fused = FusedCausalLM(model, tiny_tokenizer, AdapterBank.from_peft(folders), Base())
    fused.to(dtype)
    ids = torch.tensor([[1, 5, 9, 40, 33, 7]])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), str(folders["first"])).eval()
    with torch.no_grad(), fused.routing(torch.tensor([1.0, 0.0])):
        cast = adapted.to(dtype)(input_ids=ids).logits
        found = fused(input_ids=ids).logits
        exact = adapted.float().double()(input_ids=ids).logits  # of the rounded weights
    assert found.dtype == cast.dtype == dtype
    assert float((found - exact).abs().max()) <= 1.5 * float((cast - exact).abs().max()) + 1e-6
    assert all(layer.scaling.dtype == torch.float32 for layer in fused.patched.layers.values())


@pytest.mark.parametrize("method", ["dlp", "mole", "meteora_full", "xlora", "arrow_factor"])
def test_a_half_model_generates(method: str) -> None:
    """Routers and gates keep their float32 numbers; a half model says what the float32 model says."""
    try:
        fused = FusedCausalLM.from_pretrained(method=method, artifacts=_trained(method))
    except FileNotFoundError:
        pytest.skip(f"no trained {method} is shipped")
    prompt = "Please write in Zargi: the cat sees the hat.\nAnswer:"
    before = {name: one.clone() for name, one in fused.method.named_parameters() if "lora_" not in name}
    expected = fused.generate(prompt, max_new_tokens=6, do_sample=False).tolist()
    fused.half()
    assert fused.dtype == torch.float16
    assert fused.generate(prompt, max_new_tokens=6, do_sample=False).tolist() == expected
    after = dict(fused.method.named_parameters())
    assert all(torch.equal(after[name], one) for name, one in before.items())


def _trained(method: str) -> dict[str, Path]:
    from dlplora.inference.loading import method_asset
    from dlplora.methods.registry import load_method_spec, method_class

    if "trained" not in method_class(load_method_spec(method).method).metadata.needs:
        return {}
    folder = method_asset("trained", method)
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    return {"trained": folder}


def test_factors_that_a_dtype_cannot_hold(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    bank = AdapterBank.from_pool(tiny_pool)
    next(iter(bank.modules.values())).lora_a[0, 0, 0] = 1e6
    fused = FusedCausalLM(tiny_llama, tiny_tokenizer, bank, Base())
    with pytest.raises(AdapterError, match="values that float16 cannot hold"):
        fused.half()
