"""Every tested architecture, as small random models of its own class: logits, mixed rows and generation against PEFT itself."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from dlplora.adapters.fingerprint import base_fingerprint
from dlplora.adapters.pool import write_manifest
from dlplora.errors import ConfigError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.loading import load_backbone
from dlplora.inference.quantization import check_widths
from dlplora.methods.references import Base, Oracle
from dlplora.modules.lora_bank import AdapterBank

IDS = torch.tensor([[1, 5, 9, 40, 33, 7], [1, 80, 12, 3, 61, 90], [1, 17, 17, 4, 8, 22]])
NAMES = ["first", "second"]
WIDE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GROUPED = {**WIDE, "num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED_QKV = ["qkv_proj", "o_proj", "gate_up_proj"]

ARCHITECTURES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("Llama", {**WIDE, "num_key_value_heads": 2}, LAYERS),
    "llama, tied": ("Llama", {**WIDE, "tie_word_embeddings": True}, ["q_proj", "up_proj", "down_proj"]),
    "qwen2": ("Qwen2", {**WIDE, "num_key_value_heads": 2}, LAYERS),
    "qwen3": ("Qwen3", GROUPED, LAYERS),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 4}, LAYERS),
    "gemma": ("Gemma", GROUPED, LAYERS),
    "gemma2": ("Gemma2", {**GROUPED, "sliding_window": 4}, LAYERS),
    "gemma3": ("Gemma3", {**GROUPED, "sliding_window": 4}, LAYERS),
    "phi": ("Phi", WIDE, ["q_proj", "k_proj", "v_proj", "dense", "fc1"]),
    "phi3": ("Phi3", {**WIDE, "num_key_value_heads": 2}, FUSED_QKV),
    "gpt2": ("GPT2", GPT2, ["c_attn", "c_proj", "c_fc"]),
}


def make_base(architecture: str, vocab_size: int) -> Any:
    prefix, sizes, _ = ARCHITECTURES[architecture]
    config_class = getattr(transformers, f"{prefix}Config", None) or getattr(transformers, f"{prefix}TextConfig")
    if prefix == "Gemma3":
        config_class = transformers.Gemma3TextConfig
    model_class = getattr(transformers, "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM")
    config = config_class(vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return model_class(config).eval()


def save_peft(base: Any, folder: Path, seed: int, **options: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Path]]:
    """A base model, its folder, and two adapters of different rank and targets."""
    base = make_base(request.param, len(tiny_tokenizer))
    root = tmp_path_factory.mktemp("case")
    base.save_pretrained(root / "base")
    tiny_tokenizer.save_pretrained(root / "base")
    targets = ARCHITECTURES[request.param][2]
    transposed = request.param == "gpt2"
    folders = {
        "first": save_peft(base, root / "pool" / "first", 1, r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=transposed),
        "second": save_peft(
            base, root / "pool" / "second", 2, r=3, lora_alpha=5, target_modules=targets[:1], use_rslora=True, fan_in_fan_out=transposed
        ),
    }
    return base, root / "base", folders


def peft_model(base: Any, folders: dict[str, Path]) -> Any:
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), str(folders["first"]), adapter_name="first", autocast_adapter_dtype=False)
    adapted.load_adapter(str(folders["second"]), adapter_name="second", autocast_adapter_dtype=False)
    return adapted.eval()


@torch.no_grad()
def logits(model: Any, **options: Any) -> Tensor:
    return model(input_ids=IDS, **options).logits


def test_logits_are_pefts(case: tuple[Any, Path, dict[str, Path]], tiny_tokenizer: Any) -> None:
    base, _, folders = case
    adapted = peft_model(base, folders)
    plain = logits(base)
    fused = FusedCausalLM(copy.deepcopy(base), tiny_tokenizer, AdapterBank.from_peft(folders), Base())
    for index, name in enumerate(NAMES):
        adapted.set_adapter(name)
        expected = logits(adapted)
        assert float((expected - plain).abs().max()) > 0.02
        weights = torch.zeros(2)
        weights[index] = 1.0
        with fused.routing(weights):
            torch.testing.assert_close(logits(fused), expected, atol=1e-5, rtol=1e-5)
    expected = logits(adapted, adapter_names=["second", "__base__", "first"])
    with fused.routing(torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])):
        torch.testing.assert_close(logits(fused), expected, atol=1e-5, rtol=1e-5)


def test_mixed_rows_generate_what_peft_generates(case: tuple[Any, Path, dict[str, Path]], tiny_tokenizer: Any) -> None:
    base, _, folders = case
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    fused = FusedCausalLM(copy.deepcopy(base), tiny_tokenizer, AdapterBank.from_peft(folders), Base())
    mask = torch.ones_like(IDS)
    adapted = peft_model(base, folders)
    expected = adapted.generate(input_ids=IDS, attention_mask=mask, adapter_names=["second", "__base__", "first"], **options)
    with fused.routing(torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])):
        found = fused.generate(input_ids=IDS, attention_mask=mask, **options)
    assert found.tolist() == expected.tolist()


def test_saving_and_loading(case: tuple[Any, Path, dict[str, Path]], tmp_path: Path) -> None:
    _, folder, folders = case
    fused = FusedCausalLM.from_pretrained(folder, pool=folders["first"].parent, method="oracle")
    fused.save_pretrained(tmp_path / "saved")
    again = FusedCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(again.method, Oracle)
    assert again.bank.checksum() == fused.bank.checksum()
    weights = torch.tensor([0.3, 0.7])
    with fused.routing(weights), again.routing(weights):
        assert torch.equal(logits(fused), logits(again))


# ---------------------------------------------------------------------- quantised bases


class TableLinear(torch.nn.Module):
    """A linear layer that keeps 16 levels and an index a weight, and has no ``weight`` to read."""

    def __init__(self, source: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        weight = source.weight.detach()
        self.register_buffer("levels", torch.linspace(float(weight.min()), float(weight.max()), 16))
        self.register_buffer("codes", (weight[..., None] - self.levels).abs().argmin(-1).to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.levels[self.codes.long()])


def test_a_base_whose_weight_cannot_be_read(
    tiny_llama: Any, tiny_tokenizer: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "it", seed=1)
    for layer in tiny_llama.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, TableLinear(getattr(layer.self_attn, name)))
    rounded = copy.deepcopy(tiny_llama)  # the same numbers in ordinary layers, which is what PEFT can wrap
    for layer in rounded.model.layers:
        for name in ("q_proj", "v_proj"):
            table = getattr(layer.self_attn, name)
            linear = torch.nn.Linear(table.in_features, table.out_features, bias=False)
            linear.weight.data = table.levels[table.codes.long()]
            setattr(layer.self_attn, name, linear)
    expected = logits(PeftModel.from_pretrained(rounded, str(adapter)).eval())
    fused = FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_peft({"it": adapter}), Base())
    with fused.routing(torch.ones(1)):
        torch.testing.assert_close(logits(fused), expected, atol=1e-5, rtol=1e-5)


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (pip install 'dlplora[quant]')"
)


@pytest.fixture(scope="module")
def wide(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base of 64 channels, the block of bitsandbytes' 4-bit format, and two adapters."""
    root = tmp_path_factory.mktemp("wide")
    sizes = {**WIDE, "hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tiny_tokenizer), **sizes)).eval()
    base.save_pretrained(root / "base")
    tiny_tokenizer.save_pretrained(root / "base")
    return root / "base", {
        "first": save_peft(base, root / "pool" / "first", 1, r=4, lora_alpha=8, target_modules=LAYERS),
        "second": save_peft(base, root / "pool" / "second", 2, r=3, lora_alpha=5, target_modules=["q_proj"]),
    }


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantised_backbones_are_pefts(bits: str, wide: tuple[Path, dict[str, Path]]) -> None:
    folder, folders = wide
    fused = FusedCausalLM.from_pretrained(folder, pool=folders["first"].parent, method="base", **{bits: True})
    wrapped = fused.patched.layers["model.layers.0.self_attn.q_proj"].base
    assert type(wrapped).__name__ == {"load_in_4bit": "Linear4bit", "load_in_8bit": "Linear8bitLt"}[bits]
    base, _ = load_backbone(folder, **{bits: True})
    plain, exact = logits(base), logits(load_backbone(folder)[0])
    assert float((plain - exact).abs().max()) > 0.01
    adapted = PeftModel.from_pretrained(base, str(folders["first"]), autocast_adapter_dtype=False).eval()
    expected = logits(adapted)
    assert float((expected - plain).abs().max()) > 0.05
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with fused.routing(torch.tensor([1.0, 0.0])):
        torch.testing.assert_close(logits(fused), expected, atol=1e-5, rtol=1e-5)
        ids = fused.generate(input_ids=IDS, **options)
    assert ids.tolist() == adapted.generate(input_ids=IDS, **options).tolist()


@needs_bitsandbytes
def test_a_backbone_that_is_stored_in_four_bits(wide: tuple[Path, dict[str, Path]], tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder, folders = wide
    base, _ = load_backbone(folder, load_in_4bit=True)
    base.save_pretrained(tmp_path / "stored")
    tiny_tokenizer.save_pretrained(tmp_path / "stored")
    fused = FusedCausalLM.from_pretrained(tmp_path / "stored", pool=folders["first"].parent, method="base")
    assert type(fused.patched.layers["model.layers.0.self_attn.q_proj"].base).__name__ == "Linear4bit"
    with fused.routing(torch.zeros(2)):
        assert torch.equal(logits(fused), logits(base))


@needs_bitsandbytes
def test_an_adapter_made_on_a_quantised_base(wide: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, _ = wide
    made = save_peft(load_backbone(folder, load_in_4bit=True)[0], tmp_path / "pool" / "made", 4, r=4, target_modules=LAYERS)
    adapted = PeftModel.from_pretrained(load_backbone(folder, load_in_4bit=True)[0], str(made), autocast_adapter_dtype=False).eval()
    fused = FusedCausalLM.from_pretrained(folder, pool=made.parent, method="base", load_in_4bit=True)
    with fused.routing(torch.ones(1)):
        torch.testing.assert_close(logits(fused), logits(adapted), atol=1e-5, rtol=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}, {"dtype": torch.float16}])
def test_a_pool_knows_its_backbone_in_any_storage(options: dict[str, Any], wide: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, folders = wide
    shutil.copytree(folders["first"].parent, tmp_path / "pool")
    exact = base_fingerprint(load_backbone(folder)[0])
    write_manifest(tmp_path / "pool", ["first"], exact)
    assert FusedCausalLM.from_pretrained(folder, pool=tmp_path / "pool", method="base", **options).fingerprint() == exact
    assert base_fingerprint(load_backbone(folder)[0].to(torch.bfloat16)) == exact


def test_widths_that_a_cpu_kernel_cannot_serve() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 64), torch.nn.Linear(64, 16))
    check_widths(model)
    for index, sizes in ((1, "32 -> 64"), (2, "64 -> 16")):
        model[index].support_avx512bf16_for_cpu = True
        with pytest.raises(ConfigError, match=f"multiples of 64 and .* of 32; '{index}' maps {sizes}. Use load_in_8bit, or a GPU"):
            check_widths(model)
        model[index].support_avx512bf16_for_cpu = False
    model[0].support_avx512bf16_for_cpu = True
    check_widths(model)


def test_quantisation_that_cannot_be_had(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        load_backbone(tiny_llama_folder, load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ConfigError, match=r"unknown bnb_4bit_quant_type 'nf5'.*nf4, fp4"):
        load_backbone(tiny_llama_folder, load_in_4bit=True, bnb_4bit_quant_type="nf5")
    with pytest.raises(ConfigError, match="unknown bnb_4bit_compute_dtype 'int8'"):
        load_backbone(tiny_llama_folder, load_in_4bit=True, bnb_4bit_compute_dtype="int8")
    monkeypatch.setattr("dlplora.inference.quantization.is_installed", lambda _: False)
    with pytest.raises(ConfigError, match=r"8-bit loading needs the package bitsandbytes.*dlplora\[quant\]"):
        load_backbone(tiny_llama_folder, load_in_8bit=True)
