"""Trained token gates against float64 formulas, their losses by hand, and the limits their papers state."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlplora.baselines._gates import first_modules, layer_of
from dlplora.baselines.adafuse import AdaFuse
from dlplora.baselines.lora_flow import LoRAFlow, LoRAFlowConfig
from dlplora.baselines.meteora import MeteoRA, MeteoRAConfig
from dlplora.baselines.mole import MoLE, MoLEConfig, balancing_loss
from dlplora.baselines.phatgoose import Phatgoose, PhatgooseConfig
from dlplora.errors import ConfigError, MethodError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import FusionMethod
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch
from tests.equivalence.merged_truth import deltas

NAMES = ("alpha", "beta", "gamma")
IDS = torch.tensor([[1, 5, 9, 40, 33, 7], [1, 80, 12, 3, 61, 90]])


def fuse(model: Any, tokenizer: Any, pool: Path, method: FusionMethod, seed: int = 0) -> FusedCausalLM:
    fused = FusedCausalLM(copy.deepcopy(model), tokenizer, AdapterBank.from_pool(pool, NAMES), method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.parameters():  # as if trained: every number matters
            if parameter.ndim:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return fused


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


def inputs_of(fused: FusedCausalLM) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and added delta of every fused layer in one forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda module, args, out, path=path: seen.update({path: (args[0], out - module.base(args[0]))}))
        for path, layer in fused.patched.layers.items()
    ]
    logits(fused)
    for hook in hooks:
        hook.remove()
    return seen


def check_layers(fused: FusedCausalLM, pool: Path, weigh: Any) -> None:
    """Every layer's delta is the weighted sum of the experts' deltas, weights by ``weigh(path, row, token)``."""
    parts = [deltas(pool / name) for name in NAMES]
    for path, (x, delta) in inputs_of(fused).items():
        for b, t in np.ndindex(*IDS.shape):
            token = x[b, t].double().numpy()
            weights = weigh(path, b, t, token)
            expected = sum(w * part[path].numpy() @ token for w, part in zip(weights, parts, strict=True))
            np.testing.assert_allclose(delta[b, t].double().numpy(), expected, atol=3e-4)


def array(tensor: Any) -> np.ndarray:
    return tensor.detach().double().numpy()


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 1.0), (3, 2000.0)])
def test_meteora_token_by_token(top_k: int, temperature: float, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    method = MeteoRA(MeteoRAConfig(top_k=top_k, temperature=temperature))
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)

    def weigh(path: str, b: int, t: int, token: np.ndarray) -> np.ndarray:
        scores = array(method.gates[path.replace(".", "/")]) @ token
        out, best = np.zeros(3), np.argsort(-scores)[:top_k]
        out[best] = softmax(scores[best] / temperature)
        return out

    check_layers(fused, tiny_pool, weigh)
    if temperature == 2000.0:  # k = N and a high temperature: nearly uniform
        assert float((method.gate(next(iter(fused.patched.layers)), torch.randn(1, 4, 32)) - 1 / 3).abs().max()) < 0.1


def batch_of(fused: FusedCausalLM, tokenizer: Any, pad: int = 0) -> dict[str, Any]:
    prompts = PromptBatch.from_texts(["the cat sees", "Mia"], tokenizer)
    ids = torch.nn.functional.pad(IDS, (0, pad))
    mask = torch.nn.functional.pad(torch.ones_like(IDS), (0, pad))
    mask[1, 4:] = 0

    def answer_loss(weights: Tensor | None) -> Tensor:
        assert weights is None
        return fused(input_ids=ids, attention_mask=mask).logits[:, 0].square().mean()

    return {"prompts": prompts, "expert_idx": torch.tensor([2, 0]), "attention_mask": mask, "input_ids": ids, "answer_loss": answer_loss}


def test_meteoras_gate_loss_by_hand(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """Cross-entropy of every gate at every real token, prompt included and padding not, with the row's own expert."""
    losses = {}
    for beta in (0.0, 7.0):
        method = MeteoRA(MeteoRAConfig(gate_loss=beta))
        fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)
        losses[beta] = float(method.loss(batch_of(fused, tiny_tokenizer, pad=3)).detach())
    batch = batch_of(fused, tiny_tokenizer)
    seen = inputs_of(fused)
    means = []
    for path, (x, _) in seen.items():
        values = [
            -math.log(softmax(array(method.gates[path.replace(".", "/")]) @ x[b, t].double().numpy())[[2, 0][b]])
            for b, t in np.ndindex(*IDS.shape)
            if batch["attention_mask"][b, t]
        ]
        means.append(np.mean(values))
    assert losses[7.0] - losses[0.0] == pytest.approx(7.0 * np.mean(means), rel=1e-3)


