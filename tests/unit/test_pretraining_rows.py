"""The text a small base model is pretrained on: training rows only, questions apart from answers, and the same at every start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dlplora.data.pretraining import RowsTextDataModule
from dlplora.errors import ConfigError


@pytest.fixture
def rows(tmp_path: Path) -> str:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for split, start, num in (("train", 0, 60), ("test", 500, 20)):
        lines = [json.dumps({"question": f"What is {n} plus one?", "answer": f"It makes {n + 1}."}) for n in range(start, start + num)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path)


def module(rows: str, **options: int) -> RowsTextDataModule:
    made = RowsTextDataModule(data_root=rows, block_size=16, batch_size=2, vocab_size=300, num_steps=30, **options)
    made.setup("fit")
    return made


def text_of(made: RowsTextDataModule, split: str) -> str:
    return str(made.tokenizer.decode(made._blocks[split][0].flatten().tolist(), skip_special_tokens=False))


def test_only_training_rows_are_read_and_answers_do_not_follow_their_questions(rows: str) -> None:
    made = module(rows)
    train, validation = text_of(made, "train"), text_of(made, "validation")
    for number in range(500, 520):
        assert f"is {number} plus" not in train
        assert f"is {number} plus" not in validation
    documents = [document.strip() for document in train.replace("<s>", "").split("</s>")]
    whole = [document for document in documents if document.startswith(("What", "It"))]
    assert len(whole) > 90  # 54 questions and 54 answers, less what the cut blocks lose
    assert all(document.startswith("What") != ("makes" in document) for document in whole)


def test_batches_are_a_pure_function_of_seed_and_step(rows: str) -> None:
    first, second = module(rows).train_dataloader(), module(rows).train_dataloader()
    wanted = list(first)
    second.load_state_dict({"next_step": 20})
    assert all(torch.equal(a[0], b[0]) for a, b in zip(wanted[20:], second, strict=True))
    other = next(iter(module(rows, seed=1).train_dataloader()))
    assert not torch.equal(wanted[0][0], other[0])


def test_too_little_text_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"question": f"1 + 1 in {split}?", "answer": "2"}) + "\n")
    with pytest.raises(ConfigError, match="less text than one block of 512 tokens"):
        RowsTextDataModule(data_root=str(tmp_path)).setup("fit")
