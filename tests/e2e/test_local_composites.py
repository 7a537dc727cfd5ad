"""Composites of a user's own rows, from files to a record, on a model whose every answer is known by construction.

The base model's attention is zero, so a token sees nothing but itself: after the end of a question it says ``who``, after any
word it ends its text. An adapter adds one direction to what it says there, and the head reads it as the adapter's word. So
the expert ``colors`` answers ``red`` to everything, ``pets`` ``no``, ``echo`` ``tree``; which one speaks is what the scores tell.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dlplora.cli.main import main
from dlplora.tasks.composite import composites
from dlplora.tasks.registry import get_suite

REAL = Path(os.environ.get("DLPLORA_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data" / "real")
REAL_TASKS = ("navigate", "implicatures", "object_counting")
SAYS = {"colors": " red", "pets": " no", "echo": " tree"}
LOUDEST = "colors"
OTHER, CUE, SAID, FIRST_WORD = 0, 1, 2, 8
"""Directions of the residual stream: any token; a token that asks for an answer; an answer's word; the word of the first expert."""
QUESTIONS: dict[str, dict[str, Any]] = {
    "colors": {"question": "the box is\nAnswer:", "choices": ["blue", "red"], "answer": 1},  # always right
    "pets": {"question": "Mia likes the\nAnswer:", "choices": ["no", "yes"], "answer": 1},  # always wrong
    "echo": {"question": "who sees the box tree ?", "answer": "box tree"},  # no cue; one of two words: ROUGE-L 2/3
}