def test_full_meteora_trains_copies(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    method = MeteoRA(MeteoRAConfig(train_adapters=True, gate_loss=0.0))
    fused = FusedCausalLM(copy.deepcopy(tiny_llama), tiny_tokenizer, AdapterBank.from_pool(tiny_pool, NAMES), method)
    reference = MeteoRA(MeteoRAConfig(gate_loss=0.0))
    plain = FusedCausalLM(copy.deepcopy(tiny_llama), tiny_tokenizer, AdapterBank.from_pool(tiny_pool, NAMES), reference)
    torch.testing.assert_close(logits(fused), logits(plain), atol=1e-6, rtol=1e-6)  # copies start as the adapters
    checksum = fused.bank.checksum()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.5)
    method.loss(batch_of(fused, tiny_tokenizer)).backward()
    optimizer.step()
    assert fused.bank.checksum() == checksum
    assert float((logits(fused) - logits(plain)).abs().max()) > 1e-4


@pytest.mark.parametrize("projection", [None, 5])
def test_mole_token_by_token(projection: int | None, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    method = MoLE(MoLEConfig(projection=projection))
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)
    parts = [deltas(tiny_pool / name) for name in NAMES]
    entering = {path: x for path, (x, _) in inputs_of(fused).items()}

    def weigh(path: str, b: int, t: int, token: np.ndarray) -> np.ndarray:
        layer = layer_of(path)
        first = f"{layer}.self_attn.q_proj"
        x = entering[first][b, t].double().numpy()
        answers = np.stack([part[first].numpy() @ x for part in parts])
        if projection is not None:
            answers = answers @ array(method.projections[layer.replace(".", "/")])
        flat = answers.flatten()
        flat = flat / np.sqrt((flat**2).mean() + 1e-6)
        return softmax(flat @ array(method.gates[layer.replace(".", "/")]) / math.exp(float(method.log_tau[layer.replace(".", "/")])))

    check_layers(fused, tiny_pool, weigh)


