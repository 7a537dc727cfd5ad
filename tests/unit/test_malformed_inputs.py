"""Faults that the campaigns found, each with its siblings: what was a traceback, a hang, or a wrong answer is one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlplora.adapters.pool import load_pool, write_manifest
from dlplora.cli.main import main
from dlplora.errors import MAX_LINE, ConfigError, GenerationError, PoolError, TaskError, one_line
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.loading import empty_backbone, load_backbone
from dlplora.modules.router import RouterConfig
from dlplora.serve.engine import EngineOptions
from dlplora.tasks.local import local_suite
from dlplora.training.frozen import load_frozen, load_tokenizer


def test_an_error_is_one_short_line_of_printable_characters() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("x\x1b[2Jy \u202eabc ü") == r"x\x1b[2Jy \u202eabc ü"
    assert len(one_line("a" * 9_000 + " end")) < MAX_LINE + 20
    assert one_line("a" * 9_000 + " end").endswith("end")


# ---------------------------------------------------------------------- base models

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "a size that is text": ("config.json", {"hidden_size": "x"}),
    "a size that is negative": ("config.json", {"intermediate_size": -1}),
    "an activation nobody knows": ("config.json", {"hidden_act": "(a+)+$"}),
    "a model type that is a list": ("config.json", {"model_type": ["llama"]}),
    "sizes of other weights": ("config.json", {"intermediate_size": 64}),
    "more layers than can be made": ("config.json", {"num_hidden_layers": 10**9}),
    "a token id that is text": ("generation_config.json", {"eos_token_id": "x"}),
    "a token id without bounds": ("generation_config.json", {"bos_token_id": 10**19}),
    "a switch that is a number": ("generation_config.json", {"output_hidden_states": 0.5}),
    "a special token that is a number": ("tokenizer_config.json", {"eos_token": 5}),
    "a length that is text": ("tokenizer_config.json", {"model_max_length": "long"}),
    "a tokenizer without a model": ("tokenizer.json", {"model": None}),
    "a tokenizer of a wrong type": ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}),
}


@pytest.mark.parametrize("what", MODELS)
def test_base_models_of_wrong_types(what: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))
    name, change = MODELS[what]
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | change))
    with pytest.raises(ConfigError) as caught:
        load_backbone(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    if name == "config.json" and what != "sizes of other weights":
        for load in (empty_backbone, load_frozen):
            with pytest.raises(ConfigError):
                load(str(folder))
    if name == "tokenizer.json":
        with pytest.raises(ConfigError):
            load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_without_end_is_not_read(name: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))
    with (folder / name).open("r+b") as stream:
        stream.truncate(3_000_000_000)
    with pytest.raises(ConfigError, match=name):
        load_backbone(folder, dtype="auto")


def test_tokens_and_texts_that_the_model_cannot_read() -> None:
    import torch

    model = FusedCausalLM.from_pretrained(method="avg_delta")
    for wrong in (99_999_999, -1):
        with pytest.raises(GenerationError, match="ids are from 0 to 3071"):
            model.generate(torch.tensor([[5, wrong]]), max_new_tokens=2)
    for generate in (model.generate, model.generate_text):
        with pytest.raises(GenerationError, match="surrogate"):
            generate("a \ud800", max_new_tokens=2)  # type: ignore[operator]


# ---------------------------------------------------------------------- rows


def _rows(folder: Path, *rows: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def test_all_tasks_are_all_tasks(tmp_path: Path) -> None:
    """A damaged row must not take its task out of the mean; rows of another schema are no tasks of ours."""
    _rows(tmp_path / "good", {"question": "q", "answer": "a"})
    _rows(tmp_path / "other", {"text": "t", "label": 1})
    assert local_suite(["all"], str(tmp_path)).names == ("good",)
    for damage in ('{"question": \n', "[1]\n", {"question": "q"}, {"question": None, "answer": "a"}, {"question": "q", "answer": ["a"]}):
        _rows(tmp_path / "bad", damage)
        with pytest.raises(TaskError, match=r"bad/test\.jsonl:1"):
            local_suite(["all"], str(tmp_path))
    _rows(tmp_path / "bad", {"question": "q", "answer": 0, "choices": ["a", None]})
    with pytest.raises(TaskError, match=r"'choices\[1\]' must be text or a number, got null"):
        local_suite(["all"], str(tmp_path))
    _rows(tmp_path / "bad", {"question": True, "answer": "a"})
    with pytest.raises(TaskError, match="'question' must be text or a number, got true"):
        local_suite(["all"], str(tmp_path))
    for nothing in ("", " \n\n"):
        _rows(tmp_path / "bad", nothing)
        with pytest.raises(TaskError, match=r"bad/test\.jsonl: no rows"):
            local_suite(["all"], str(tmp_path))
    name = os.fsdecode(b"n\xff")
    with pytest.raises(TaskError, match="is not a task name"):
        local_suite([name], str(tmp_path))
    _rows(tmp_path / "bad", {"question": 7, "answer": 4})
    assert local_suite(["all"], str(tmp_path)).names == ("bad", "good")


# ---------------------------------------------------------------------- pools, reports, options


@pytest.mark.parametrize("kind", ["folder", "link to nowhere", "link to itself", "device"])
def test_a_manifest_that_is_no_file_is_not_passed_over(kind: str, tiny_pool: Path, tmp_path: Path) -> None:
    pool = Path(shutil.copytree(tiny_pool, tmp_path / "pool"))
    write_manifest(pool, ["gamma", "alpha"], None)
    manifest = pool / "pool.json"
    manifest.unlink()
    make: dict[str, Callable[[], None]] = {
        "folder": manifest.mkdir,
        "link to nowhere": lambda: os.symlink("nowhere", manifest),
        "link to itself": lambda: os.symlink("pool.json", manifest),
        "device": lambda: os.symlink("/dev/null", manifest),
    }
    make[kind]()
    with pytest.raises(PoolError, match=r"pool\.json is not a readable file"):
        load_pool(pool)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["report", "list", "--suite", ".."], "is not the name of a suite"),
        (["report", "validate", "--suite", "*"], "is not the name of a suite"),
        (["report", "build", "--suite", "../../x"], "is not the name of a suite"),
        (["eval", "--tasks", "\t", "--dry-run"], "is empty"),
        (["eval", "--method", " ,\n", "--dry-run"], "is empty"),
        (["eval", "--limit", "9" * 30, "--method", "base"], "limit must be from 1"),
        (["serve", "--port", "0", "--default-max-tokens", "-1"], "--default-max-tokens must be at least 1"),
        (["bench", "latency", "--shape", "tiny", "--batch", "9" * 30], "at most 1,000,000"),
        (["generate", "x", "--pool", "a" * 5_000], "File name too long"),
        (["eval", "--out", "\udcff", "--method", "base"], "the value of 'out' is not UTF-8"),
        (["eval", "--protocol", "\udcff.yaml", "--method", "base"], "the value of 'protocol' is not UTF-8"),
    ],
)
def test_options_at_the_door(arguments: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[0] == "report":
        (tmp_path / "runs" / "toy").mkdir(parents=True)
        arguments = [*arguments, "--out", str(tmp_path)]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert part in said.err
    assert len(said.err) < MAX_LINE + 60


def test_a_template_in_another_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn")
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe")
    assert main(["serve", "--port", "0", "--chat-template", str(tmp_path / "t.jinja")]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_sizes_are_checked_before_memory_is_taken() -> None:
    for wrong in ({"hidden": (2**63, 1, 1)}, {"table_rows": 2**40}, {"table_width": 2**20}, {"max_tokens": 2**63}):
        with pytest.raises(ConfigError):
            RouterConfig(variant="table", **wrong)  # type: ignore[arg-type]
    for wrong in ({"max_batch": 2**70}, {"max_queue": 2**70}, {"max_model_len": -1}, {"max_model_len": 0}):
        with pytest.raises(ConfigError):
            EngineOptions(**wrong)  # type: ignore[arg-type]
