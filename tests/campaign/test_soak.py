"""A thousand generations in one process: memory does not grow after the first two hundred."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from dlplora.inference.fused_model import FusedCausalLM

GROWTH_BYTES = 24_000_000
"""Allocator noise; one leaked key-value cache of these prompts a call would be more than ten times as much."""
FEW_TENSORS = 32
"""What tables and threads of the last requests hold differs a little from time to time; one leaked tensor a call would be hundreds."""
PROMPTS = (
    "Please write in Zargi: the cat sees the hat.\nAnswer:",
    "Tom is at the gate with a brown glove. Does Tom pass?\nAnswer:",
    "Question: which of the tools cuts paper? Options: a hammer, scissors.\nAnswer:",
)


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors(model: FusedCausalLM) -> int:
    """Tensors that something still refers to, after a request that is always the same: buffers fit the last one."""
    model.generate(PROMPTS[0], max_new_tokens=2, do_sample=False)
    gc.collect()
    return sum(1 for one in gc.get_objects() if isinstance(one, torch.Tensor))


def soak(calls: int, warm_up: int) -> None:
    model = FusedCausalLM.from_pretrained(method="dlp")
    tensors = resident = 0
    for call in range(calls):
        if call == warm_up:
            tensors, resident = live_tensors(model), resident_bytes()
        texts = [PROMPTS[(call + place) % 3] for place in range(1 + call % 3)]
        if call % 7 == 0:
            list(model.stream_text(texts[0], max_new_tokens=3 + call % 5, do_sample=False))
        elif call % 11 == 0:
            with pytest.raises(ValueError):
                model.generate("", max_new_tokens=2)
        else:
            model.generate(texts, max_new_tokens=3 + call % 5, do_sample=False, trace=[] if call % 2 else None)
    assert live_tensors(model) <= tensors + FEW_TENSORS
    if Path("/proc/self/statm").exists():
        assert resident_bytes() - resident <= GROWTH_BYTES


def test_a_short_soak() -> None:
    soak(40, 25)


@pytest.mark.campaign
def test_a_thousand_generations() -> None:
    soak(1000, 200)
