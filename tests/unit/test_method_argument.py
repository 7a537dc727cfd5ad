"""``FusedCausalLM.from_pretrained`` takes a method by name, as read from its file, or built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.errors import MethodError
from dlplora.evaluation.protocol import load_protocol
from dlplora.evaluation.runner import open_model, prepare
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods import registry
from dlplora.methods.registry import build_method, load_method_spec

PROMPT = torch.arange(3, 9).reshape(1, 6)


def logits(method: Any, tiny_llama_folder: Path, tiny_pool: Path, **options: Any) -> torch.Tensor:
    model = FusedCausalLM.from_pretrained(str(tiny_llama_folder), pool=tiny_pool, method=method, device="cpu", **options)
    try:
        with torch.no_grad(), model.routing(torch.ones(model.bank.num_experts)):
            return model(input_ids=PROMPT).logits
    finally:
        model.close()


def test_three_ways_to_name_a_method_give_one_model(tiny_llama_folder: Path, tiny_pool: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: ties\nparams: {density: 0.3}\n")
    spec = load_method_spec(str(path))
    expected = logits("ties", tiny_llama_folder, tiny_pool, method_params={"density": 0.3})
    path.unlink()  # what was read is not read again
    assert torch.equal(logits(spec, tiny_llama_folder, tiny_pool), expected)
    assert torch.equal(logits(build_method(spec), tiny_llama_folder, tiny_pool), expected)
    assert not torch.equal(logits(spec, tiny_llama_folder, tiny_pool, method_params={"density": 0.9}), expected)


def test_a_built_method_takes_no_parameters(tiny_llama_folder: Path, tiny_pool: Path) -> None:
    with pytest.raises(MethodError, match="already built"):
        logits(build_method("ties"), tiny_llama_folder, tiny_pool, method_params={"density": 0.3})


def test_trained_gates_are_checked_for_a_spec_as_for_a_name() -> None:
    with pytest.raises(MethodError, match="has to be trained first"):
        FusedCausalLM.from_pretrained(method=load_method_spec("mole"), device="cpu")


def test_a_run_reads_its_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: ties\nparams: {density: 0.3}\n")
    read: list[Path] = []
    original = registry.load_yaml
    monkeypatch.setattr(registry, "load_yaml", lambda file: (read.append(Path(file)), original(file))[1])
    run = prepare(load_protocol("nano"), "nano", str(path), 0, limit=1)
    with open_model(run) as lm:
        assert lm.fused.method.config.density == 0.3
        assert lm.fused.method is not run.method  # a model binds its method to a pool
    assert run.cell() == run.cell()
    assert read == [path]
