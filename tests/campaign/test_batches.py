"""Random batches: every row gets what it gets alone, whatever stands beside it."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.registry import build_method, load_method_spec
from dlplora.modules.lora_bank import AdapterBank

SEED = 20261126
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float64)
METHODS = ("avg_delta", "arrow_out", "spectr", "given")
"""An average, two rules that weigh adapters for each token, and routing weights of each row."""


@pytest.fixture(scope="module")
def fused(_tiny_llama_master: Any, tiny_tokenizer: Any, tiny_pool: Path) -> dict[tuple[str, torch.dtype], FusedCausalLM]:
    """A model for each method and dtype."""
    made = {}
    for dtype in dict.fromkeys(DTYPES):
        for name in METHODS:
            model = copy.deepcopy(_tiny_llama_master).to(dtype)
            method = build_method(load_method_spec("avg_delta" if name == "given" else name))
            made[name, dtype] = FusedCausalLM(model, tiny_tokenizer, AdapterBank.from_pool(tiny_pool, dtype=dtype), method)
    return made


def padded(rows: list[Tensor], side: str, extra: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as ids and mask (B, T)."""
    width = max(map(len, rows)) + extra
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


def random_weights(rng: random.Random, rows: int) -> Tensor:
    """Routing weights (B, 3): none, one, several, or negative ones."""
    weights = torch.tensor([[rng.choice([0.0, 0.0, 1.0, 0.5, 0.3, -0.25]) for _ in range(3)] for _ in range(rows)])
    return weights if rng.random() < 0.9 else torch.zeros(rows, 3)


def check_batches(fused: dict[tuple[str, torch.dtype], FusedCausalLM], number: int) -> None:
    for index in range(number):
        rng = random.Random(f"{SEED}{index}")
        name, dtype = rng.choice(METHODS), rng.choice(DTYPES)
        model, side = fused[name, dtype], rng.choice(["left", "right"])
        rows = [torch.tensor([1, *(rng.randrange(3, 345) for _ in range(rng.randrange(1, 24)))]) for _ in range(rng.randrange(1, 7))]
        ids, mask = padded(rows, side, rng.choice([0, 0, 3]))
        given = random_weights(rng, len(rows)) if name == "given" else None
        if index % 10 == 0:
            check_generation(model, rows, ids, mask, given, f"batch {index}")
            continue
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        state = {"routing": given} if given is not None else {"routing": torch.full((3,), 1 / 3)} if name == "avg_delta" else {}
        together = model(input_ids=ids, attention_mask=mask, position_ids=positions, **state).logits
        for number_of_row, row in enumerate(rows):
            own = {"routing": given[number_of_row : number_of_row + 1]} if given is not None else state
            alone = model(input_ids=row[None], **own).logits[0]
            found = together[number_of_row][mask[number_of_row].bool()]
            eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # routing weights are float32 in every model
            bound = 64 * eps * float(alone.abs().max())
            assert float((found - alone).abs().max()) <= bound, f"batch {index}: {name}, {dtype}, {side}, row {number_of_row}"


def check_generation(model: FusedCausalLM, rows: list[Tensor], ids: Tensor, mask: Tensor, given: Tensor | None, what: str) -> None:
    """Greedy tokens, in float32 and float64, where no rounding decides."""
    if model.model.dtype is torch.bfloat16:
        return
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    together = model.generate(input_ids=ids, attention_mask=mask, routing=given, **options)[:, -4:]
    for number, row in enumerate(rows):
        own = None if given is None else given[number : number + 1]
        alone = model.generate(input_ids=row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long), routing=own, **options)
        assert together[number].tolist() == alone[0, -4:].tolist(), f"{what}, row {number}"


@torch.no_grad()
def test_a_short_sample(fused: dict[tuple[str, torch.dtype], FusedCausalLM]) -> None:
    check_batches(fused, 40)


@pytest.mark.campaign
@torch.no_grad()
def test_a_thousand_batches(fused: dict[tuple[str, torch.dtype], FusedCausalLM]) -> None:
    check_batches(fused, 1000)
