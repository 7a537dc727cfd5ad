"""Prompts out of scope: the base model to the last bit, everybody else as before; in ``dlp`` and in the server's decisions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.config import config_hash
from dlplora.errors import ConfigError, MethodError
from dlplora.evaluation.identity import folder_hash
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.loading import nano_asset
from dlplora.methods.base import MethodContext
from dlplora.methods.dlp import DLP
from dlplora.methods.registry import build_method, hashed_params, load_method_spec
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.router import MiniMLPRouter
from dlplora.modules.scope import ScopeThreshold, write_scope
from dlplora.serve.answers import described, headers_of
from dlplora.serve.deciding import Decider
from dlplora.serve.jobs import Target
from dlplora.types import PromptBatch

TEXTS = ("Mia sees the red box.", "the cat", "Ann likes a dog and Tom likes a pear.", "yes or no: is the plum blue?")


class Routed:
    """A tiny model, its router's folder, and scores that come from the router alone."""

    def __init__(self, model: Any, tokenizer: Any, pool: Path, folder: Path) -> None:
        self.model, self.tokenizer, self.bank = model, tokenizer, AdapterBank.from_pool(pool)
        embedding = model.get_input_embeddings()
        bare = MethodContext(tokenizer=tokenizer, embedding=embedding)
        self.folder = DLP.example_artifacts(folder, self.bank, bare)["router"]
        self.context = MethodContext(tokenizer=tokenizer, embedding=embedding, artifacts={"router": self.folder})
        self.prompts = PromptBatch.from_texts(TEXTS, tokenizer)
        router = MiniMLPRouter.load(self.folder, embedding)
        with torch.no_grad():
            self.logits = router(self.prompts.input_ids, self.prompts.attention_mask)

    def calibrate(self, score: str) -> list[bool]:
        """Write a threshold that two of the four prompts do not reach; which ones."""
        scores = self.logits.softmax(-1).amax(-1) if score == "max_probability" else self.logits.exp().sum(-1).log()
        ordered = scores.sort().values
        middle = float(ordered[1] + ordered[2]) / 2
        write_scope(self.folder, ScopeThreshold(score=score, threshold=middle, criterion="keep"))  # type: ignore[arg-type]
        return (scores < middle).tolist()

    def fused(self, **params: Any) -> FusedCausalLM:
        return FusedCausalLM(copy.deepcopy(self.model), self.tokenizer, self.bank, DLP(DLP.Config(**params)), context=self.context)


@pytest.fixture
def routed(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path, tmp_path: Path) -> Routed:
    return Routed(tiny_llama, tiny_tokenizer, tiny_pool, tmp_path)


def logits_of(fused: FusedCausalLM, prompts: PromptBatch) -> torch.Tensor:
    with torch.no_grad(), fused.patched.slot.bind(fused.route(prompts)):
        return fused.model(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask).logits


@pytest.mark.parametrize("score", ["max_probability", "energy"])
def test_prompts_below_the_threshold_get_the_base_model_and_others_what_they_got(routed: Routed, score: str) -> None:
    below = routed.calibrate(score)
    assert sum(below) == 2
    off, on = routed.fused(), routed.fused(scope="router")
    before, after = (fused.method.route(routed.prompts) for fused in (off, on))
    assert torch.equal(before.sum(-1) > 0, torch.ones(4, dtype=torch.bool))
    for row, rejected in enumerate(below):
        assert torch.equal(after[row], torch.zeros(3) if rejected else before[row])
    found, ordinary = logits_of(on, routed.prompts), logits_of(off, routed.prompts)
    with torch.no_grad():
        base = routed.model(input_ids=routed.prompts.input_ids, attention_mask=routed.prompts.attention_mask).logits
    for row, rejected in enumerate(below):
        assert torch.equal(found[row], (base if rejected else ordinary)[row])
        assert not torch.equal(ordinary[row], base[row])
    named = routed.fused(scope=score, scope_threshold=on.method.scope.threshold)
    assert torch.equal(named.method.route(routed.prompts), after)


def test_settings_and_files_that_do_not_fit(routed: Routed) -> None:
    for params in ({"scope": "energy"}, {"scope_threshold": 0.5}, {"scope": "router", "scope_threshold": 0.5}):
        with pytest.raises(ConfigError, match="'scope_threshold' needs scope"):
            DLP.Config(**params)
    with pytest.raises(ConfigError, match="finite"):
        DLP.Config(scope="energy", scope_threshold=float("nan"))
    (routed.folder / "scope.json").unlink()
    with pytest.raises(MethodError, match="run `dlplora scope` first"):
        routed.fused(scope="router")


def test_the_papers_preset_is_what_it_was() -> None:
    """Neither its parameters nor the hash of the shipped router know of the threshold; those of ``dlp_scope`` do."""
    assert "scope" not in " ".join(hashed_params(load_method_spec("dlp")))
    assert build_method("dlp").scope_mode == "off"
    folder = nano_asset("router")
    old = [[path.name, _sha256(path)] for path in sorted([folder / "router.json", folder / "router.safetensors"])]
    assert folder_hash(folder, build_method("dlp").unread_files) == config_hash(old)
    assert folder_hash(folder, build_method("lorauter").unread_files) == config_hash(old)
    assert folder_hash(folder, build_method("dlp_scope").unread_files) != config_hash(old)


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("score", ["max_probability", "energy"])
def test_the_server_decides_by_the_routers_threshold(routed: Routed, score: str) -> None:
    below = routed.calibrate(score)
    fused = routed.fused()
    targets = [Target()] * 4
    decisions, weights = Decider(fused).decide(targets, TEXTS)
    assert [decision.out_of_scope for decision in decisions] == below
    for decision, row in zip(decisions, weights, strict=True):
        assert bool((row == 0).all()) == decision.out_of_scope
        assert headers_of(decision)["x-dlplora-decision"] == ("base: out of scope" if decision.out_of_scope else "routed")
        assert described(decision)["decision"] == ("base" if decision.out_of_scope else "routed")
    assert not any(one.out_of_scope for one in Decider(fused, 0.0).decide(targets, TEXTS)[0])  # switched off
    assert all(one.out_of_scope for one in Decider(fused, 1.0).decide(targets, TEXTS)[0])  # overridden
    assert not any(one.out_of_scope for one in Decider(fused).decide(targets, TEXTS, prompts=False)[0])  # sentences of answers
    assert f"whose {score} is below" in Decider(fused).describe_scope()
    assert "every prompt is routed" in Decider(fused, 0.0).describe_scope()
    assert "below 0.5 (--min-confidence)" in Decider(fused, 0.5).describe_scope()
    fused.method = build_method("avg_delta")
    assert "every prompt is routed" in Decider(fused).describe_scope()
    with pytest.raises(ConfigError, match=r"--min-confidence 0\.5: method 'avg_delta' has no probabilities"):
        Decider(fused, 0.5)
    (asked,) = Decider(routed.fused()).decide([Target(kind="base")], [TEXTS[below.index(True)]])[0]
    assert (asked.kind, headers_of(asked)["x-dlplora-decision"]) == ("base", "base")
