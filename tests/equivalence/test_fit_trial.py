"""Backbones that use their linear layers in unusual ways: flattened inputs, read weights, picked tokens. They equal PEFT or are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from dlplora.adapters.pool import load_pool
from dlplora.baselines.arrow import Arrow
from dlplora.errors import IncompatibleAdapterError, RoutingError
from dlplora.inference.backbone_check import check_pool_fits
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.patching import patch
from dlplora.methods.references import Base
from dlplora.modules.fused_linear import FusedLinear
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.routing_slot import RoutingSlot

IDS = torch.tensor([[1, 5, 9, 40, 33, 7], [1, 80, 12, 3, 61, 90], [1, 17, 17, 4, 8, 22]])
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
APART = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])


def save(base: Any, folder: Path, seed: int, **options: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def make(kind: str, vocab: int) -> tuple[Any, Any]:
    """A random model and the targets of its adapters."""
    ids = {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if kind == "opt":
            opt = transformers.OPTConfig(**ids, **SIZES, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.2)
            return transformers.OPTForCausalLM(opt).eval(), ["q_proj", "v_proj", "fc1", "fc2"]
        if kind == "qwen2_moe":
            sizes = {"intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 4}
            moe = transformers.Qwen2MoeConfig(**ids, **SIZES, **sizes, num_key_value_heads=2, num_experts_per_tok=2, initializer_range=0.2)
            return transformers.Qwen2MoeForCausalLM(moe).eval(), ["q_proj", "gate_proj", "up_proj", "down_proj"]
        rwkv = transformers.RwkvConfig(**ids, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64)
        model = transformers.RwkvForCausalLM(rwkv).eval()
        for name, parameter in model.named_parameters():
            if "weight" in name and parameter.ndim == 2:
                parameter.data.normal_(0, 0.2)
        return model, "all-linear"


@pytest.fixture(scope="module", params=["opt", "qwen2_moe", "rwkv"])
def case(request: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Path]]:
    base, targets = make(request.param, len(tiny_tokenizer))
    root = tmp_path_factory.mktemp(request.param)
    base.save_pretrained(root / "base")
    tiny_tokenizer.save_pretrained(root / "base")
    folders = {name: save(base, root / "pool" / name, seed, target_modules=targets) for seed, name in enumerate(("first", "second"))}
    return base, root / "base", folders


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def alone(base: Any, folders: dict[str, Path], row: int) -> Tensor:
    """PEFT, one row at a time: it cannot serve flattened rows of different adapters itself."""
    name = ("second", None, "first")[row]
    model = base if name is None else PeftModel.from_pretrained(copy.deepcopy(base), str(folders[name])).eval()
    return logits(model, IDS[row : row + 1])[0]


@pytest.mark.parametrize("backend", ["reference", "dense", "folded"])
def test_rows_routed_apart_are_pefts_rows_alone(backend: str, case: tuple[Any, Path, dict[str, Path]], tiny_tokenizer: Any) -> None:
    base, _, folders = case
    fused = FusedCausalLM(copy.deepcopy(base), tiny_tokenizer, AdapterBank.from_peft(folders), Base(), backend=backend)
    plain = logits(base)
    with fused.routing(APART):
        found = logits(fused)
    for row in range(3):
        torch.testing.assert_close(found[row], alone(base, folders, row), atol=2e-5, rtol=1e-4)
    assert float((found[0] - plain[0]).abs().max()) > 0.02
    fused.close()
    assert torch.equal(logits(fused.model), plain)


@pytest.mark.parametrize("backend", ["dense", "folded", "merged"])
def test_rows_routed_alike(backend: str, case: tuple[Any, Path, dict[str, Path]], tiny_tokenizer: Any) -> None:
    base, _, folders = case
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(base), str(folders["first"])).eval())
    fused = FusedCausalLM(copy.deepcopy(base), tiny_tokenizer, AdapterBank.from_peft(folders), Base(), backend=backend)
    for weights in (torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 0.0]] * 3)):
        with fused.routing(weights):
            torch.testing.assert_close(logits(fused), expected, atol=2e-5, rtol=1e-4)


def test_generation_of_mixed_rows(case: tuple[Any, Path, dict[str, Path]], tiny_tokenizer: Any) -> None:
    base, _, folders = case
    if base.config.model_type == "rwkv":
        pytest.skip("transformers' own RWKV generates something else in a batch than alone")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    fused = FusedCausalLM(copy.deepcopy(base), tiny_tokenizer, AdapterBank.from_peft(folders), Base())
    with fused.routing(APART):
        found = fused.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)
    for row, name in enumerate(("second", None, "first")):
        model = base if name is None else PeftModel.from_pretrained(copy.deepcopy(base), str(folders[name])).eval()
        one = IDS[row : row + 1]
        assert found[row].tolist() == model.generate(input_ids=one, attention_mask=torch.ones_like(one), **options)[0].tolist()


def test_gates_see_flattened_rows_as_rows(case: tuple[Any, Path, dict[str, Path]], tiny_tokenizer: Any) -> None:
    base, _, folders = case
    fused = FusedCausalLM(copy.deepcopy(base), tiny_tokenizer, AdapterBank.from_peft(folders), Arrow(Arrow.Config(top_k=1)))
    together = logits(fused)
    for row in range(3):
        torch.testing.assert_close(together[row], logits(fused, IDS[row : row + 1])[0], atol=2e-5, rtol=1e-4)


def test_multiple_choice_is_stock_lm_evals(case: tuple[Any, Path, dict[str, Path]], tiny_tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from dlplora.lm_eval.model import DLPLoRALM

    _, folder, folders = case
    pairs = [(question, choice) for question in ("the cat sees", "who likes the plum ?") for choice in (" a dog", " red", " a dog . yes")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    stock = HFLM(pretrained=str(folder), peft=str(folders["first"]), dtype="float32", device="cpu", batch_size=1)
    expected = [value for value, _ in stock.loglikelihood(requests, disable_tqdm=True)]
    ours = DLPLoRALM(
        pretrained=str(folder), pool=str(folders["first"].parent), names="first", method="avg_delta", device="cpu", batch_size=4
    )
    assert [value for value, _ in ours.loglikelihood(requests, disable_tqdm=True)] == pytest.approx(expected, abs=1e-4)


def test_pool_check_tries_the_shapes(case: tuple[Any, Path, dict[str, Path]]) -> None:
    _, folder, folders = case
    pool = load_pool(folders["first"].parent)
    assert "ForCausalLM" in check_pool_fits(pool, AdapterBank.from_pool(pool.path), str(folder))


def test_a_fused_layer_is_linear_like(tiny_llama: Any, tiny_pool: Path) -> None:
    handle = patch(tiny_llama, AdapterBank.from_pool(tiny_pool), RoutingSlot())
    layer = handle.layers["model.layers.0.self_attn.q_proj"]
    assert layer.weight is layer.base.weight
    assert layer.bias is None
    assert (layer.in_features, layer.out_features) == (32, 32)
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    with layer.slot.bind(_state(torch.tensor([0.5, 0.2, 0.3]))):
        whole = layer(x)
        torch.testing.assert_close(layer(x.flatten(0, 1)), whole.flatten(0, 1))
        torch.testing.assert_close(layer(x[0, 0]), whole[0, 0])
        torch.testing.assert_close(layer(x[:, :, None]), whole[:, :, None])
    with layer.slot.bind(_state(torch.eye(3))):
        whole = layer(x)
        torch.testing.assert_close(layer(x.view(3, 5, 1, 32)), whole.view(3, 5, 1, 32))
        with pytest.raises(RoutingError, match=r"'model.layers.0.self_attn.q_proj' got an input of shape \(15, 32\)"):
            layer(x.flatten(0, 1))  # nothing says that these are rows of five tokens
    with layer.slot.bind(_state(torch.tensor([[0.5, 0.2, 0.3]] * 3))):
        expected = layer(x)
        torch.testing.assert_close(layer(x.flatten(0, 1)), expected.flatten(0, 1))


def _state(weights: Tensor) -> Any:
    from dlplora.modules.routing_state import RoutingState

    return RoutingState(weights)


class Reader(nn.Module):
    """Multiplies by the weight of its layer instead of calling it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight)


