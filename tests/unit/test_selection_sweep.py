"""The routers of the selection sweep: one that errs on purpose, and one with fewer classes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.selection import Case, ErringRouter, cases, restricted_router
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.loading import nano_asset
from dlplora.modules.router import MiniMLPRouter
from dlplora.tasks.nano import nano_suite
from dlplora.types import PromptBatch


@pytest.fixture(scope="module")
def fused() -> FusedCausalLM:
    return FusedCausalLM.from_pretrained(method="base")


@pytest.fixture(scope="module")
def router(fused: FusedCausalLM) -> MiniMLPRouter:
    return MiniMLPRouter.load(nano_asset("router"), fused.model.get_input_embeddings())


@pytest.fixture(scope="module")
def prompts(fused: FusedCausalLM) -> PromptBatch:
    texts = [item.prompt for task in nano_suite().tasks for item in task.items("test", 10)]
    return PromptBatch.from_texts(texts, fused.tokenizer)


@torch.no_grad()
def test_a_share_of_prompts_goes_wrong_and_nothing_else_changes(router: MiniMLPRouter, prompts: PromptBatch) -> None:
    right, _ = router.probabilities(prompts.input_ids, prompts.attention_mask)
    wrong, logs = ErringRouter(router, 0.3, 1.0).probabilities(prompts.input_ids, prompts.attention_mask)
    moved = wrong.argmax(dim=1) != right.argmax(dim=1)
    assert 0.22 < moved.float().mean() < 0.38  # 260 prompts; three standard errors are 0.085
    assert torch.equal(wrong[~moved], right[~moved])
    assert torch.allclose(wrong.sum(dim=1), torch.ones(len(wrong)), atol=1e-5)
    assert not wrong[moved, right.argmax(dim=1)[moved]].any()  # the right expert is left nothing
    assert int((wrong[moved] != right[moved]).sum(dim=1).max()) == 2  # of the others, only one changed
    assert torch.allclose(logs.exp(), wrong, atol=1e-6)
    none, _ = ErringRouter(router, 0.0, 1.0).probabilities(prompts.input_ids, prompts.attention_mask)
    assert torch.equal(none, right)


@torch.no_grad()
def test_doubt_leaves_the_right_expert_second(router: MiniMLPRouter, prompts: PromptBatch) -> None:
    right, _ = router.probabilities(prompts.input_ids, prompts.attention_mask)
    doubt, _ = ErringRouter(router, 0.3, 0.55).probabilities(prompts.input_ids, prompts.attention_mask)
    moved = (doubt.argmax(dim=1) != right.argmax(dim=1)).nonzero()[:, 0]
    best = right.argmax(dim=1)[moved]
    share = doubt[moved, best] / (doubt[moved, best] + doubt[moved].max(dim=1).values)
    assert torch.allclose(share, torch.full_like(share, 0.45), atol=1e-5)


@torch.no_grad()
def test_the_same_prompt_errs_the_same_way_alone_and_padded(router: MiniMLPRouter, prompts: PromptBatch) -> None:
    erring = ErringRouter(router, 0.5, 1.0)
    together, _ = erring.probabilities(prompts.input_ids[:20], prompts.attention_mask[:20])
    for row in range(20):
        keep = prompts.attention_mask[row].bool()
        alone, _ = erring.probabilities(prompts.input_ids[row][keep][None], torch.ones(1, int(keep.sum()), dtype=torch.long))
        assert torch.equal(alone[0].argsort()[-2:], together[row].argsort()[-2:])


@torch.no_grad()
def test_a_restricted_router_has_the_whole_ones_logits(
    fused: FusedCausalLM, router: MiniMLPRouter, prompts: PromptBatch, tmp_path: Path
) -> None:
    names = (router.names[7], router.names[2], router.names[19])
    embedding = fused.model.get_input_embeddings()
    part = MiniMLPRouter.load(restricted_router(names, embedding, tmp_path), embedding)
    assert part.names == names
    logits = router(prompts.input_ids, prompts.attention_mask)[:, [7, 2, 19]]
    assert torch.allclose(part(prompts.input_ids, prompts.attention_mask), logits, atol=1e-5)
    assert part.temperature == router.temperature


def test_every_point_is_planned_once_and_names_its_setting() -> None:
    planned = list(cases())
    assert len({case.key for case in planned}) == len(planned)
    pools = [case for case in planned if case.sweep == "experts" and case.method == "dlp"]
    assert sorted({case.x for case in pools}) == [2, 4, 8, 16, 26]
    assert all(len(case.experts) == case.x for case in pools if case.experts)
    nested = [case for case in pools if case.order == 1]
    assert all(set(a.experts) < set(b.experts) for a, b in pairwise(nested))
    settings = Case(sweep="s", series="t", x=0.1, flip_rate=0.1, conviction=0.55).settings()
    assert settings == {"method": "dlp", "params": {}, "flip_rate": 0.1, "conviction": 0.55}
