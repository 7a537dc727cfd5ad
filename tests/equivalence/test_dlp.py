"""DLP-LoRA against hand-computed numbers, brute force, and deltas merged in float64."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merged_truth import merged_logits
from safetensors.torch import load_file

from dlplora.errors import MethodError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import MethodContext
from dlplora.methods.dlp import DLP
from dlplora.methods.references import Oracle
from dlplora.modules.fused_linear import FusedLinear
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.router import MiniMLPRouter, RouterConfig
from dlplora.types import PromptBatch

NAMES = ("alpha", "beta", "gamma")
TEXTS = ("Mia sees the red box.", "the cat", "Ann likes a dog and Tom likes a pear.", "yes or no: is the plum blue?")


def random_router(embedding: Any, names: tuple[str, ...] = NAMES, seed: int = 1, scale: float = 2.2) -> MiniMLPRouter:
    """Wide weights and no biases, so that prompts are routed differently and some keep several experts."""
    generator = torch.Generator().manual_seed(seed)
    router = MiniMLPRouter(names, RouterConfig(hidden=(9, 8, 7), pooling="embeddings"), embedding=embedding)
    with torch.no_grad():
        for parameter in router.parameters():
            wide = scale * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * wide)
    return router.eval()


def shuffled(router: MiniMLPRouter, order: tuple[str, ...], embedding: Any) -> MiniMLPRouter:
    """The same function with its classes in another order: rows of the last layer move with their names."""
    other = MiniMLPRouter(order, router.config, embedding=embedding)
    state = {key: value.clone() for key, value in router.state_dict().items()}
    rows = [router.names.index(name) for name in order]
    last = max(int(key.split(".")[1]) for key in state if key.startswith("mlp."))
    for part in ("weight", "bias"):
        state[f"mlp.{last}.{part}"] = state[f"mlp.{last}.{part}"][rows]
    other.load_state_dict(state)
    return other.eval()


@pytest.fixture
def fuse(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> Callable[..., FusedCausalLM]:
    def make(method: Any, **artifacts: Path) -> FusedCausalLM:
        model = copy.deepcopy(tiny_llama)
        context = MethodContext(tokenizer=tiny_tokenizer, embedding=model.get_input_embeddings(), artifacts=artifacts)
        return FusedCausalLM(model, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), method, context=context).eval()

    return make


def dlp(router: MiniMLPRouter | None = None, **settings: Any) -> DLP:
    method = DLP(DLP.Config(**settings))
    if router is not None:
        method.use_router(router)
    return method


def probabilities_by_hand(folder: Path, table: np.ndarray, ids: list[int], temperature: float) -> np.ndarray:
    """The router in float64 from its file alone."""
    tensors = {key: value.double().numpy() for key, value in load_file(folder / "router.safetensors").items()}
    x = table[ids].astype(np.float64).mean(0)
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    layers = sorted({int(key.split(".")[1]) for key in tensors if key.startswith("mlp.")})
    for layer in layers:
        x = tensors[f"mlp.{layer}.weight"] @ x + tensors[f"mlp.{layer}.bias"]
        if layer != layers[-1]:
            x = np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x])
    x = np.exp(x / temperature - (x / temperature).max())
    return x / x.sum()


def keep_by_hand(probs: list[float], selector: str, p: float, k: int, min_keep: int = 1) -> list[bool]:
    """Selection by its definition, with exact fractions; equal probabilities keep their order."""
    exact = [Fraction(value) for value in probs]
    order = sorted(range(len(exact)), key=lambda i: -exact[i])
    kept = [False] * len(exact)
    before = Fraction(0)
    for place, index in enumerate(order):
        by_rule = {
            "nucleus": before <= Fraction(p) or p >= 1,
            "threshold": exact[index] >= Fraction(p),
            "topk": place < k,
            "argmax": place < 1,
        }[selector]
        kept[index] = by_rule or (place < min_keep)
        before += exact[index]
    return kept


def weights_by_hand(probs: list[float], kept: list[bool], how: str) -> list[float]:
    chosen = [value for value, keep in zip(probs, kept, strict=True) if keep]
    share = {
        "softmax": lambda value: math.exp(value) / sum(math.exp(other) for other in chosen),
        "sum": lambda value: value / sum(chosen),
        "logits": lambda value: value / sum(chosen),  # exp of a log-probability is the probability
        "none": lambda value: value,
        "uniform": lambda value: 1.0 / len(chosen),
    }[how]
    return [share(value) if keep else 0.0 for value, keep in zip(probs, kept, strict=True)]


SETTINGS = [
    {"selector": "threshold", "threshold": 0.2, "renormalize": "softmax"},
    {"selector": "nucleus", "top_p": 0.6, "renormalize": "softmax"},
    {"selector": "nucleus", "top_p": 0.6, "renormalize": "sum"},
    {"selector": "topk", "top_k": 2, "renormalize": "logits"},
    {"selector": "topk", "top_k": 99, "renormalize": "none"},
    {"selector": "argmax", "renormalize": "sum"},
    {"selector": "nucleus", "top_p": 1.0, "renormalize": "uniform"},
]


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: "-".join(str(value) for value in options.values()))
def test_weights_and_logits_from_files_alone(
    fuse: Any, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    router = random_router(tiny_llama.get_input_embeddings())
    router.temperature.fill_(1.5)
    router.save(tmp_path)
    fused = fuse(dlp(**options), router=tmp_path)
    prompts = PromptBatch.from_texts(TEXTS, tiny_tokenizer)
    table = tiny_llama.get_input_embeddings().weight.detach().numpy()
    state = fused.route(prompts)
    with torch.no_grad(), fused.routing(state):
        logits = fused(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask).logits
    kept_counts = set()
    for row in range(len(TEXTS)):
        ids = prompts.input_ids[row][prompts.attention_mask[row].bool()].tolist()
        probs = probabilities_by_hand(tmp_path, table, ids, 1.5).tolist()
        kept = keep_by_hand(probs, options["selector"], bound_of(options), options.get("top_k", 2))
        expected = weights_by_hand(probs, kept, options["renormalize"])
        kept_counts.add(sum(kept))
        np.testing.assert_allclose(state.weights[row].numpy(), expected, atol=1e-5)
        truth = merged_logits(tiny_llama, tiny_pool, dict(zip(NAMES, expected, strict=True)), ids)
        actual = logits[row][prompts.attention_mask[row].bool()].double()
        assert (actual - truth).abs().max() <= 2e-5 * truth.abs().max()
    if options["selector"] in {"nucleus", "threshold"} and bound_of(options) < 1:
        assert len(kept_counts) > 1, "the prompts must exercise one and several experts"


def test_paper_numbers_of_the_second_softmax() -> None:
    """Kept {.505, .485} gives the paper's 50.5 % and 49.5 %; {.60, .30} gives .574 and .426; one kept gives 1."""
    method = dlp(selector="nucleus", top_p=0.6)
    cases = [([0.505, 0.485, 0.01], [0.505, 0.495, 0.0]), ([0.60, 0.30, 0.10], [0.574, 0.426, 0.0]), ([0.7, 0.2, 0.1], [1.0, 0.0, 0.0])]
    for probs, expected in cases:
        np.testing.assert_allclose(routed(method, [probs])[0], expected, atol=6e-4)
    np.testing.assert_allclose(
        routed(dlp(selector="nucleus", top_p=0.6, renormalize="sum"), [[0.60, 0.30, 0.10]])[0], [2 / 3, 1 / 3, 0], atol=1e-6
    )


