"""One adapter at weight 1.0 is that adapter, for every preset: PEFT's own answer, rsLoRA, mixed alpha and mixed ranks included."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from dlplora.config import list_configs
from dlplora.methods.registry import available_methods, build_method, load_method_spec, method_class
from dlplora.testing.cases import Case, folder_of, forced, forced_names
from dlplora.types import PromptBatch

PRESETS = list_configs("method")


@pytest.fixture(scope="module")
def rslora_on_all(make_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the multi-task rows load: an rsLoRA adapter too."""
    return make_adapter(tmp_path_factory.mktemp("all") / "all", seed=11, r=6, lora_alpha=12, use_rslora=True)


def case_of(preset: str, model: Any, tokenizer: Any, pool: Path, multitask: Path, workdir: Path) -> Case:
    """Merges that drop entries keep all of them here: at density 1 they have nothing left that sets them apart from the adapter."""
    spec = load_method_spec(preset)
    drops = "density" in spec.params
    return Case(
        build=lambda: build_method(spec, {**method_class(spec.method).stand_in_params, **({"density": 1.0} if drops else {})}),
        make_model=lambda: copy.deepcopy(model),
        tokenizer=tokenizer,
        pool=pool,
        workdir=workdir,
        artifacts=dict.fromkeys(("multitask", "multitask_r64", "multitask_r208"), multitask),
    )


def test_the_pools_hold_what_has_to_be_covered(tiny_pool: Path, uniform_pool: Path, rslora_on_all: Path) -> None:
    for pool in (tiny_pool, uniform_pool):
        configs = [json.loads((pool / name / "adapter_config.json").read_text()) for name in ("alpha", "beta", "gamma")]
        assert [config["use_rslora"] for config in configs] == [False, False, True]
        assert len({config["lora_alpha"] for config in configs}) == 3
    assert json.loads((rslora_on_all / "adapter_config.json").read_text())["use_rslora"]
    assert {load_method_spec(preset).method for preset in PRESETS} == set(available_methods())


OF_ONE_ADAPTER_TOO = {"iso_c"}
"""Presets that change a single adapter as well: Iso puts the mean in the place of every singular value (``test_core_merges.py``)."""


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset not in OF_ONE_ADAPTER_TOO])
def test_one_adapter_at_weight_one(
    preset: str, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path, uniform_pool: Path, rslora_on_all: Path, tmp_path: Path
) -> None:
    pool = uniform_pool if build_method(preset).metadata.combine == "factor" else tiny_pool
    case = case_of(preset, tiny_llama, tiny_tokenizer, pool, rslora_on_all, tmp_path)
    names = forced_names(case)
    ids = torch.tensor([[1, 5, 9, 40, 33, 7]])
    prompts = PromptBatch(ids, torch.ones_like(ids), ("",))
    for index, name in enumerate(names):
        folder = folder_of(case, name) if name not in case.names else pool / name
        peft = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(folder)).eval()
        with torch.no_grad(), forced(case, torch.nn.functional.one_hot(torch.tensor(index), len(names)).float()) as fused:
            expected = peft(input_ids=prompts.input_ids).logits
            torch.testing.assert_close(fused(input_ids=prompts.input_ids).logits, expected, atol=2e-5, rtol=1e-5)
