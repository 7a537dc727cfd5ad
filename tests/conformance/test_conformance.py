"""Every discovered method against every line of the checklist, and every line against a method that breaks it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import discovered, make_case
from torch import Tensor, nn

from dlplora.methods.base import FusionMethod, Metadata, MethodContext
from dlplora.methods.dlp import DLP
from dlplora.methods.references import AvgDelta
from dlplora.modules.fused_linear import FusedLinear
from dlplora.modules.lora_bank import AdapterBank
from dlplora.testing.conformance import CHECKS, Case, ConformanceError, exempt_lines, run_all, run_check
from dlplora.types import PromptBatch


@pytest.fixture(scope="session")
def multitask_folder(make_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("multitask") / "all", seed=11, r=6, lora_alpha=12)


@pytest.fixture
def case_of(
    tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path, uniform_pool: Path, multitask_folder: Path, tmp_path: Path
) -> Callable[[str | Callable[[], FusionMethod]], Case]:
    def make(build: str | Callable[[], FusionMethod]) -> Case:
        pools = {"pool": tiny_pool, "uniform_pool": uniform_pool, "multitask": multitask_folder}
        return make_case(build, model=tiny_llama, tokenizer=tiny_tokenizer, workdir=tmp_path, **pools)

    return make


@pytest.mark.parametrize("line", CHECKS)
@pytest.mark.parametrize("preset", discovered())
def test_every_method_keeps_every_line(case_of: Any, preset: str, line: str) -> None:
    run_check(line, case_of(preset))


def test_all_our_methods_are_among_them() -> None:
    assert {"base", "oracle", "multitask", "avg_delta", "dlp", "dlp_code", "dlp_top1", "dlp_renorm", "dlp_threshold"} <= set(discovered())


# What follows are methods that are wrong in one way each: a line that none of them breaks would prove nothing.


class Biased(AvgDelta):
    """A merge that adds something to whatever weights it is given."""

    name = "biased"
    factor = 0.1

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        super().prepare(bank, context)
        return self.merge(bank, torch.full((bank.num_experts,), 1.0 / bank.num_experts)) if bank.num_experts > 1 else bank

    def route(self, prompts: PromptBatch) -> Tensor:
        return torch.ones(len(prompts), 1)

    def merge(self, bank: AdapterBank, weights: Tensor) -> AdapterBank:
        weights = self.twist(weights)
        merged = {}
        for path, entry in bank.modules.items():
            lora_a = torch.cat(list(entry.lora_a))
            lora_b = torch.cat([weight * scale * b for weight, scale, b in zip(weights, entry.scaling, entry.lora_b, strict=True)], dim=1)
            merged[path] = [(lora_a, lora_b, 1.0)]
        return AdapterBank.from_tensors(("merged",), merged)

    def twist(self, weights: Tensor) -> Tensor:
        return weights + 0.1


class Halved(Biased):
    """One adapter alone comes out at half its strength."""

    name = "halved"

    def twist(self, weights: Tensor) -> Tensor:
        return weights * 0.5


class HonestMerge(Biased):
    """The same merge without an error: the checks must accept it."""

    name = "honest_merge"

    def twist(self, weights: Tensor) -> Tensor:
        return weights


class Factors(Biased):
    """Sums A and B apart: cross terms, quadratic in the weights."""

    name = "factors"
    metadata = Metadata(title="Factors", granularity="none", combine="factor")

    def merge(self, bank: AdapterBank, weights: Tensor) -> AdapterBank:
        merged = {}
        for path, entry in bank.modules.items():
            lora_a = (weights[:, None, None] * entry.lora_a).sum(0)
            lora_b = ((weights * entry.scaling)[:, None, None] * entry.lora_b).sum(0)
            merged[path] = [(lora_a, lora_b, 1.0)]
        return AdapterBank.from_tensors(("merged",), merged)


class FactorsInDisguise(Factors):
    """Factor fusion that claims to sum deltas."""

    name = "factors_in_disguise"
    metadata = Metadata(title="Factors in disguise", granularity="none", combine="delta")


class DeltasInDisguise(HonestMerge):
    """Delta fusion that claims to sum factors."""

    name = "deltas_in_disguise"
    metadata = Metadata(title="Deltas in disguise", granularity="none", combine="factor")


class Weak(AvgDelta):
    """Weights that sum to one half and are said to sum to one."""

    name = "weak"

    def route(self, prompts: PromptBatch) -> Tensor:
        return super().route(prompts) * 0.5


class Negative(AvgDelta):
    """A negative weight."""

    name = "negative"

    def route(self, prompts: PromptBatch) -> Tensor:
        return torch.tensor([[1.5, -0.5, 0.0]]).expand(len(prompts), -1)


class Gregarious(AvgDelta):
    """A row's weights depend on how many rows there are."""

    name = "gregarious"

    def route(self, prompts: PromptBatch) -> Tensor:
        share = 1.0 / len(prompts)
        return torch.tensor([[share, 1.0 - share, 0.0]]).expand(len(prompts), -1)


class ByIndex(AvgDelta):
    """Takes whichever adapter comes first."""

    name = "by_index"

    def route(self, prompts: PromptBatch) -> Tensor:
        return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(prompts), -1)


class CountsPadding(AvgDelta):
    """Weights depend on the width of the batch."""

    name = "counts_padding"

    def route(self, prompts: PromptBatch) -> Tensor:
        share = 1.0 / prompts.input_ids.shape[1]
        return torch.tensor([[share, 1.0 - share, 0.0]]).expand(len(prompts), -1)