def bound_of(options: dict[str, Any]) -> float:
    return options.get("top_p", 0.6) if options["selector"] == "nucleus" else options.get("threshold", 0.2)


def routed(method: DLP, probs: list[list[float]]) -> np.ndarray:
    """Weights of a method whose router says ``probs``."""
    table = torch.tensor(probs, dtype=torch.float32)
    method.probabilities = lambda prompts: (table, table.log())  # type: ignore[method-assign]
    ids = torch.ones(len(probs), 1, dtype=torch.long)
    weights = method.route(PromptBatch(ids, ids, ("x",) * len(probs)))
    assert weights.dtype == torch.float32
    return weights.numpy()


@st.composite
def dyadic_rows(draw: Any) -> list[float]:
    """Probabilities that are exact in binary, so that ties and equality with p occur and mean what they say."""
    count = draw(st.integers(1, 7))
    cuts = sorted(draw(st.lists(st.integers(0, 64), min_size=count - 1, max_size=count - 1)))
    return [(high - low) / 64 for low, high in itertools.pairwise([0, *cuts, 64])]


@settings(max_examples=200, deadline=None)
@given(
    row=dyadic_rows(),
    p=st.integers(0, 80).map(lambda n: n / 64),
    selector=st.sampled_from(["nucleus", "threshold", "topk", "argmax"]),
    k=st.integers(1, 9),
)
def test_selection_equals_brute_force(row: list[float], p: float, selector: str, k: int) -> None:
    method = dlp(selector=selector, top_k=k, **{"top_p" if selector == "nucleus" else "threshold": p})
    assert method.select(torch.tensor([row]))[0].tolist() == keep_by_hand(row, selector, p, k)


