"""Options after a shared reading of their context score as they do when every option is read on its own."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from dlplora.baselines.arrow import Arrow, Lag
from dlplora.baselines.lora_flow import LoRAFlow
from dlplora.baselines.mole import MoLE
from dlplora.baselines.xlora import XLoRA
from dlplora.errors import ConfigError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.lm_eval.model import DLPLoRALM
from dlplora.lm_eval.prefix_sharing import answers, batches_of, why_not
from dlplora.lm_eval.requests import Prompt, ScoringRequest
from dlplora.methods.base import FusionMethod, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch

QUESTIONS = ["the cat sees", "Mia likes the plum . what is it ? :", "who", "one two three four", "a red box is in the tree"]
CHOICES = [" a dog", " red", " blue . Tom is in", " no", " a dog . yes", " blue . Tom is on"]
PAIRS = [(question, choice) for question in QUESTIONS for choice in CHOICES]


class ByLength(FusionMethod):
    """Weights that differ from prompt to prompt."""

    name = "by_length"
    metadata = Metadata(title="Test rule", granularity="prompt")

    def route(self, prompts: PromptBatch) -> Tensor:
        lengths = prompts.attention_mask.sum(dim=1, keepdim=True).float()
        return torch.softmax(lengths * torch.tensor([0.1, -0.1, 0.2]), dim=1)


def build(model: Any, tokenizer: Any, pool: Path, method: FusionMethod, **options: Any) -> DLPLoRALM:
    model = copy.deepcopy(model)
    context = MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings())
    return DLPLoRALM(fused=FusedCausalLM(model, tokenizer, AdapterBank.from_pool(pool), method, context=context), **options)


def score(lm: DLPLoRALM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0, metadata=("t", index, 1)) for index, pair in enumerate(pairs)
    ]
    return lm.loglikelihood(requests, disable_tqdm=True)


@torch.no_grad()
def one_by_one(lm: DLPLoRALM, pairs: list[tuple[str, str]]) -> list[float]:
    """Each option alone, unpadded, without a cache, in one forward pass of the whole text."""
    values = []
    for context, choice in pairs:
        ids, whole = lm.tok_encode(context), lm.tok_encode(context + choice)
        state = lm.fused.route(PromptBatch.from_ids([ids], lm.tokenizer))
        with lm.fused.routing(state) if state is not None else torch.no_grad():
            logits = lm.fused.model(input_ids=torch.tensor([whole]), use_cache=False).logits[0].double()
        logprobs = logits.log_softmax(dim=-1)
        values.append(sum(float(logprobs[place - 1, whole[place]]) for place in range(len(ids), len(whole))))
    return values


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("method", [ByLength, Arrow, Lag, MoLE, LoRAFlow, XLoRA])
def test_plans_and_gates_score_alike(size: int, method: type[FusionMethod], tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    settings: dict[str, Any] = {Lag: {"shortlist": 2, "top_k": 2}, Arrow: {"top_k": 2}}.get(method, {})
    lm = build(tiny_llama, tiny_tokenizer, tiny_pool, method(method.Config(**settings) if settings else None), batch_size=size)
    assert lm.prefix_note == "shared"
    found = score(lm, PAIRS)
    assert [value for value, _ in found] == pytest.approx(one_by_one(lm, PAIRS), abs=2e-5)
    plain = build(
        tiny_llama,
        tiny_tokenizer,
        tiny_pool,
        method(method.Config(**settings) if settings else None),
        batch_size=size,
        share_prefix="never",
    )
    expected = score(plain, PAIRS)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for start in range(0, len(PAIRS), len(CHOICES)):
        values, wanted = ([value for value, _ in one[start : start + len(CHOICES)]] for one in (found, expected))
        assert sorted(range(len(CHOICES)), key=values.__getitem__) == sorted(range(len(CHOICES)), key=wanted.__getitem__)


def test_learned_positions_too(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    for seed in range(3):
        adapted = get_peft_model(
            copy.deepcopy(model), LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
        )
        adapted.save_pretrained(tmp_path / f"expert{seed}")
    lm = build(model, tiny_tokenizer, tmp_path, ByLength(), batch_size=4)
    assert lm.prefix_note == "shared"
    assert [value for value, _ in score(lm, PAIRS)] == pytest.approx(one_by_one(lm, PAIRS), abs=2e-5)


def test_a_context_is_read_once(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    lm = build(tiny_llama, tiny_tokenizer, tiny_pool, ByLength(), batch_size=64)
    read: list[tuple[int, ...]] = []
    lm.fused.model.register_forward_pre_hook(lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    score(lm, PAIRS)
    longest = max(len(lm.tok_encode(question)) for question in QUESTIONS)
    longer = [pair for pair in PAIRS if len(lm.tok_encode(pair[0] + pair[1])) - len(lm.tok_encode(pair[0])) > 1]
    shapes = {(question, tuple(lm.tok_encode(question + choice)[:-1])) for question, choice in longer}
    assert read[0] == (len(QUESTIONS), longest)
    assert read[1][0] == len(shapes)
    assert len(read) == 2


def test_what_does_not_fit_is_read_plainly(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path) -> None:
    pairs = [("the cat sees a box in the tree . Mia", choice) for choice in CHOICES] + PAIRS[:3]
    short = score(build(tiny_llama, tiny_tokenizer, tiny_pool, ByLength(), max_length=8, batch_size=4), pairs)
    plain = score(build(tiny_llama, tiny_tokenizer, tiny_pool, ByLength(), max_length=8, batch_size=4, share_prefix="never"), pairs)
    assert [value for value, _ in short] == pytest.approx([value for value, _ in plain], abs=2e-5)


def test_backbones_that_cannot_share_say_so(tiny_tokenizer: Any, tiny_llama: Any, tiny_pool: Path) -> None:
    assert why_not(tiny_llama) is None
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sliding = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=1, sliding_window=8))
    reason = why_not(sliding)
    assert reason is not None
    assert "DynamicSlidingWindowLayer" in reason
    assert "takes no past_key_values" in str(why_not(SimpleNamespace(forward=lambda input_ids, attention_mask, position_ids: None)))
    context = MethodContext(tokenizer=tiny_tokenizer, embedding=tiny_llama.get_input_embeddings())
    fused = FusedCausalLM(tiny_llama, tiny_tokenizer, AdapterBank.from_pool(tiny_pool), ByLength(), context=context)
    fused.model._is_stateful = True
    try:
        assert DLPLoRALM(fused=fused).prefix_note.startswith("read for every option: LlamaForCausalLM keeps a state")
        with pytest.raises(ConfigError, match="share_prefix=always"):
            DLPLoRALM(fused=fused, share_prefix="always")
    finally:
        del fused.model._is_stateful
        fused.close()
    with pytest.raises(ConfigError, match="share_prefix"):
        DLPLoRALM(fused=None, share_prefix="sometimes")


def unit(context: tuple[int, ...], *continuation: int) -> ScoringRequest:
    return ScoringRequest(context, continuation, Prompt(context, None))


def test_batches_hold_neither_too_many_contexts_nor_too_many_options() -> None:
    two = [unit((1,), 2, 3), unit((1,), 4, 5)]
    one = [unit((2,), 2), unit((2,), 3)]
    assert [len(batch) for batch in batches_of([two, two, one, one, two], 4)] == [4, 1]
    assert [len(batch) for batch in batches_of([one, one, one], 2)] == [2, 1]
    assert [len(batch) for batch in batches_of([two, one], 1)] == [1, 1]


def test_answers_are_read_off_the_logits() -> None:
    logprobs: Tensor = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]], dtype=torch.float64).log()
    places: list[Any] = [[0, 1], [1], [0]]
    found = answers(logprobs, places, [[0, 1], [0], [0]])
    assert [greedy for _, greedy in found] == [True, False, True]
    assert [value for value, _ in found] == pytest.approx([math.log(0.6 * 0.7), math.log(0.2), math.log(0.6)])
