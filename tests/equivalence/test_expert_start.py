"""Weights that hold from a token on: logits against PEFT's own LoRA modules, weighed token by token in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from dlplora.errors import ConfigError
from dlplora.inference.expert_start import ExpertStart, expert_start
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import MethodContext
from dlplora.methods.references import Oracle
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch

NAMES = ("alpha", "beta", "gamma")
PROMPTS = ([1, 9, 30, 41, 52, 63, 74], [1, 85, 96])
ANSWERS = ([17, 28, 39], [11, 22, 33])
TASKS = ("beta", "gamma")


@torch.no_grad()
def by_peft(model: Any, pool: Path, ids: list[int], weights: Tensor, quiet_first_layer: Tensor | None) -> Tensor:
    """Logits (T, V), float64, of one row whose token t is processed under ``weights[t]`` (T, E)."""
    peft = PeftModel.from_pretrained(copy.deepcopy(model), pool / NAMES[0], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        peft.load_adapter(pool / name, adapter_name=name)
    peft.double().eval()

    def weighed(path: str) -> Any:
        here = quiet_first_layer if quiet_first_layer is not None and ".layers.0." in path else weights

        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            (x,) = args
            total = module.base_layer(x)
            for index, name in enumerate(NAMES):
                total = total + here[None, :, index, None] * module.lora_B[name](module.lora_A[name](x)) * module.scaling[name]
            return total

        return hook

    for path, module in peft.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            module.register_forward_hook(weighed(path))
    return peft(input_ids=torch.tensor([ids])).logits[0]


@torch.no_grad()
def by_request(fused: FusedCausalLM, side: str) -> list[Tensor]:
    """Logits (T, V) of each row: a padded prompt, then its answer token by token after the cache."""
    width = max(map(len, PROMPTS))
    pads = [[0] * (width - len(row)) for row in PROMPTS]
    ids = torch.tensor([pad + row if side == "left" else row + pad for pad, row in zip(pads, PROMPTS, strict=True)])
    mask = (ids != 0).long()
    state = fused.route(PromptBatch(ids, mask, ("a", "b"), TASKS))
    cache = DynamicCache(config=fused.model.config)
    places = (mask.cumsum(dim=1) - 1).clamp_min(0)
    logits = fused(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True, routing=state).logits
    found = [[logits[row][mask[row] != 0]] for row in range(len(PROMPTS))]
    for step in range(len(ANSWERS[0])):
        mask = torch.cat([mask, torch.ones(len(PROMPTS), 1, dtype=torch.long)], dim=1)
        later = torch.tensor([[answer[step]] for answer in ANSWERS])
        position = (mask.sum(dim=1) - 1)[:, None]
        logits = fused(
            input_ids=later, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, routing=state
        ).logits
        for row, parts in enumerate(found):
            parts.append(logits[row])
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize(
    ("setting", "starts"),
    [
        (ExpertStart(), (0, 0)),
        (ExpertStart(start=0.5), (3, 1)),  # 7 and 3 tokens
        (ExpertStart(start="last_token", elsewhere="mean"), (6, 2)),
        (ExpertStart(start="answer"), (7, 3)),
        (ExpertStart(start=0.5, elsewhere="mean", without_first_layer=True), (3, 1)),
    ],
    ids=("whole", "half", "last_token", "answer", "upper_layers"),
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_right_expert_from_a_token_on(
    setting: ExpertStart, starts: tuple[int, int], side: str, tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path
) -> None:
    model = copy.deepcopy(tiny_llama)
    context = MethodContext(tokenizer=tiny_tokenizer, embedding=model.get_input_embeddings())
    fused = FusedCausalLM(model, tiny_tokenizer, AdapterBank.from_pool(tiny_pool, NAMES), Oracle(), context=context)
    with expert_start(fused, setting):
        rows = by_request(fused, side)
    other = torch.full((3,), 1 / 3 if setting.elsewhere == "mean" else 0.0, dtype=torch.float64)
    for row, start, prompt, answer, task in zip(rows, starts, PROMPTS, ANSWERS, TASKS, strict=True):
        right = torch.eye(3, dtype=torch.float64)[NAMES.index(task)]
        length = len(prompt) + len(answer)
        weights = torch.stack([right if at >= start else other for at in range(length)])
        quiet = other.expand(length, 3) if setting.without_first_layer else None
        expected = by_peft(tiny_llama, tiny_pool, [*prompt, *answer], weights, quiet)
        torch.testing.assert_close(row.double(), expected, atol=2e-4, rtol=1e-4)
    again = by_request(fused, side)  # outside of the block every token is processed under the expert
    whole = by_peft(tiny_llama, tiny_pool, [*PROMPTS[0], *ANSWERS[0]], torch.eye(3, dtype=torch.float64)[1].expand(10, 3), None)
    torch.testing.assert_close(again[0].double(), whole, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("start", [-0.1, 1.0])
def test_a_share_outside_the_prompt_is_refused(start: float) -> None:
    with pytest.raises(ConfigError, match="'start' must be a share"):
        ExpertStart(start=start)