class _MeanGate(nn.Module):
    """Gate of a whole sequence: sees the future."""

    def __init__(self, num_experts: int, width: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.register_buffer("matrix", torch.randn(width, num_experts, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        seen = x if self.causal else x.mean(1, keepdim=True).expand_as(x)
        return (seen @ self.matrix).softmax(-1)


class Gated(FusionMethod):
    """Token-level gates, correct: the checks must accept it."""

    name = "gated"
    metadata = Metadata(title="Gated", granularity="token", depth="module", exempt=("T5",))  # its columns carry no names
    causal = True

    def attach(self, model: Any) -> None:
        for layer in (module for module in model.model.modules() if isinstance(module, FusedLinear)):
            layer.gate = _MeanGate(len(self.expert_names), layer.in_features, self.causal)


class Foresight(Gated):
    """Gates that average over all tokens, future ones included."""

    name = "foresight"
    causal = False


class TrainsTheBase(DLP):
    """A loss that reaches the base model."""

    name = "trains_the_base"

    def attach(self, model: Any) -> None:
        self.__dict__["backbone"] = model

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        weight = next(self.__dict__["backbone"].model.parameters())
        return super().loss(batch) + (weight.requires_grad_() ** 2).sum()


class TrainsNothing(DLP):
    """Says it is trained, and has a loss that moves nothing."""

    name = "trains_nothing"

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        return super().loss(batch) * 0.0


class LossSeesPadding(DLP):
    """A loss that grows with the padding."""

    name = "loss_sees_padding"

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        return super().loss(batch) * batch["input_ids"].shape[1]


class Forgetful(AvgDelta):
    """State that is not saved."""

    name = "forgetful"
    made = 0

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        type(self).made += 1
        self.share = 1.0 / type(self).made

    def route(self, prompts: PromptBatch) -> Tensor:
        return torch.tensor([[self.share, 1.0 - self.share, 0.0]]).expand(len(prompts), -1)


class Awake(AvgDelta):
    """Leaves a dropout in training mode."""

    name = "awake"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(0.5)

    def route(self, prompts: PromptBatch) -> Tensor:
        self.dropout.train()
        return super().route(prompts)


BREAKS = [
    ("T1", Biased),
    ("T2", Biased),
    ("T2", Halved),
    ("T3", Weak),
    ("T3", Halved),
    ("T4", Gregarious),
    ("T5", ByIndex),
    ("T6", Foresight),
    ("T7", Foresight),
    ("T8", Weak),
    ("T8", Negative),
    ("T9", TrainsTheBase),
    ("T9", TrainsNothing),
    ("T10", Forgetful),
    ("T11", CountsPadding),
    ("T11", LossSeesPadding),
    ("T12", FactorsInDisguise),
    ("T12", DeltasInDisguise),
    ("T13", Awake),
]


@pytest.mark.parametrize(("line", "cls"), BREAKS, ids=[f"{line}-{cls.name}" for line, cls in BREAKS])
def test_a_wrong_method_is_caught(case_of: Any, line: str, cls: type[FusionMethod]) -> None:
    with pytest.raises(ConformanceError, match=rf"^{line}\b"):
        run_check(line, case_of(cls))


def test_every_line_is_broken_by_something() -> None:
    assert {line for line, _ in BREAKS} == set(CHECKS)


@pytest.mark.parametrize("cls", [HonestMerge, Factors, Gated], ids=lambda cls: cls.name)
def test_a_right_method_passes(case_of: Any, cls: type[FusionMethod]) -> None:
    run_all(case_of(cls))


def test_exemptions_are_declared_and_checked(case_of: Any) -> None:
    assert exempt_lines(Factors()) == {"T12"}
    assert exempt_lines(Gated()) == {"T5"}

    class Modest(AvgDelta):
        name = "modest"
        metadata = Metadata(title="Modest", granularity="none", exempt=("T4",))

    with pytest.raises(ConformanceError, match="T4 passes although"):
        run_check("T4", case_of(Modest))


def test_a_pool_without_effect_is_refused(case_of: Any, make_adapter: Any, tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """With B = 0 every method would pass; the checks must not accept such a pool."""
    from dlplora.errors import MethodError

    pool = tmp_path / "empty"
    for name in ("alpha", "beta"):
        make_adapter(pool / name, scale=0.0)
    case = make_case(
        "oracle",
        model=copy.deepcopy(tiny_llama),
        tokenizer=tiny_tokenizer,
        pool=pool,
        uniform_pool=pool,
        multitask=pool / "alpha",
        workdir=tmp_path / "work",
    )
    with pytest.raises(MethodError, match="changes nothing"):
        run_check("T2", case)


@pytest.mark.parametrize(
    ("preset", "kept"), [("dlp", {1, 2, 3}), ("dlp_code", {1, 2}), ("dlp_renorm", {1, 2}), ("dlp_threshold", {1, 2, 3})]
)
def test_the_checklist_meets_prompts_that_keep_several_experts(case_of: Any, preset: str, kept: set[int]) -> None:
    """If the stand-in router sent every prompt to one expert, the checks on batches and order would prove little."""
    case = case_of(preset)
    with case.fused() as fused:
        weights = fused.route(case.prompts()).weights
    assert set((weights > 0).sum(1).tolist()) == kept
