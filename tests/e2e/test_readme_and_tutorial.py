"""Each command and snippet of the README and the tutorial runs as it stands, and prints what the README says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dlplora.cli.main import main
from dlplora.inference.loading import nano_asset

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TASKS = (
    ("parity", "Is {n} odd?", ("yes", "no")),
    ("echo", "Repeat the word cat {n} times.", ("cat", "cat cat")),
    ("next", "What comes after {n}?", ("one", "two")),
)
SKIPPED = ("pip install", "python3 -m venv", ".venv/bin/", "make ", "dlplora report all")
"""Installation, whole test runs, and a command that rewrites committed tables (``tests/unit/test_records.py`` covers it)."""


def blocks(page: str, language: str) -> list[str]:
    return [block for kind, block in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")) if kind == language]


def commands(page: str) -> list[str]:
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = (line.split("  #")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith(("#", *SKIPPED))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base model that is not nano, PEFT adapters for it, and rows of three tasks with the names of the adapters."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("readme")
    tokenizer = AutoTokenizer.from_pretrained(nano_asset("backbone"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for name, question, answers in TASKS:
        model = LlamaForCausalLM.from_pretrained(root / "base")
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).save_pretrained(
            root / "adapters" / name
        )
        for split, start in (("train", 0), ("test", 100)):
            rows = [{"question": question.format(n=start + i), "answer": answers[i % 2]} for i in range(40 if split == "train" else 6)]
            path = root / "rows" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "work").mkdir()
    (root / "work" / "dlplora").symlink_to(ROOT / "dlplora")  # the tutorial lists a folder of the clone
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "BASE": str(root / "base"), "ADAPTERS": str(root / "adapters"),
        "ROWS": str(root / "rows"), "WORK": str(root / "work"),
    }  # fmt: skip


def run(command: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line; our own command within this process, which saves the start of an interpreter."""
    if not command.startswith("dlplora "):
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, cwd=environment["WORK"], env=environment, timeout=300, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        return
    monkeypatch.chdir(environment["WORK"])
    for name in ("BASE", "ADAPTERS", "ROWS"):
        monkeypatch.setenv(name, environment[name])
    assert main(shlex.split(os.path.expandvars(command))[1:]) == 0, command


@pytest.mark.parametrize("line", commands("README.md"))
def test_readme_commands(line: str, workplace: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(line, workplace, monkeypatch)


def test_the_router_of_the_readme_reads_the_embeddings_of_its_base_model(workplace: dict[str, str]) -> None:
    """It once trained on the embedded model's embeddings without a word."""
    described = json.loads((Path(workplace["WORK"]) / "my_router" / "router.json").read_text())
    assert described["embedding_shape"][1] == 48


def test_the_readme_snippet_prints_what_it_says(workplace: dict[str, str]) -> None:
    (snippet,) = blocks("README.md", "python")
    (expected,) = blocks("README.md", "text")
    done = subprocess.run(
        [sys.executable, "-c", snippet], capture_output=True, text=True, cwd=workplace["WORK"], env=workplace, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == expected


@pytest.mark.parametrize("line", commands("docs/tutorial.md"))
def test_tutorial_commands(line: str, workplace: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    if line.startswith("dlplora report check"):
        pytest.skip("needs the records of the clone; tests/e2e/test_regression_check.py runs it")
    if line.startswith("dlplora eval") and "--limit 20" in line:
        line = line.replace("--limit 20", "--limit 2")
    run(line, workplace, monkeypatch)