class Picker(nn.Module):
    """Calls its layer on every other vector, as a mixture does with the tokens of one expert."""

    def __init__(self, layer: Any, order: Any) -> None:
        super().__init__()
        self.inner, self.order = layer, order

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        picked = self.order(len(flat))
        out = torch.zeros(len(flat), self.inner.out_features)
        out[picked] = self.inner(flat[picked])
        return out.view(*x.shape[:2], -1)


def wrapped(tiny_llama: Any, wrapper: Any, path: Path, make_adapter: Any) -> tuple[Any, AdapterBank]:
    """The llama with its v_proj inside another module, and two adapters for it there."""
    for layer in tiny_llama.model.layers:
        layer.self_attn.v_proj = wrapper(layer.self_attn.v_proj)
    folders = {name: save(tiny_llama, path / name, seed, target_modules=["inner"]) for seed, name in enumerate(("first", "second"))}
    return tiny_llama, AdapterBank.from_peft(folders)


def test_a_reader_of_weights_is_refused_by_name(tiny_llama: Any, tmp_path: Path, make_adapter: Any) -> None:
    model, bank = wrapped(tiny_llama, Reader, tmp_path, make_adapter)
    plain = logits(model)
    with pytest.raises(IncompatibleAdapterError, match=r"reads the weight of 'model.layers.0.self_attn.v_proj.inner' and never calls"):
        patch(model, bank, RoutingSlot())
    assert torch.equal(logits(model), plain)
    assert not any(isinstance(module, FusedLinear) for module in model.modules())


