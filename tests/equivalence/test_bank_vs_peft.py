"""Adapters of every supported kind through the fused layer, against PEFT itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dlplora.errors import AdapterError, RoutingError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.kernels.backends import BACKENDS, triton_obstacle
from dlplora.methods.references import Base
from dlplora.modules.lora_bank import AdapterBank

IDS = torch.tensor([[1, 5, 9, 40, 33, 7], [1, 80, 12, 3, 61, 90], [1, 17, 17, 4, 8, 22]])
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "another rank and alpha": {"r": 7, "lora_alpha": 3},
    "rslora": {"use_rslora": True, "r": 6},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"layers.0.self_attn.v_proj": 1}},
    "all linear layers": {"target_modules": "all-linear"},
    "some layers": {"layers_to_transform": [1]},
    "mlp only": {"target_modules": ["up_proj", "down_proj"]},
    "a regular expression": {"target_modules": r".*\.1\..*\.(q|up)_proj"},
    "excluded modules": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "model.layers.0.self_attn.k_proj"]},
    "a layers pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "an anchored pattern": {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"^model.layers.1.*v_proj": 5}},
    "a pattern that is a suffix of another": {"rank_pattern": {"proj": 5, "q_proj": 2}},
    "rank above the layer's width": {"r": 40, "lora_alpha": 3},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "float64": {"dtype": torch.float64},
}

NO_TRITON = pytest.mark.skipif(triton_obstacle("cpu") is not None, reason=f"triton backend: {triton_obstacle('cpu')}")
EVERY_BACKEND = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=[pytest.mark.triton, NO_TRITON]) if name == "triton" else name for name in BACKENDS]
)


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> Tensor:
    return model(input_ids=IDS, **kwargs).logits


def fuse(model: Any, tokenizer: Any, folders: dict[str, Path]) -> FusedCausalLM:
    return FusedCausalLM(copy.deepcopy(model), tokenizer, AdapterBank.from_peft(folders, dtype=model.dtype), Base())


def peft_logits(model: Any, folder: Path) -> Tensor:
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(folder), autocast_adapter_dtype=False).eval()
    return logits(adapted.to(model.dtype))


def one_hot(index: int, count: int) -> Tensor:
    return nn.functional.one_hot(torch.tensor(index), count).float()


@pytest.mark.parametrize("kind", KINDS)
@EVERY_BACKEND
def test_one_adapter_is_pefts(
    kind: str, backend: str, tiny_llama: Any, tiny_tokenizer: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folders = {"it": make_adapter(tmp_path / "it", seed=1, **KINDS[kind]), "other": make_adapter(tmp_path / "other", seed=2, r=3)}
    # Sums in float32 differ by more than the bound from one processor to the next; scalings are float32 in any case.
    model = tiny_llama if backend == "triton" else tiny_llama.double()
    expected = peft_logits(model, folders["it"])
    assert float((expected - logits(model)).abs().max()) > 0.05
    fused = fuse(model, tiny_tokenizer, folders)
    fused.backend = backend
    with fused.routing(one_hot(0, 2)) as state:
        assert state.backend == backend
        torch.testing.assert_close(logits(fused), expected, atol=1e-5, rtol=1e-5)


def test_all_kinds_in_one_bank(tiny_llama: Any, tiny_tokenizer: Any, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    folders = {f"kind{i}": make_adapter(tmp_path / f"kind{i}", seed=i, **options) for i, options in enumerate(KINDS.values())}
    fused = fuse(tiny_llama, tiny_tokenizer, folders)
    for index, folder in enumerate(folders.values()):
        with fused.routing(one_hot(index, len(folders))):
            torch.testing.assert_close(logits(fused), peft_logits(tiny_llama, folder).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_stored_in_half_precision(
    dtype: torch.dtype, tiny_llama: Any, tiny_tokenizer: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "half", seed=4, dtype=dtype)
    with fuse(tiny_llama, tiny_tokenizer, {"half": folder}).routing(torch.ones(1)) as state:
        assert state.weights.dtype == torch.float32
    fused = fuse(tiny_llama, tiny_tokenizer, {"half": folder})
    with fused.routing(torch.ones(1)):
        torch.testing.assert_close(logits(fused), peft_logits(tiny_llama, folder).float(), atol=1e-5, rtol=1e-5)


def test_the_output_layer(tiny_llama: Any, tiny_tokenizer: Any, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "it", seed=1, target_modules=["lm_head", "q_proj"])
    expected = peft_logits(tiny_llama, folder)
    with pytest.raises(AdapterError, match=r"'base_model.model.lm_head.base_layer.weight'.*save_embedding_layers=False"):
        AdapterBank.from_peft({"it": folder})
    file = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "lora_" in key}, file)
    fused = fuse(tiny_llama, tiny_tokenizer, {"it": folder})
    assert "lm_head" in fused.patched.layers
    with fused.routing(torch.ones(1)):
        torch.testing.assert_close(logits(fused), expected, atol=1e-5, rtol=1e-5)


@EVERY_BACKEND
def test_gpt2_with_transposed_layers(backend: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), **sizes)).eval()
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    adapted = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "it")
    fused = fuse(base, tiny_tokenizer, {"it": tmp_path / "it"})
    fused.backend = backend
    with fused.routing(torch.ones(1)):
        torch.testing.assert_close(logits(fused), peft_logits(base, tmp_path / "it"), atol=1e-5, rtol=1e-5)


@EVERY_BACKEND
@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [1.0, 1.0, 1.0], [0.0, 0.7, 0.0]])
def test_a_weighted_sum_is_pefts_concatenation(
    weights: list[float], backend: str, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path
) -> None:
    names = ["alpha", "beta", "gamma"]
    adapted = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(tiny_pool / names[0]), adapter_name=names[0])
    for name in names[1:]:
        adapted.load_adapter(str(tiny_pool / name), adapter_name=name)
    used = [(name, weight) for name, weight in zip(names, weights, strict=True) if weight]
    adapted.add_weighted_adapter([name for name, _ in used], [weight for _, weight in used], "sum", combination_type="cat")
    if len(used) > 1:  # PEFT folds the scalings into the factors and then applies the merged adapter's own
        for module in adapted.modules():
            if isinstance(getattr(module, "scaling", None), dict) and "sum" in module.scaling:
                module.scaling["sum"] = 1.0
    adapted.set_adapter("sum")
    fused = fuse(tiny_llama, tiny_tokenizer, {name: tiny_pool / name for name in names})
    fused.backend = backend
    with fused.routing(torch.tensor(weights)):
        torch.testing.assert_close(logits(fused), logits(adapted.eval()), atol=2e-5, rtol=1e-5)


@EVERY_BACKEND
def test_rows_with_different_experts_are_pefts_mixed_batch(backend: str, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    names = ["alpha", "beta", "gamma"]
    adapted = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), str(tiny_pool / "alpha"), adapter_name="alpha")
    for name in names[1:]:
        adapted.load_adapter(str(tiny_pool / name), adapter_name=name)
    expected = logits(adapted.eval(), adapter_names=["gamma", "__base__", "beta"])
    fused = fuse(tiny_llama, tiny_tokenizer, {name: tiny_pool / name for name in names})
    fused.backend = backend
    rows = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    if backend == "merged":
        with pytest.raises(RoutingError, match="its 3 rows are routed differently"), fused.routing(rows):
            pass
        return
    with fused.routing(rows):
        torch.testing.assert_close(logits(fused), expected, atol=1e-5, rtol=1e-5)


def test_experts_with_different_target_modules(
    tiny_llama: Any, tiny_tokenizer: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folders = {
        "attention": make_adapter(tmp_path / "attention", seed=1, target_modules=["q_proj"]),
        "mlp": make_adapter(tmp_path / "mlp", seed=2, target_modules=["gate_proj", "down_proj"], r=3),
    }
    fused = fuse(tiny_llama, tiny_tokenizer, folders)
    assert set(fused.patched.layers) == set(fused.bank.modules)
    assert {path.rsplit(".", 1)[1] for path in fused.patched.layers} == {"q_proj", "gate_proj", "down_proj"}
    for index, folder in enumerate(folders.values()):
        with fused.routing(one_hot(index, 2)):
            torch.testing.assert_close(logits(fused), peft_logits(tiny_llama, folder), atol=1e-5, rtol=1e-5)


def test_close_leaves_the_backbone_as_it_was(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    modules = [type(module) for module in tiny_llama.modules()]
    expected = logits(tiny_llama)
    fused = FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), Base())
    fused.patched.hooks.append(tiny_llama.register_forward_hook(lambda *_: pytest.fail("the hook was not removed")))
    assert [type(module) for module in tiny_llama.modules()] != modules
    fused.close()
    fused.close()
    assert [type(module) for module in tiny_llama.modules()] == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_llama.state_dict().items())
    assert torch.equal(logits(tiny_llama), expected)


def test_the_scaling_is_the_adapters_own(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "it", r=9, lora_alpha=6, use_rslora=True, alpha_pattern={"v_proj": 12})
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"]) == (9, True)
    bank = AdapterBank.from_peft({"it": folder})
    by_module = {path.rsplit(".", 1)[1]: float(entry.scaling[0]) for path, entry in bank.modules.items()}
    assert by_module == pytest.approx({"q_proj": 6 / 3, "v_proj": 12 / 3})


def test_selecting_and_ordering_experts(tiny_pool: Path) -> None:
    bank = AdapterBank.from_pool(tiny_pool)
    moved = bank.select(["gamma", "alpha"])
    for path, entry in bank.modules.items():
        assert torch.equal(moved.modules[path].lora_a, entry.lora_a[[2, 0]])
        assert torch.equal(moved.modules[path].scaling, entry.scaling[[2, 0]])
    assert bank.checksum() != bank.permute([1, 0, 2]).checksum()
    assert bank.checksum() == AdapterBank.from_pool(tiny_pool).checksum()
