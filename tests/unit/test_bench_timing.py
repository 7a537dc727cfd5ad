"""The clock: delays appear where they happen, and a generation of another length is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.bench.timing import time_call, time_generation
from dlplora.errors import GenerationError
from dlplora.inference.fused_model import FusedCausalLM

PROMPT = torch.arange(3, 15).reshape(2, 6)


def test_slow_steps_show_where_they_happen(tiny_llama_folder: Path, tiny_pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A delay in every forward pass of the model must appear in TTFT and in TPOT."""
    fused = FusedCausalLM.from_pretrained(str(tiny_llama_folder), pool=str(tiny_pool), method="avg_delta", device="cpu")
    forward = fused.model.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return forward(*args, **kwargs)

    def generate(**options: Any) -> torch.Tensor:
        return fused.generate(input_ids=PROMPT, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)

    plain = min(time_generation(generate, 10, fused.device) for _ in range(3))
    monkeypatch.setattr(fused.model, "forward", slow)
    first, later = time_generation(generate, 10, fused.device)
    fused.close()
    assert 0 < plain[0] < 60
    assert first > 0.05
    assert later > 0.05


def test_a_call_is_timed_to_its_end() -> None:
    assert 0.02 <= time_call(lambda: time.sleep(0.02), torch.device("cpu")) < 10


def test_a_short_generation_is_not_a_measurement() -> None:
    def too_short(stopping_criteria: Any) -> torch.Tensor:
        ids = torch.zeros(1, 5, dtype=torch.long)
        stopping_criteria(ids, None)
        return ids

    with pytest.raises(GenerationError, match="expected 8 tokens"):
        time_generation(too_short, 8, torch.device("cpu"))