@pytest.mark.parametrize("order", ["half", "reversed"])
def test_picked_and_reordered_tokens(order: str, tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path, make_adapter: Any) -> None:
    """One set of weights for all rows works; rows that are routed differently are refused, also if there are as many vectors as tokens."""

    def chosen(count: int) -> Tensor:
        return torch.arange(0, count, 2) if order == "half" else torch.arange(count - 1, -1, -1)

    model, bank = wrapped(tiny_llama, lambda layer: Picker(layer, chosen), tmp_path, make_adapter)
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "first")).eval()
    expected, one_row = logits(adapted), logits(adapted, IDS[:1])
    fused = FusedCausalLM(model, tiny_tokenizer, bank, Base())
    for weights in (torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 0.0]] * 3)):
        with fused.routing(weights):
            torch.testing.assert_close(logits(fused), expected, atol=2e-5, rtol=1e-4)
    with fused.routing(APART), pytest.raises(RoutingError, match=r"v_proj.inner' got an input of shape .*3 rows, routed differently"):
        logits(fused)
    with fused.routing(torch.tensor([[1.0, 0.0]])):
        torch.testing.assert_close(logits(fused, IDS[:1]), one_row, atol=2e-5, rtol=1e-4)


def test_a_layer_that_answers_something_else(tiny_llama: Any, tmp_path: Path, make_adapter: Any) -> None:
    class WithBias(nn.Linear):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x), None

    class First(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.inner = WithBias(layer.in_features, layer.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[0]

    folders = {"it": make_adapter(tmp_path / "it", target_modules=["v_proj"])}
    bank = AdapterBank.from_peft(folders)
    for layer in tiny_llama.model.layers:
        layer.self_attn.v_proj = First(layer.self_attn.v_proj)
    renamed = {path.replace("v_proj", "v_proj.inner"): entry for path, entry in bank.modules.items()}
    with pytest.raises(IncompatibleAdapterError, match=r"v_proj.inner' \(WithBias\) is not a linear layer: it returns tuple"):
        patch(tiny_llama, AdapterBank(bank.names, renamed), RoutingSlot())


def test_the_trial_leaves_no_trace(tiny_llama: Any, tiny_pool: Path) -> None:
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    flags = [module.training for module in tiny_llama.modules()]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    handle = patch(tiny_llama, AdapterBank.from_pool(tiny_pool), RoutingSlot())
    assert torch.equal(torch.get_rng_state(), before)
    assert {layer.layout for layer in handle.layers.values()} == {"rows"}
    assert not handle.hooks
    handle.restore()
    assert [module.training for module in tiny_llama.modules()] == flags
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in tiny_llama.modules())
    assert json.dumps(sorted(name for name, _ in tiny_llama.named_modules() if "base" in name)) == "[]"
