"""The base model's choice against transformers alone, label by label; descriptions from the manifest to the method."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dlplora.adapters.add import add_adapter
from dlplora.adapters.pool import load_pool, write_manifest
from dlplora.baselines.llm_choice import LLMChoice, LLMChoiceConfig, letters, menu
from dlplora.cli.main import main
from dlplora.errors import MethodError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.tasks.nano import DESCRIPTIONS, nano_suite
from dlplora.types import PromptBatch

NAMES = ("gamma", "alpha", "beta")
TEXTS = {"alpha": "the cat and the dog", "beta": "what Mia likes", "gamma": "one two three"}
QUESTIONS = ("the cat", "Mia likes the plum?", "Who sees the box? Answer:", "two three", "is the pear in the red box")


@pytest.fixture
def described_pool(tiny_pool: Path, tmp_path: Path) -> Path:
    pool = tmp_path / "pool"
    shutil.copytree(tiny_pool, pool)
    write_manifest(pool, NAMES, None, descriptions=TEXTS)
    return pool


def fuse(model: Any, tokenizer: Any, pool: Path, method: LLMChoice) -> FusedCausalLM:
    model = copy.deepcopy(model)
    context = MethodContext(tokenizer=tokenizer, embedding=model.get_input_embeddings())
    return FusedCausalLM(model, tokenizer, AdapterBank.from_pool(pool), method, context=context)


@torch.no_grad()
def score(model: Any, tokenizer: Any, prompt: str, label: str) -> float:
    """Mean log-probability of a label's tokens, from one plain pass over prompt and label."""
    ids, own = tokenizer(prompt)["input_ids"], tokenizer(f" {label}", add_special_tokens=False)["input_ids"]
    logs = model(input_ids=torch.tensor([ids + own])).logits[0].double().log_softmax(-1)
    return float(sum(logs[len(ids) - 1 + place, token] for place, token in enumerate(own))) / len(own)


@pytest.mark.parametrize("spelling", ["letters", "of two lengths"])
def test_the_likeliest_letter_wins(
    spelling: str, tiny_llama: Any, tiny_tokenizer: Any, described_pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = ["A", "B", "C"]
    if spelling != "letters":
        labels = [" the", "xyz", " two"]  # one token, several, one
        monkeypatch.setattr("dlplora.baselines.llm_choice.letters", lambda number: labels)
    method = LLMChoice()
    fused = fuse(tiny_llama, tiny_tokenizer, described_pool, method)
    prompts = PromptBatch.from_texts(QUESTIONS, tiny_tokenizer)
    found = fused.route(prompts).weights  # type: ignore[union-attr]
    lengths = 0
    for row, question in enumerate(QUESTIONS):
        prompt = menu(TEXTS, question)
        lengths += len(tiny_tokenizer(prompt)["input_ids"])
        assert [prompt.index(f". {TEXTS[name]}") for name in ("alpha", "beta", "gamma")] == sorted(
            prompt.index(f". {t}") for t in TEXTS.values()
        )
        expected = torch.tensor([score(tiny_llama, tiny_tokenizer, prompt, label) for label in labels])
        torch.testing.assert_close(method.scores(question), expected, atol=1e-4, rtol=1e-4)
        assert NAMES[int(found[row].argmax())] == ("alpha", "beta", "gamma")[int(expected.argmax())]
        assert sorted(found[row].tolist()) == [0.0, 0.0, 1.0]
    own = [len(tiny_tokenizer(f" {label}", add_special_tokens=False)["input_ids"]) for label in labels]
    fed = sum(own) - len(own)
    assert method.reported["routing_tokens_per_prompt"] == pytest.approx(lengths / len(QUESTIONS) + fed)


def test_labels_of_equal_length() -> None:
    assert letters(3) == ["A", "B", "C"]
    assert letters(26)[-1] == "Z"
    assert (letters(27)[:2], letters(27)[-1], len(set(letters(500)))) == (["AA", "AB"], "BA", 500)


def test_a_missing_description_is_one_line(tiny_llama: Any, tiny_tokenizer: Any, tiny_pool: Path, described_pool: Path) -> None:
    with pytest.raises(MethodError, match=r"no description of alpha, beta, gamma\. Write 'description' into pool\.json"):
        fuse(tiny_llama, tiny_tokenizer, tiny_pool, LLMChoice())
    manifest = json.loads((described_pool / "pool.json").read_text())
    del manifest["adapters"][0]["description"]
    (described_pool / "pool.json").write_text(json.dumps(manifest))
    with pytest.raises(MethodError, match="no description of gamma"):
        fuse(tiny_llama, tiny_tokenizer, described_pool, LLMChoice())
    named = LLMChoice(LLMChoiceConfig(missing="name"))
    fuse(tiny_llama, tiny_tokenizer, described_pool, named)
    assert named._descriptions == {**TEXTS, "gamma": "gamma"}


def test_a_question_that_does_not_fit_is_refused(tiny_llama: Any, tiny_tokenizer: Any, described_pool: Path) -> None:
    fused = fuse(tiny_llama, tiny_tokenizer, described_pool, LLMChoice())
    with pytest.raises(MethodError, match=r"descriptions and question have \d+ tokens, the base model reads 256"):
        fused.method.route(PromptBatch.from_texts(["the cat sees " * 100], tiny_tokenizer))


def test_descriptions_are_written_kept_and_replaced(
    tiny_llama: Any, tiny_tokenizer: Any, described_pool: Path, tiny_pool: Path, make_adapter: Any, tmp_path: Path
) -> None:
    before = load_pool(described_pool).checksum()
    delta = make_adapter(tmp_path / "delta", seed=7)
    assert main(["pool", "add", str(described_pool), str(delta), "--description", "colors"]) == 0
    assert load_pool(described_pool).rows["delta"]["description"] == "colors"
    add_adapter(described_pool, delta, description="all colors")  # is there already: only its description changes
    rows = load_pool(described_pool).rows
    assert {name: row["description"] for name, row in rows.items()} == {**TEXTS, "delta": "all colors"}
    write_manifest(described_pool, NAMES, None)
    assert load_pool(described_pool).checksum() == before  # a description changes no record
    write_manifest(described_pool, NAMES, None, descriptions=TEXTS)
    fuse(tiny_llama, tiny_tokenizer, described_pool, LLMChoice()).save_pretrained(tmp_path / "saved")
    assert {name: row["description"] for name, row in load_pool(tmp_path / "saved" / "pool").rows.items()} == TEXTS


def test_every_nano_task_is_described() -> None:
    from dlplora.inference.loading import nano_asset

    assert {task.name: task.description for task in nano_suite().tasks} == DESCRIPTIONS
    assert {name: row["description"] for name, row in load_pool(nano_asset("pool")).rows.items()} == DESCRIPTIONS
    assert len(set(DESCRIPTIONS.values())) == 26
