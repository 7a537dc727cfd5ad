"""A user's own rows: adapters by PEFT, evaluated by ours and by lm-eval's own ``hf`` model, give the same answers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from dlplora.cli.main import main
from dlplora.lm_eval import command, plugin
from dlplora.tasks.export import export_local
from tests.toy_tasks import NAMES, write_tasks

REAL = Path(os.environ.get("DLPLORA_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data" / "real")
REAL_TASKS = ("boolean_expressions", "navigate", "tense")
METRICS = {"acc,none", "acc_norm,none", "exact_match,none", "bleu,none", "rouge1,none", "rougeL,none"}


def run_ours(tmp_path: Path, backbone: Path, pool: Path, names: tuple[str, ...], limit: int) -> dict[str, Any]:
    """The literal command ``lm_eval --model dlplora``; results and samples of every task."""
    arguments = ["--model", "dlplora", "--model_args", f"method=oracle,pretrained={backbone},pool={pool}", "--device", "cpu"]
    arguments += ["--tasks", ",".join(f"dlplora_local_{name}" for name in names), "--limit", str(limit), "--batch_size", "4"]
    assert command.main([*arguments, "--output_path", str(tmp_path / "ours"), "--log_samples"]) == 0
    (found,) = (tmp_path / "ours").rglob("results_*.json")
    saved = json.loads(found.read_text())
    for name in names:
        (file,) = (tmp_path / "ours").rglob(f"samples_dlplora_local_{name}_*.jsonl")
        saved[name] = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["doc_id"])
    return saved


def compare(tmp_path: Path, backbone: Path, pool: Path, rows: Path, names: tuple[str, ...], limit: int) -> None:
    """Ours with ``method=oracle`` against one stock model a task with PEFT's adapter, over exported YAML files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLPLORA_DATA", str(rows))
        ours = run_ours(tmp_path, backbone, pool, names, limit)
    export_local(names, str(rows), tmp_path / "yaml")
    manager = TaskManager(include_path=str(tmp_path / "yaml"), include_defaults=False)
    for name in names:
        task = f"dlplora_local_{name}"
        stock = simple_evaluate(
            model="hf",
            model_args=f"pretrained={backbone},peft={pool / name},dtype=float32",
            tasks=[task],
            device="cpu",
            batch_size=4,
            limit=limit,
            bootstrap_iters=0,
            task_manager=manager,
        )
        for metric in METRICS & set(stock["results"][task]):
            assert ours["results"][task][metric] == pytest.approx(stock["results"][task][metric], abs=1e-9), (name, metric)
        theirs = sorted(stock["samples"][task], key=lambda row: row["doc_id"])
        assert len(theirs) == len(ours[name]) == limit
        for mine, other in zip(ours[name], theirs, strict=True):
            for got, expected in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
                if isinstance(expected, str):
                    assert got == expected
                else:
                    assert float(got[0]) == pytest.approx(float(expected[0]), abs=1e-4)


def test_toy_rows_score_the_same_as_stock_lm_eval(tmp_path: Path, tiny_llama_folder: Path, make_adapter: Callable[..., Path]) -> None:
    rows = write_tasks(tmp_path / "rows")
    for seed, name in enumerate(NAMES):
        make_adapter(tmp_path / "pool" / name, seed=seed, use_rslora=name == "pets")
    compare(tmp_path, tiny_llama_folder, tmp_path / "pool", rows, NAMES, limit=6)


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real rows is not here; set DLPLORA_DATA to run this")
def test_real_rows_score_the_same_as_stock_lm_eval(tmp_path: Path, tiny_llama_folder: Path, make_adapter: Callable[..., Path]) -> None:
    for seed, name in enumerate(REAL_TASKS):
        make_adapter(tmp_path / "pool" / name, seed=seed)
    compare(tmp_path, tiny_llama_folder, tmp_path / "pool", REAL, REAL_TASKS, limit=5)


def test_eval_writes_a_record_that_names_the_rows_by_checksum(
    tmp_path: Path, tiny_llama_folder: Path, make_adapter: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_tasks(tmp_path / "rows")
    for seed, name in enumerate(NAMES):
        make_adapter(tmp_path / "pool" / name, seed=seed)
    arguments = ["eval", "--suite", "local:" + ",".join(NAMES), "--data-root", str(rows), "--pretrained", str(tiny_llama_folder)]
    arguments += ["--pool", str(tmp_path / "pool"), "--method", "avg_delta", "--limit", "2", "--out", str(tmp_path / "results")]
    assert main([*arguments, "--dry-run"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    record = json.loads(Path(json.loads(capsys.readouterr().out.splitlines()[-1])["record"]).read_text())
    assert set(record["tasks"]) == set(NAMES)
    assert record["cell"] == before["cell"]
    with (rows / "echo" / "test.jsonl").open("a") as handle:
        handle.write('{"question": "one more", "answer": "row"}\n')
    assert main([*arguments, "--dry-run"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert after["cell"] != before["cell"]
    assert [name for name in NAMES if after["tasks"][name] != before["tasks"][name]] == ["echo"]


def test_exported_tasks_say_where_an_answer_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_tasks(tmp_path / "rows")
    with (rows / "echo" / "test.jsonl").open("a") as handle:
        handle.write('{"question": "two lines", "answer": "one\\ntwo"}\n')
    assert main(["tasks", "--suite", "local:all", "--data-root", str(rows), "--export", str(tmp_path / "yaml")]) == 0
    capsys.readouterr()
    exported = {path.stem: yaml.safe_load(path.read_text()) for path in (tmp_path / "yaml").glob("*.yaml")}
    assert {name for name in exported if not name.startswith("_composite")} == {*NAMES, "_group"}
    assert exported["echo"]["generation_kwargs"]["until"] == ["\n\n"]
    assert "generation_kwargs" not in exported["pets"]
    assert exported["_group"]["task"] == [f"dlplora_local_{name}" for name in sorted(NAMES)]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "test.jsonl:9: not JSON"),
        ('{"question": "q"}', "test.jsonl:9: field 'answer'"),
        ('{"question": "q", "answer": "a"}', "some rows"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, part: str) -> None:
    rows = write_tasks(tmp_path / "rows")
    with (rows / "pets" / "test.jsonl").open("a") as handle:
        handle.write(line + "\n")
    target = tmp_path / "yaml"
    assert main(["tasks", "--suite", "local:pets,echo", "--data-root", str(rows), "--export", str(target)]) == 2
    text = capsys.readouterr().err.strip()
    assert part in text
    assert "\n" not in text
    assert not target.exists()


def test_a_broken_task_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_tasks(tmp_path / "rows")
    (rows / "pets" / "test.jsonl").write_text("{")
    monkeypatch.setenv("DLPLORA_DATA", str(rows))
    plugin.activate()
    known = TaskManager(include_defaults=False).all_tasks
    assert {"dlplora_local_colors", "dlplora_local_echo", "dlplora_local"} <= set(known)
    assert "dlplora_local_pets" not in known


def test_export_refuses_generated_suites(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["tasks", "--export", str(tmp_path / "yaml")]) == 2
    assert "local:" in capsys.readouterr().err
