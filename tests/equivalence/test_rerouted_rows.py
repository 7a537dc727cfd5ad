"""Re-routing the rows of a step together against routing each of them alone, and rewritten plans against fresh ones."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.generation import RoutedCriterion
from dlplora.inference.sentences import sentence_end_positions
from dlplora.kernels.folded import fold
from dlplora.methods.base import MethodContext
from dlplora.methods.dlp import DLP
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch
from tests.equivalence.by_length import ByLength

STEPS = 20
WORDS = "the cat sees Mia likes plum Tom box two red tree".split()


class ByTokens(ByLength):
    """Routes by the token ids that it reads and their places, in whole numbers: no bit depends on the other rows."""

    def route(self, prompts: PromptBatch) -> Tensor:
        places = prompts.attention_mask.cumsum(dim=1)
        turns = ((prompts.input_ids * places * prompts.attention_mask).sum(dim=1) % 7).float()[:, None]
        return torch.cat([turns / 10, 1 - turns / 10, (turns % 2) / 5], dim=1)


class Watch(RoutedCriterion):
    """Notes the routing weights after every token, and compares the buffers of the layers with fresh ones."""

    def __init__(self, fused: FusedCausalLM) -> None:
        self.fused = fused
        self.seen: list[Tensor] = []
        self.num_compared = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        assert self.state is not None
        self.seen.append(self.state.weights.clone())
        for layer in self.fused.patched.layers.values() if self.state.backend == "folded" else ():
            plan = self.state.buffers.get(layer.key)
            if plan is not None:
                fresh = fold(layer.lora_a, layer.lora_b, self.state.per_row() * layer.scaling, plan.width)
                fresh.use(plan.used)
                x = torch.randn(input_ids.shape[0], 1, layer.in_features, dtype=layer.lora_a.dtype)
                assert torch.equal(plan.delta(x), fresh.delta(x))
                self.num_compared += 1
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def prompts_of(seed: int) -> list[str]:
    """Questions of several lengths; the first and the last are one, so that two rows end every sentence at the same step."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) + draw.choice(["", "?", ". Who? Answer:", "\n\nTom"]) for _ in range(5)]
    return [*texts, texts[0]]


def alone(fused: FusedCausalLM, prompt: str, tokens: list[int]) -> list[Tensor]:
    """The weights that a row runs under before each of its tokens but the first, by the rule on its own text."""
    tokenizer = fused.tokenizer
    weights, ended, found = fused.method.route(PromptBatch.from_texts([prompt], tokenizer))[0], 0, []
    for num in range(1, len(tokens) + 1):
        found.append(weights)
        said = tokenizer.decode(tokens[:num], skip_special_tokens=True)
        ends = len(sentence_end_positions(said, final=False))
        if ends > ended:
            ended = ends
            weights = fused.method.route(PromptBatch.from_texts([prompt.strip() + said], tokenizer))[0]
    return found


@pytest.mark.parametrize("policy", ["stale", "recompute"])
def test_rows_routed_together_are_routed_as_alone(policy: str, talkative: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    method = ByTokens()
    method.policy = policy
    with torch.no_grad():
        talkative.lm_head.bias[tiny_tokenizer.eos_token_id] = 1.0  # some rows end before the others
    fused = FusedCausalLM(talkative, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), method, backend="folded")
    num_finished = num_together = 0
    for seed in range(5):
        texts, watch = prompts_of(seed), Watch(fused)
        out = fused.generate(texts, max_new_tokens=STEPS, do_sample=False, stopping_criteria=StoppingCriteriaList([watch]))
        new = out[:, -len(watch.seen) :]
        for row, text in enumerate(texts):
            expected = alone(fused, text, new[row].tolist())
            assert [step[row].tolist() for step in watch.seen] == [weights.tolist() for weights in expected]
        assert watch.num_compared > 0
        ends = (new[:, :-1] == tiny_tokenizer.eos_token_id).any(dim=1)
        num_finished += bool(ends.any() and not ends.all())
        changes = [(one != other).any(dim=-1).sum() for one, other in itertools.pairwise(watch.seen)]
        num_together += any(change > 1 for change in changes)
    assert num_finished >= 2
    assert num_together >= 2


def test_a_real_router_keeps_the_same_experts_row_by_row(talkative: Any, tiny_tokenizer: Any, tiny_pool: Path, tmp_path: Path) -> None:
    """Of a matrix product the last bit may depend on the number of rows; which experts are kept does not."""
    bank = AdapterBank.from_pool(tiny_pool)
    context = MethodContext(tokenizer=tiny_tokenizer, embedding=talkative.get_input_embeddings())
    context = dataclasses.replace(context, artifacts=DLP.example_artifacts(tmp_path, bank, context))
    fused = FusedCausalLM(talkative, tiny_tokenizer, bank, DLP(), context=context)
    watch = Watch(fused)
    texts = prompts_of(4)
    new = fused.generate(texts, max_new_tokens=STEPS, do_sample=False, stopping_criteria=[watch], eos_token_id=None)[:, -STEPS:]
    for row, text in enumerate(texts):
        expected = torch.stack(alone(fused, text, new[row].tolist()))
        got = torch.stack([step[row] for step in watch.seen])
        assert torch.equal(got != 0, expected != 0)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert len({tuple(step.flatten().tolist()) for step in watch.seen}) > 1


def test_layers_of_different_scaling_keep_their_own(talkative: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    """One layer lacks an expert that others have, another weighs one differently: no layer gets the other's plan."""
    bank = AdapterBank.from_pool(tiny_pool)
    modules = dict(bank.modules)
    first, second, *_ = modules
    modules[first] = dataclasses.replace(modules[first], scaling=modules[first].scaling * torch.tensor([0.0, 1.0, 1.0]))
    modules[second] = dataclasses.replace(modules[second], scaling=modules[second].scaling * 3.0)
    fused = FusedCausalLM(talkative, tiny_tokenizer, AdapterBank(bank.names, modules), ByTokens(), backend="folded")
    ids = torch.tensor([[1, 5, 9, 4], [1, 7, 7, 8], [1, 9, 3, 2]])
    before, after = torch.tensor([[0.2, 0.0, 0.8], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]), torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.1, 0.2]])
    state = fused.request_router.state(before, own=True, reroutes=True, new_tokens=4)
    assert state.backend == "folded"
    fused(input_ids=ids, routing=state)
    state.update_rows(torch.tensor([2, 0]), after)
    mixed = torch.stack([after[1], before[1], after[0]])
    got = fused(input_ids=ids, routing=state).logits
    fused.backend = "reference"
    torch.testing.assert_close(got, fused(input_ids=ids, routing=mixed).logits, atol=1e-5, rtol=1e-5)
