"""Which backend is chosen, which are refused and why, and what is said when memory runs out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlplora.baselines.arrow import Arrow
from dlplora.errors import AllocationError, RoutingError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.kernels import cost_model
from dlplora.kernels.allocation import zeros
from dlplora.kernels.backends import BACKENDS, RoutingFacts, select_backend
from dlplora.kernels.cost_model import LayerShape, Work
from dlplora.kernels.folded import FoldedBuffers
from dlplora.kernels.merged import MergedBuffers
from dlplora.methods.base import FusionMethod, Metadata, MethodContext
from dlplora.methods.dlp import DLP
from dlplora.methods.references import Oracle
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.routing_state import RoutingState
from dlplora.types import PromptBatch

ROWS = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
ALIKE = torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 2)
TOKENS = torch.rand(2, 3, 4)


def facts(weights: Tensor, **options: Any) -> RoutingFacts:
    return RoutingFacts.of(weights, **options)


def test_facts_of_plans() -> None:
    assert (facts(ROWS).kind, facts(ROWS).alike, facts(ROWS).weight_rows, facts(ROWS).width) == ("row", False, 2, 1)
    assert (facts(ALIKE).alike, facts(ALIKE).weight_rows) == (True, 1)
    assert (facts(ALIKE, reroutes=True).alike, facts(ALIKE[:1], reroutes=True).alike) == (False, True)
    assert (facts(ROWS, width=3).width, facts(ROWS, width=9).width) == (3, 4)
    assert (facts(torch.ones(4)).kind, facts(torch.ones(4)).width, facts(torch.ones(4)).rows) == ("static", 4, 1)
    assert (facts(TOKENS).kind, facts(TOKENS).alike, facts(TOKENS).width) == ("token", False, 4)
    assert facts(ROWS.clone().requires_grad_()).gradients
    assert (facts(ALIKE, width=2).weight_rows, facts(ALIKE[:1], width=2).weight_rows) == (2, 1)


@pytest.mark.parametrize(
    ("name", "weights", "options", "reason", "able"),
    [
        ("folded", TOKENS, {}, "routing weights change per token", "reference, dense; or auto"),
        ("merged", TOKENS, {}, "routing weights change per token", "reference, dense; or auto"),
        ("triton", TOKENS, {}, "routing weights change per token", "reference, dense; or auto"),
        ("merged", ROWS, {}, "its 2 rows are routed differently", "reference, dense, folded"),
        ("merged", ALIKE, {"reroutes": True}, "may be after a sentence end", "reference, dense, folded"),
        ("folded", ROWS.clone().requires_grad_(), {}, "gradients must reach", "reference, dense; or auto"),
    ],
)
def test_a_backend_that_cannot_serve_says_why_and_who_can(name: str, weights: Tensor, options: Any, reason: str, able: str) -> None:
    with pytest.raises(RoutingError, match=rf"backend '{name}' cannot serve this request: .*{reason}.*Backends that can: {able}"):
        RoutingState(weights, name, **options)


def test_rows_of_a_merged_plan_cannot_part() -> None:
    state = RoutingState(ALIKE.clone(), "merged")
    with pytest.raises(RoutingError, match=r"'merged' cannot serve 2 rows that are routed differently.*folded"):
        state.update_rows(torch.tensor([0]), torch.ones(1, 4))


def test_names_are_checked() -> None:
    with pytest.raises(RoutingError, match=r"unknown backend 'fold'. Did you mean 'folded'"):
        select_backend("fold", facts(ROWS))
    for name in ("reference", "dense", "folded", "merged"):
        assert select_backend(name, facts(ALIKE)) == name


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(RoutingError, match=r"'triton'.*it runs on cpu.*needs a CUDA device.*Backends that can: reference, dense, folded"):
        select_backend("triton", facts(ROWS))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RoutingError, match=r"'triton'.*not installed \(pip install 'dlplora\[triton\]'\)"):
        select_backend("triton", facts(ROWS))


def test_auto_without_constants_reads_the_fewest_factors() -> None:
    assert select_backend("auto", facts(ROWS)) == "folded"
    assert select_backend("auto", facts(ALIKE)) == "folded"
    assert select_backend("auto", facts(torch.rand(3, 4) + 0.1)) == "dense"
    assert select_backend("auto", facts(TOKENS)) == "dense"
    assert select_backend("auto", facts(ROWS.clone().requires_grad_())) == "dense"
    unmeasured = Work(layers=(LayerShape(64, 64, 4, 8),), device="abacus")
    assert select_backend("auto", facts(ROWS), unmeasured) == "folded"


def test_auto_takes_the_smaller_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms by hand: one layer of 10 inputs and 6 outputs, 4 experts of rank 2, in float32, two rows, one expert kept."""
    layer = LayerShape(10, 6, 4, 2)
    assert cost_model.step_terms("dense", layer, 2, 2, 3, 1, 4) == cost_model.Terms(5, 4 * (8 * 16 + 6 * (16 + 16)), 2 * 6 * 8 * 16)
    assert cost_model.step_terms("folded", layer, 2, 2, 3, 1, 4) == cost_model.Terms(3, 4 * (2 * 2 * 16 + 6 * (16 + 4)), 2 * 6 * 2 * 16)
    assert cost_model.step_terms("folded", layer, 2, 1, 3, 1, 4).nbytes == 4 * (2 * 16 + 6 * (16 + 4))
    assert cost_model.step_terms("merged", layer, 2, 1, 3, 1, 4) == cost_model.Terms()
    constants = {name: {"launch_s": 1.0, "byte_s": 0.0, "flop_s": 0.0} for name in ("dense", "folded")}
    (tmp_path / "costs.json").write_text(json.dumps({"devices": {"cpu": {"constants": constants}}}))
    monkeypatch.setattr(cost_model, "CONSTANTS", tmp_path / "costs.json")
    cost_model.constants.cache_clear()
    try:
        short = Work(layers=(layer,), device="cpu", prompt_tokens=1, new_tokens=0)
        long = Work(layers=(layer,), device="cpu", prompt_tokens=1, new_tokens=20)
        assert cost_model.predict("dense", short, 2, 2, 1) == 5
        assert cost_model.predict("folded", short, 2, 2, 1) == 12 + 3
        assert cost_model.predict("folded", long, 2, 2, 1) == 12 + 3 * 21
        assert cost_model.predict("triton", short, 2, 2, 1) is None
        assert select_backend("auto", facts(ROWS), short) == "dense"  # folding does not pay for one forward
        assert select_backend("auto", facts(ROWS), long) == "folded"
    finally:
        cost_model.constants.cache_clear()