@settings(max_examples=60, deadline=None)
@given(
    row=dyadic_rows(),
    p=st.integers(0, 64).map(lambda n: n / 64),
    min_keep=st.integers(1, 4),
    selector=st.sampled_from(["nucleus", "threshold"]),
)
def test_min_keep_equals_brute_force(row: list[float], p: float, min_keep: int, selector: str) -> None:
    method = dlp(selector=selector, min_keep=min_keep, **{"top_p" if selector == "nucleus" else "threshold": p})
    assert method.select(torch.tensor([row]))[0].tolist() == keep_by_hand(row, selector, p, 1, min_keep)


@pytest.mark.parametrize(("p", "kept"), [(0.0, 1), (1e-6, 1), (0.49, 1), (0.5, 2), (0.74, 2), (0.75, 3), (0.99, 3), (1.0, 3), (7.0, 3)])
def test_nucleus_boundaries(p: float, kept: int) -> None:
    """Probabilities 1/2, 1/4, 1/4: an expert is kept while the sum before it is at most p; p >= 1 keeps all."""
    assert int(dlp(selector="nucleus", top_p=p).select(torch.tensor([[0.25, 0.5, 0.25]])).sum()) == kept


def test_nucleus_at_one_keeps_experts_of_zero_probability() -> None:
    assert dlp(selector="nucleus", top_p=1.0).select(torch.tensor([[1.0, 0.0, 0.0]])).tolist() == [[True, True, True]]


@settings(max_examples=100, deadline=None)
@given(row=dyadic_rows(), p=st.integers(0, 64).map(lambda n: n / 64))
def test_bounds_of_the_second_softmax(row: list[float], p: float) -> None:
    """Every weight of k kept experts lies in [1 / (1 + (k - 1) e), 1], and they sum to one."""
    weights = routed(dlp(selector="nucleus", top_p=p), [row])[0]
    kept = [value for value in weights if value > 0]
    assert sum(kept) == pytest.approx(1.0, abs=1e-6)
    assert min(kept) >= 1 / (1 + (len(kept) - 1) * math.e) - 1e-6
    np.testing.assert_allclose(weights, weights_by_hand(row, keep_by_hand(row, "nucleus", p, 1), "softmax"), atol=1e-6)


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES))[1:])
def test_classes_meet_adapters_by_name(fuse: Any, tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path, order: tuple[str, ...]) -> None:
    embedding = tiny_llama.get_input_embeddings()
    router = random_router(embedding)
    router.save(tmp_path / "plain")
    shuffled(router, order, embedding).save(tmp_path / "shuffled")
    prompts = PromptBatch.from_texts(TEXTS, tiny_tokenizer)
    plain = fuse(dlp(), router=tmp_path / "plain").route(prompts).weights
    other = fuse(dlp(), router=tmp_path / "shuffled").route(prompts).weights
    assert (plain - other).abs().max() <= 1e-6
    assert len({tuple(row.gt(0).tolist()) for row in plain}) > 1