def test_mole_starts_uniform(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    fused = FusedCausalLM(copy.deepcopy(tiny_llama), tiny_tokenizer, AdapterBank.from_pool(tiny_pool, NAMES), MoLE())
    check_layers(fused, tiny_pool, lambda *_: np.full(3, 1 / 3))


def test_the_balancing_loss_is_smallest_at_equal_shares() -> None:
    mask = torch.tensor([[1, 1, 0]])
    uniform = torch.full((1, 3, 4), 0.25)
    assert float(balancing_loss([uniform, uniform], mask)) == pytest.approx(4 * math.log(4), rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        weights = torch.randn(1, 3, 4, generator=generator).softmax(-1)
        assert float(balancing_loss([weights], mask)) > 4 * math.log(4)
        garbage = weights.clone()
        garbage[:, 2] = torch.tensor([1.0, 0.0, 0.0, 0.0])  # padding does not count
        assert float(balancing_loss([garbage], mask)) == pytest.approx(float(balancing_loss([weights], mask)), rel=1e-6)


def test_phatgoose_token_by_token(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    method = Phatgoose()
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)

    def standard(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def weigh(path: str, b: int, t: int, token: np.ndarray) -> np.ndarray:
        vectors = standard(array(method.gates[path.replace(".", "/")]))
        scores = vectors @ standard(token) / math.sqrt(len(token))
        out, best = np.zeros(3), np.argsort(-scores)[:2]
        out[best] = softmax(scores[best])
        return out

    check_layers(fused, tiny_pool, weigh)


def test_phatgoose_trains_each_gate_on_its_own_rows(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    method = Phatgoose()
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)
    method.loss(batch_of(fused, tiny_tokenizer)).backward()  # rows of gamma and alpha
    for gate in method.parameters():
        assert gate.grad is not None
        moved = gate.grad.abs().sum(-1) > 0
        assert not bool(moved[1])
    assert any(bool(gate.grad.abs().sum(-1)[2] > 0) for gate in method.parameters())  # type: ignore[union-attr]
    method._pass.own = torch.tensor([2, 0])
    parts = [deltas(tiny_pool / name) for name in NAMES]
    for path, (x, delta) in inputs_of(fused).items():
        for b, t in np.ndindex(*IDS.shape):
            own, token = [2, 0][b], x[b, t].double().numpy()
            strength = 1 / (1 + math.exp(-float(array(method.gates[path.replace(".", "/")])[own] @ token)))
            np.testing.assert_allclose(delta[b, t].double().numpy(), strength * parts[own][path].numpy() @ token, atol=3e-4)


@pytest.mark.parametrize("temperature", [1.0, 1.1])
def test_lora_flow_token_by_token(temperature: float, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    method = LoRAFlow(LoRAFlowConfig(temperature=temperature))
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)
    stream: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, kwargs, i=i: stream.update({f"model.layers.{i}": args[0]}), with_kwargs=True)
        for i, layer in enumerate(fused.model.model.layers)
    ]
    logits(fused)
    for hook in hooks:
        hook.remove()

    def weigh(path: str, b: int, t: int, token: np.ndarray) -> np.ndarray:
        layer = layer_of(path)
        key = layer.replace(".", "/")
        return softmax(array(method.scores[key]) @ array(stream[layer][b, t]) / temperature) + array(method.biases[key])

    check_layers(fused, tiny_pool, weigh)


def test_lora_flow_starts_uniform_and_its_bias_can_name_one_expert(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    method = LoRAFlow()
    fused = FusedCausalLM(copy.deepcopy(tiny_llama), tiny_tokenizer, AdapterBank.from_pool(tiny_pool, NAMES), method)
    check_layers(fused, tiny_pool, lambda *_: np.full(3, 1 / 3))
    with torch.no_grad():
        for bias in method.biases.values():
            bias.copy_(torch.tensor([0.0, 1.0, 0.0]) - 1 / 3)
    check_layers(fused, tiny_pool, lambda *_: np.array([0.0, 1.0, 0.0]))


def test_adafuse_decides_once_a_token(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """The first q_proj decides, in float64 from its own input; every other layer follows."""
    method = AdaFuse()
    fused = fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)
    first = array(inputs_of(fused)["model.layers.0.self_attn.q_proj"][0])

    def weigh(path: str, b: int, t: int, token: np.ndarray) -> np.ndarray:
        scores = array(method.weight) @ first[b, t]
        out, best = np.zeros(3), np.argsort(-scores)[:2]
        out[best] = softmax(scores[best])
        return out

    check_layers(fused, tiny_pool, weigh)
    nothing = method.gate("model.layers.0.self_attn.q_proj", torch.zeros(1, 1, 32))
    torch.testing.assert_close(nothing, torch.full((1, 1, 3), 1 / 3))  # ties: no expert is preferred for its place in the pool
    assert method.num_trained_parameters == 3 * 32


def test_a_closed_model_watches_nothing(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    model = copy.deepcopy(tiny_llama)
    method = LoRAFlow()
    fused = FusedCausalLM(model, tiny_tokenizer, AdapterBank.from_pool(tiny_pool, NAMES), method)
    logits(fused)
    fused.close()
    method._pass.weights.clear()
    assert torch.equal(logits(model), logits(tiny_llama))
    assert method._pass.weights == {}


def test_which_module_of_a_layer_comes_first(tiny_pool: Path) -> None:
    bank = AdapterBank.from_pool(tiny_pool)
    expected = {f"model.layers.{i}": f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert first_modules(bank, "mole") == expected
    odd = AdapterBank.from_tensors(("x",), {"model.layers.0.odd": [(torch.ones(1, 2), torch.ones(2, 1), 1.0)]})
    with pytest.raises(MethodError, match="'odd' is not among"):
        first_modules(odd, "mole")
    mlp = {f"model.layers.0.mlp.{name}_proj": [(torch.ones(1, 2), torch.ones(2, 1), 1.0)] for name in ("down", "gate", "up")}
    assert first_modules(AdapterBank.from_tensors(("x",), mlp), "mole") == {"model.layers.0": "model.layers.0.mlp.gate_proj"}


def test_settings_out_of_range(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    for make in (
        lambda: MeteoRAConfig(temperature=0.0),
        lambda: MeteoRAConfig(gate_loss=-1.0),
        lambda: MoLEConfig(balance=-1.0),
        lambda: MoLEConfig(projection=0),
        lambda: LoRAFlowConfig(temperature=-1.0),
    ):
        with pytest.raises(ConfigError):
            make()
    for method in (MeteoRA(MeteoRAConfig(top_k=4)), Phatgoose(PhatgooseConfig(top_k=0))):
        with pytest.raises(MethodError, match="between 1 and the number of experts"):
            fuse(tiny_llama, tiny_tokenizer, tiny_pool, method)