def test_the_committed_constants_are_measured_ones() -> None:
    devices = json.loads(cost_model.CONSTANTS.read_text())["devices"]
    assert "cpu" in devices
    for record in devices.values():
        assert record["hardware"]
        assert record["samples"]
        for constants in record["constants"].values():
            assert set(constants) == {"launch_s", "byte_s", "flop_s"}
            assert all(value >= 0 for value in constants.values())
            assert any(value > 0 for value in constants.values())


class Fixed(FusionMethod):
    """The same expert for every prompt."""

    name = "fixed"
    metadata = Metadata(title="Fixed", granularity="prompt")

    def route(self, prompts: PromptBatch) -> Tensor:
        return torch.nn.functional.one_hot(torch.zeros(len(prompts), dtype=torch.long), len(self.expert_names)).float()


def test_methods_that_no_backend_can_serve_are_refused_by_name(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    bank = AdapterBank.from_pool(tiny_pool)
    plain = dict(tiny_llama.named_modules())["model.layers.0.self_attn.q_proj"]
    for backend in ("folded", "merged", "triton"):
        with pytest.raises(RoutingError, match=rf"backend '{backend}' cannot serve method .arrow[^:]*: its gates.*reference, dense"):
            FusedCausalLM(tiny_llama, tiny_tokenizer, bank, Arrow(), backend=backend)
    assert dict(tiny_llama.named_modules())["model.layers.0.self_attn.q_proj"] is plain  # the model is as it was
    with pytest.raises(RoutingError, match=r"unknown backend 'fold'"):
        FusedCausalLM(tiny_llama, tiny_tokenizer, bank, Fixed(), backend="fold")


class Packed(torch.nn.Module):
    """A linear layer whose weight is not a matrix of numbers, as in 4-bit layers."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self._base = (base,)

    def forward(self, x: Tensor) -> Tensor:
        return self._base[0](x)


def test_merging_into_a_quantised_base_is_refused_and_the_others_serve_it(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    bank = AdapterBank.from_pool(tiny_pool)
    ids = torch.tensor([[1, 5, 6, 7]])
    plain = FusedCausalLM(tiny_llama, tiny_tokenizer, bank, Fixed())
    with plain.routing(torch.tensor([0.0, 1.0, 0.0])):
        expected = plain(input_ids=ids).logits
    plain.close()
    attention = tiny_llama.model.layers[1].self_attn
    attention.v_proj = Packed(attention.v_proj)
    with pytest.raises(RoutingError, match=r"'merged' cannot serve module 'model.layers.1.self_attn.v_proj'.*Packed.*can: reference"):
        FusedCausalLM(tiny_llama, tiny_tokenizer, bank, Fixed(), backend="merged")
    with pytest.raises(RoutingError, match="whose weight cannot be read"):
        MergedBuffers(attention.v_proj, 1)
    for backend in ("reference", "dense", "folded"):
        fused = FusedCausalLM(tiny_llama, tiny_tokenizer, bank, Fixed(), backend=backend)
        with fused.routing(torch.tensor([0.0, 1.0, 0.0])):
            torch.testing.assert_close(fused(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        fused.close()


def test_the_backend_in_use_is_told(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    bank = AdapterBank.from_pool(tiny_pool)
    for backend in ("reference", "dense", "folded", "merged"):
        fused = FusedCausalLM(tiny_llama, tiny_tokenizer, bank, Fixed(), backend=backend)
        fused.generate("the cat", max_new_tokens=2, do_sample=False)
        assert fused.backends_used() == backend
        fused.close()
    fused = FusedCausalLM(tiny_llama, tiny_tokenizer, bank, Fixed(), backend="merged")
    fused.route(PromptBatch.from_texts(["the cat"], tiny_tokenizer))
    assert fused.backends_used() == ""  # a plan that was never bound computed nothing
    fused.backend = "dense"
    fused.generate("the cat", max_new_tokens=2, do_sample=False)
    assert fused.backends_used() == "dense"
    with pytest.raises(RoutingError, match="unknown backend 'none'"):
        fused.backend = "none"
    assert fused.backend == "dense"
    fused.close()
    fused = FusedCausalLM(tiny_llama, tiny_tokenizer, bank, Arrow(), backend="reference")
    assert fused.backends_used() == "reference"
    fused.close()


def test_what_methods_keep_at_most(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    bank = AdapterBank.from_pool(tiny_pool)
    context = MethodContext(tokenizer=tiny_tokenizer, embedding=tiny_llama.get_input_embeddings())
    method = DLP(DLP.Config())
    method.expert_names = tuple(map(str, range(26)))

    def most(**config: Any) -> int:
        method.config = DLP.Config(**config)
        return method.max_kept

    assert most(threshold=0.2) == 5  # five of 0.2
    assert most(threshold=0.3) == 3
    assert most(threshold=0.6) == 1
    assert most(threshold=0.0) == 26
    assert most(threshold=1 / 26) == 26
    assert most(threshold=0.9, min_keep=2) == 2
    assert most(selector="topk", top_k=3) == 3
    assert most(selector="argmax") == 1
    assert most(selector="nucleus", top_p=0.6) == 16  # 15 of 1/26 hold less than 0.6, and the crossing one
    assert most(selector="nucleus", top_p=1.0) == 26
    for config in (
        {"threshold": 0.2},
        {"threshold": 0.04},
        {"selector": "nucleus", "top_p": 0.5},
        {"selector": "nucleus", "top_p": 0.95},
        {"threshold": 0.3, "min_keep": 4},
    ):
        bound = most(**config)
        for seed in range(200):
            generator = torch.Generator().manual_seed(seed)
            sharpness = 6 * torch.rand(1, generator=generator)
            probs = (sharpness * torch.randn(8, 26, generator=generator)).softmax(-1)
            assert int(method.select(probs).sum(-1).max()) <= bound
        assert int(method.select(torch.full((1, 26), 1 / 26)).sum()) <= bound
    oracle = Oracle()
    oracle.prepare(bank, context)
    assert oracle.max_kept == 1


def test_out_of_memory_names_the_tensor_its_size_and_what_shrinks_it() -> None:
    with pytest.raises(
        AllocationError, match=r"out of memory on cpu: a thing, 1048576x1048576x1024 in float32, needs 4.19e\+06 GiB. Do less."
    ):
        zeros((2**20, 2**20, 2**10), dtype=torch.float32, device="cpu", what="a thing", shrink="Do less.")
    with pytest.raises(RuntimeError, match="non-negative"):
        zeros((-1,), dtype=torch.float32, device="cpu", what="a thing", shrink="Do less.")


def test_a_bank_and_a_plan_that_do_not_fit_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lora_a, lora_b = torch.zeros(3, 8, 64), torch.zeros(3, 64, 8)
    with pytest.raises(AllocationError, match=r"folded A of 1000000000000 rows with 2 experts each.*smaller batch.*backend=dense"):
        FoldedBuffers(10**12, 2, lora_a, lora_b)
    huge = torch.zeros(1, 1).expand(2**30, 2**30)
    with pytest.raises(AllocationError, match=r"stacked A of module 'layer'.*Load fewer experts.*smaller rank.*dtype"):
        AdapterBank.from_tensors(("x",), {"layer": [(huge, torch.zeros(1, 1).expand(4, 2**30), 1.0)]})


def test_every_backend_is_described() -> None:
    assert list(BACKENDS) == ["reference", "dense", "folded", "merged", "triton"]
    assert json.dumps(BACKENDS)