def test_loss_meets_classes_by_name(fuse: Any, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    embedding = tiny_llama.get_input_embeddings()
    router = random_router(embedding)
    prompts = PromptBatch.from_texts(TEXTS, tiny_tokenizer)
    batch = {"prompts": prompts, "expert_idx": torch.tensor([0, 1, 2, 2])}
    log_probs = router(prompts.input_ids, prompts.attention_mask).detach().double().log_softmax(-1)
    expected = -sum(float(log_probs[row, column]) for row, column in enumerate([0, 1, 2, 2])) / 4
    fused = fuse(dlp(shuffled(router, ("gamma", "alpha", "beta"), embedding)))
    assert fused.method.loss(batch).item() == pytest.approx(expected, abs=1e-5)


def test_a_sure_router_is_the_oracle(fuse: Any, tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = ("gamma", "alpha", "beta", "alpha")
    prompts = PromptBatch.from_texts(TEXTS, tiny_tokenizer, task_names=tasks)
    router = random_router(tiny_llama.get_input_embeddings())
    one_hot = torch.tensor([[float(name == task) for name in NAMES] for task in tasks]) * 200.0
    monkeypatch.setattr(router, "forward", lambda ids, mask: one_hot)
    wanted = fuse(Oracle())
    with torch.no_grad(), wanted.routing(wanted.route(prompts)):
        expected = wanted(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask).logits
    for preset in ({"selector": "threshold", "threshold": 0.2}, {"selector": "nucleus", "top_p": 0.6}, {"selector": "argmax"}):
        fused = fuse(dlp(router, **preset))
        with torch.no_grad(), fused.routing(fused.route(prompts)):
            actual = fused(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask).logits
        assert torch.equal(actual, expected), preset


def test_every_layer_of_a_deep_model_is_adapted(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """The released code stops at layer 28; a 32-layer model must have all 64 projections adapted."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny_tokenizer), num_hidden_layers=32, initializer_range=0.2, **shape)).eval()
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "only")
    expected_model = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "only")).eval()
    prompts = PromptBatch.from_texts(TEXTS[:1], tiny_tokenizer)
    with torch.no_grad():
        expected = expected_model(input_ids=prompts.input_ids).logits
    embedding = model.get_input_embeddings()
    method = dlp(random_router(embedding, names=("only",)))
    bank = AdapterBank.from_peft({"only": tmp_path / "only"})
    fused = FusedCausalLM(model, tiny_tokenizer, bank, method, context=MethodContext(tokenizer=tiny_tokenizer, embedding=embedding)).eval()
    assert sum(isinstance(module, FusedLinear) for module in fused.model.modules()) == 64
    with torch.no_grad(), fused.routing(fused.route(prompts)):
        actual = fused(input_ids=prompts.input_ids).logits
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_router_comes_from_the_configuration_or_the_context(fuse: Any, tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    embedding = tiny_llama.get_input_embeddings()
    random_router(embedding, seed=1).save(tmp_path / "one")
    random_router(embedding, seed=2).save(tmp_path / "two")
    prompts = PromptBatch.from_texts(TEXTS, tiny_tokenizer)
    one = fuse(dlp(), router=tmp_path / "one").route(prompts).weights
    two = fuse(dlp(), router=tmp_path / "two").route(prompts).weights
    assert not torch.allclose(one, two)
    assert torch.equal(fuse(dlp(router=None), router=tmp_path / "two").route(prompts).weights, two)
    method = DLP(DLP.Config(router=str(tmp_path / "one")))
    assert torch.equal(fuse(method, router=tmp_path / "two").route(prompts).weights, one)
    method.save(tmp_path / "saved")
    context = MethodContext(tokenizer=tiny_tokenizer, embedding=embedding, artifacts={"router": tmp_path / "two"})
    loaded = DLP.load(tmp_path / "saved", AdapterBank.from_peft({name: fake_pool(tmp_path) / name for name in NAMES}), context)
    assert torch.equal(loaded.route(prompts), one)


def fake_pool(tmp_path: Path) -> Path:
    """Three adapters whose content does not matter."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    for name in NAMES:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(tmp_path / "fake" / name)
    return tmp_path / "fake"


def test_errors_name_the_router_and_the_difference(fuse: Any, tiny_llama: Any, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="method 'dlp' needs a router; none was given"):
        fuse(dlp())
    random_router(tiny_llama.get_input_embeddings(), names=("alpha", "beta", "delta")).save(tmp_path)
    with pytest.raises(MethodError, match=r"without a router class \['gamma'\].*without an adapter \['delta'\]"):
        fuse(dlp(), router=tmp_path)
    ids = torch.ones(1, 1, dtype=torch.long)
    with pytest.raises(MethodError, match=r"call prepare\(bank, context\) first"):
        dlp().route(PromptBatch(ids, ids, ("x",)))


def test_what_an_instance_says_about_itself() -> None:
    assert (dlp(reroute="prompt").granularity, dlp(reroute="sentence").granularity) == ("prompt", "sentence")
    assert (dlp().view, dlp(view="segment").view) == ("tail", "segment")
    assert (dlp(renormalize="none").weight_sum, dlp(renormalize="softmax").weight_sum) == ("at_most_one", "one")
