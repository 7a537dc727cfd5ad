"""The clock: what it counts, what it refuses, and its arithmetic by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.bench import timing as latency
from dlplora.bench.timing import LatencyResult, Samples, load_peft_reference, measure_decode_ratio
from dlplora.errors import ConfigError, GenerationError
from dlplora.inference.fused_model import FusedCausalLM

PROMPT = torch.arange(3, 15).reshape(2, 6)


@pytest.fixture
def fused(tiny_llama_folder: Path, tiny_pool: Path) -> Iterator[FusedCausalLM]:
    model = FusedCausalLM.from_pretrained(str(tiny_llama_folder), pool=str(tiny_pool), method="oracle", device="cpu")
    yield model
    model.close()


@pytest.fixture
def reference(tiny_llama_folder: Path, tiny_pool: Path) -> Any:
    return load_peft_reference(tiny_llama_folder, tiny_pool / "alpha")


def test_median_and_quartiles_by_hand() -> None:
    samples = Samples((5.0, 1.0, 2.0, 4.0, 3.0))
    assert samples.median == 3.0
    assert samples.iqr == 2.0
    assert Samples((7.0,)).iqr == 0.0


def test_ratios_are_of_medians() -> None:
    result = LatencyResult(
        ttft=Samples((2.0, 4.0, 90.0)),
        tpot=Samples((3.0,)),
        reference_ttft=Samples((1.0, 2.0, 3.0)),
        reference_tpot=Samples((1.5,)),
        router=Samples((0.5,)),
        prompt_tokens=1,
        new_tokens=2,
        batch_size=1,
        warmup=0,
        device="cpu",
        dtype="float32",
        backend="auto",
    )
    assert (result.ttft_ratio, result.tpot_ratio) == (2.0, 2.0)
    record = json.loads(json.dumps(result.as_record()))
    assert record["ttft"] == {"samples_s": [2.0, 4.0, 90.0], "median_s": 4.0, "iqr_s": 44.0}
    assert record["tpot_ratio"] == 2.0


def test_raw_samples_of_a_real_run(fused: FusedCausalLM, reference: Any) -> None:
    result = measure_decode_ratio(fused, reference, input_ids=PROMPT, new_tokens=4, warmup=1, repeats=3, task_names=["alpha", "beta"])
    for samples in (result.ttft, result.tpot, result.reference_ttft, result.reference_tpot, result.router):
        assert len(samples.seconds) == 3
        assert all(0 < second < 60 for second in samples.seconds)
    assert (result.prompt_tokens, result.new_tokens, result.batch_size) == (6, 4, 2)
    assert (result.device, result.dtype) == ("cpu", "float32")
    assert result.router.median < result.ttft.median


def test_slow_steps_show_where_they_happen(fused: FusedCausalLM, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A delay in every forward pass of ours must appear in TTFT and in TPOT, and in nothing of the reference."""
    forward = fused.model.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return forward(*args, **kwargs)

    monkeypatch.setattr(fused.model, "forward", slow)
    result = measure_decode_ratio(fused, reference, input_ids=PROMPT, new_tokens=3, warmup=0, repeats=2, task_names=["alpha"] * 2)
    assert min(result.ttft.seconds) > 0.05
    assert min(result.tpot.seconds) > 0.05
    assert result.router.median < 0.05
    assert result.reference_tpot.median < 0.05


def test_turns_alternate(fused: FusedCausalLM, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name, target in (("ours", fused), ("reference", reference)):
        original = target.generate

        def noted(*args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
            order.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(target, "generate", noted)
    measure_decode_ratio(fused, reference, input_ids=PROMPT, new_tokens=2, warmup=0, repeats=2, task_names=["alpha"] * 2)
    assert order == ["ours", "reference", "reference", "ours"]


def test_uneven_comparisons_are_refused(fused: FusedCausalLM, reference: Any, tiny_llama_folder: Path, tiny_pool: Path) -> None:
    half = load_peft_reference(tiny_llama_folder, tiny_pool / "alpha", dtype=torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    with pytest.raises(ConfigError, match="autocast_adapter_dtype=False"):
        measure_decode_ratio(fused, half, input_ids=PROMPT, new_tokens=2, task_names=["alpha"] * 2)
    with pytest.raises(ConfigError, match="new_tokens >= 2"):
        measure_decode_ratio(fused, reference, input_ids=PROMPT, new_tokens=1)
    with pytest.raises(ConfigError, match="rows, tokens"):
        measure_decode_ratio(fused, reference, input_ids=PROMPT[0])
    with pytest.raises(GenerationError, match="exceed the model's 256"):
        measure_decode_ratio(fused, reference, input_ids=PROMPT, new_tokens=251)
    with pytest.raises(ConfigError, match="training mode"):
        measure_decode_ratio(fused, reference.train(), input_ids=PROMPT, new_tokens=2)


def test_a_short_generation_is_not_a_measurement() -> None:
    def too_short(stopping_criteria: Any) -> torch.Tensor:
        ids = torch.zeros(1, 5, dtype=torch.long)
        stopping_criteria(ids, None)
        return ids

    with pytest.raises(GenerationError, match="expected 8 tokens"):
        latency.time_generation(too_short, 8, torch.device("cpu"))