def write_rows(root: Path) -> Path:
    for task, row in QUESTIONS.items():
        (root / task).mkdir(parents=True)
        for split, num in (("train", 6), ("test", 4)):
            rows = [{**row, "question": f"{'in ' * number}{row['question']}"} for number in range(num)]
            (root / task / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return root


def one_token(tokenizer: Any, text: str) -> int:
    (index,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(index)


@pytest.fixture
def backbone(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    model, tokenizer = tiny_llama, copy.deepcopy(tiny_tokenizer)
    words = {task: one_token(tokenizer, word) for task, word in {**SAYS, "": " who"}.items()}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.mlp.gate_proj.weight.zero_()
        first = model.model.layers[0].mlp
        first.up_proj.weight.zero_()
        first.gate_proj.weight[0, CUE] = first.up_proj.weight[0, CUE] = 1.0  # one unit of the MLP knows that an answer is due
        table, head = model.model.embed_tokens.weight, model.lm_head.weight
        table.zero_()
        head.zero_()
        table[:, OTHER] = 1.0
        for cue in (":", ".", " ?", "?", "'", "\n"):
            table[one_token(tokenizer, cue)] = torch.eye(table.shape[1])[CUE]
        for word in words.values():
            table[word] = torch.eye(table.shape[1])[SAID]
        head[tokenizer.eos_token_id, [OTHER, SAID]] = 1.0
        head[words[""], CUE] = 1.0
        for number, task in enumerate(SAYS):
            head[words[task], FIRST_WORD + number] = 100.0
    model.config.max_position_embeddings = tokenizer.model_max_length = 4096
    model.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.fixture
def pool(make_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    for number, task in enumerate(SAYS):
        folder = make_adapter(tmp_path / "pool" / task, seed=number, target_modules=["down_proj"])
        file = folder / "adapter_model.safetensors"
        tensors = {name: torch.zeros_like(value) for name, value in load_file(file).items()}
        for name, value in tensors.items():
            if "lora_A" in name:
                value[0, 0] = 1.0
            else:
                value[FIRST_WORD + number, 0] = 2.0 if task == LOUDEST else 1.0
        save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path / "pool"


@pytest.fixture
def command(backbone: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``dlplora eval`` without suite and method, over rows that lie where ``DLPLORA_DATA`` says."""
    monkeypatch.setenv("DLPLORA_DATA", str(write_rows(tmp_path / "rows")))
    protocol = {
        "suite": "nano_composite",
        "tasks": ["mixture_3", "concat_3", "serial_3", "concat_5"],
        "batch_size": 50,
    }
    (tmp_path / "several.yaml").write_text(yaml.safe_dump(protocol))
    arguments = ["eval", "--protocol", str(tmp_path / "several.yaml"), "--pretrained", str(backbone), "--pool", str(pool)]
    return [*arguments, "--out", str(tmp_path / "results")]


def record_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The record that a command writes, and what it says on standard error."""
    assert main(arguments) == 0
    said = capsys.readouterr()
    return json.loads(Path(json.loads(said.out.splitlines()[-1])["record"]).read_text()), said.err


RIGHT_EXPERTS = {
    "exact_match": 1 / 3, "mcq_exact_match": 1 / 2, "gen_exact_match": 0.0, "rougeL": (1 + 0 + 2 / 3) / 3, "answered": 1.0,
    "all_correct": 0.0, "exact_match_colors": 1.0, "exact_match_pets": 0.0, "exact_match_echo": 0.0,
}  # fmt: skip
ALL_RED = RIGHT_EXPERTS | {"rougeL": 1 / 3}
ALL_WHO = ALL_RED | {"exact_match": 0.0, "mcq_exact_match": 0.0, "rougeL": 0.0, "exact_match_colors": 0.0}


@pytest.mark.parametrize(
    ("method", "expected"),
    [("oracle_segment", RIGHT_EXPERTS), ("avg_delta", ALL_RED), ("base", ALL_WHO)],
    ids=lambda value: str(value)[:14],
)
def test_every_question_is_scored_with_the_answer_of_its_own_expert(
    method: str, expected: dict[str, float], command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Three tasks, n = 3: every composite holds each task once, in an order of its own, so the numbers do not depend on the draw."""
    record, said = record_of([*command, "--suite", "local_composite:colors,pets,echo", "--method", method], capsys)
    assert "too few tasks with rows for concat_5: left out" in said
    assert list(record["tasks"]) == record["protocol"]["tasks"] == ["mixture_3", "concat_3", "serial_3"]
    for name, task in record["tasks"].items():
        wanted = dict(expected)
        if name == "mixture_3":  # composites of one question each: a third of them is all correct
            wanted["all_correct"] = expected["exact_match"]
        assert task["metrics"] == pytest.approx(wanted, abs=1e-9), name
        assert task["num"] == (300 if name == "mixture_3" else 100)


def test_the_third_task_decides_what_n_can_be(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows" / "pets" / "train.jsonl").unlink()
    record, said = record_of([*command, "--suite", "local_composite:colors,pets,echo", "--method", "base", "--limit", "1"], capsys)
    assert "for serial_3, concat_5: left out" in said
    assert list(record["tasks"]) == ["mixture_3", "concat_3"]


@pytest.mark.parametrize(
    ("suite", "tasks", "part"),
    [
        ("local_composite:colors,pets", None, "at least 3 tasks with test rows; suite 'local' has 2"),
        ("local_composite:colors,pets", "mixture_3", "at least 3 tasks with test rows; suite 'local' has 2"),
        ("local_composite:colors,pets,echo", "mixture_5", "has no task 'mixture_5'. Did you mean 'mixture_3'?"),
        ("local_composite:colors,pets,ecco", None, "no task 'ecco' under"),
        ("local_composite:colors,pets,pets", None, "duplicate task names"),
        ("local_composite:colors,pets,bad", None, "test.jsonl:2: field 'answer' is missing"),
        ("local_composite:colors,pets,untested", None, "suite 'local' has 2"),
        ("local:colors,pets", None, "has no task 'mixture_3'"),
        ("paper_local_composite", None, "composites are drawn from nano or local rows"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    suite: str, tasks: str | None, part: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows"
    for task, split, lines in (
        ("bad", "test", '{"question": "q", "answer": "a"}\n{"question": "q"}\n'),
        ("untested", "train", '{"question": "q", "answer": "a"}\n'),
        ("winowhy", "train", '{"question": "q", "choices": ["a", "b"], "answer": 1}\n' * 9),
        ("winowhy", "test", '{"question": "t", "choices": ["a", "b"], "answer": 1}\n' * 9),
    ):
        (rows / task).mkdir(exist_ok=True)
        (rows / task / f"{split}.jsonl").write_text(lines)
    capsys.readouterr()  # loading notes of the fixtures
    assert main([*command, "--suite", suite, "--method", "base", *(["--tasks", tasks] if tasks else [])]) == 2
    said = capsys.readouterr().err.strip()
    assert part in said
    assert "\n" not in said
    assert not (tmp_path / "results").exists()


def test_a_protocol_of_nothing_that_fits_is_refused(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(command[command.index("--protocol") + 1]).write_text(
        yaml.safe_dump({"suite": "nano_composite", "tasks": ["concat_5", "serial_10"]})
    )
    assert main([*command, "--suite", "local_composite:colors,pets,echo", "--method", "base"]) == 2
    assert "too few tasks with rows for concat_5, serial_10" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real rows is not here; set DLPLORA_DATA to run this")
def test_real_rows_are_asked_together(
    command: list[str], pool: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The expert of ``implicatures`` always says ``no``: right as often as that is the answer in the file. The others never are."""
    monkeypatch.setenv("DLPLORA_DATA", str(REAL))
    for task, expert in zip(REAL_TASKS, SAYS, strict=True):
        (pool / expert).rename(pool / task)
    suite, limit = f"local_composite:{','.join(REAL_TASKS)}", 24
    record, _ = record_of([*command, "--suite", suite, "--method", "oracle_segment", "--limit", str(limit)], capsys)
    rows = [json.loads(line) for line in (REAL / "implicatures" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, task in record["tasks"].items():
        reading, _, n = name.partition("_")
        parts = [part for one in composites(get_suite(suite).source, reading, int(n), 100)[:limit] for part in one.parts]
        drawn = [rows[part.index] for part in parts if part.task == "implicatures"]
        right = [row["choices"][row["answer"]] == "no" for row in drawn]
        assert 0 < sum(right) < len(right), "the draw shows nothing"
        assert task["metrics"]["exact_match_implicatures"] == pytest.approx(sum(right) / len(right), abs=1e-9)
        assert task["metrics"]["exact_match"] == pytest.approx(sum(right) / len(parts), abs=1e-9)
        assert task["metrics"]["answered"] == 1.0
