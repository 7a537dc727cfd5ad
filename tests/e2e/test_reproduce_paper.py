"""``dlplora reproduce paper`` on a tiny backbone: a killed run, resumed, ends where an uninterrupted one ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlplora.cli.main import main
from dlplora.config import build, configs_root, list_configs, load_yaml
from dlplora.evaluation.protocol import load_protocol
from dlplora.reporting.store import load_all
from dlplora.reproduce import artifacts
from dlplora.reproduce.paper import CONFIGS, announced, budgets, resolve
from dlplora.reproduce.profile import Profile
from dlplora.reproduce.recipe import Setting
from dlplora.training.config_check import check_command_line

TASKS = ("object_counting", "winowhy")
DEADLINE_S = 240
SIZES = {
    "qwen2-1.5b": ("Qwen/Qwen2-1.5B", "1.5 G parameters", "one adapter 1.1 M parameters"),
    "qwen2-7b": ("Qwen/Qwen2-7B", "7.6 G parameters", "one adapter 2.5 M parameters"),
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", "6.7 G parameters", "one adapter 4.2 M parameters"),
    "llama3-8b": ("meta-llama/Meta-Llama-3-8B", "8.0 G parameters", "one adapter 3.4 M parameters"),
}


def write_rows(root: Path) -> Path:
    for split, start, num in (("train", 0, 40), ("test", 100, 6)):
        texts = {
            "object_counting": [
                {"question": f"the box sees {n} cat", "answer": "two" if n % 2 else "three"} for n in range(start, start + num)
            ],
            "winowhy": [{"question": f"who likes {n} dog", "choices": ["yes", "no"], "answer": n % 2} for n in range(start, start + num)],
        }
        for task, rows in texts.items():
            path = root / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def job(tmp_path: Path, tiny_llama_folder: Path) -> list[str]:
    """The command over a profile with budgets of a few steps."""
    protocol = {"suite": "paper_local", "batch_size": 8}
    (tmp_path / "tiny_protocol.yaml").write_text(yaml.safe_dump(protocol))
    cpu = {"trainer": {"accelerator": "cpu"}}
    pool = {
        "model": {"init_args": {"dtype": "float32"}},
        "data": {"init_args": {"num_steps": 12, "batch_size": 2, "num_validation": 4}},
        "trainer": {"callbacks": {"init_args": {"every_n_steps": 4}}},
    }
    profile = {
        "protocol": str(tmp_path / "tiny_protocol.yaml"),
        "backbone": str(tiny_llama_folder),
        "processes": 1,
        "options": {"all": cpu, "pool": pool, "router": {"trainer": {"max_epochs": 1}}},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(profile))
    rows = write_rows(tmp_path / "rows")
    return ["reproduce", "paper", "--backbone", str(tmp_path / "tiny.yaml"), "--data-root", str(rows), "--methods", "oracle,dlp_code"]


def places(tmp_path: Path, name: str) -> list[str]:
    return ["--runs", str(tmp_path / name / "runs"), "--out", str(tmp_path / name / "results")]


def kill_when(condition: Any, arguments: list[str]) -> None:
    """Start the command and kill it, as a machine that loses power would, once the condition holds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "dlplora.cli.main", *arguments], env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, "the command ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def numbers(root: Path) -> dict[str, Any]:
    records, problems = load_all(root / "results", "paper_local", "scratch")
    published, _ = load_all(root / "results", "paper_local")
    assert not problems
    return {
        record.method_name: (record.tasks, record.pool_hash, record.artifact_hashes, record.routing) for record in [*records, *published]
    }


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_like_one_that_was_not_killed(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main([*job, *places(tmp_path, "whole")]) == 0
    capsys.readouterr()

    runs = tmp_path / "cut" / "runs"
    arguments = [*job, *places(tmp_path, "cut")]
    kill_when(lambda: any((runs / "pool_training").rglob("step=*.ckpt")), arguments)  # in the middle of the experts
    assert not (runs / "pool" / "recipe.json").is_file()
    kill_when(lambda: (runs / "router_training").is_dir(), arguments)  # the pool is finished, the router is not
    finished = {path: path.stat().st_mtime_ns for path in (runs / "pool").rglob("*") if path.is_file()}
    assert (runs / "pool" / "recipe.json") in finished
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "pool: trained before" in said
    assert "router: to be trained" in said
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert set(numbers(tmp_path / "cut")) == {"oracle", "dlp_code"}

    assert main(arguments) == 0
    again = capsys.readouterr().err
    assert again.count("reused") == 3  # the announcement and both cells
    assert "training pool …" not in again


def test_the_plan_says_what_is_needed_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows")
    arguments = ["reproduce", "paper", "--backbone", "local-small", "--data-root", str(rows), "--dry-run", *places(tmp_path, "x")]
    assert main([*arguments, "--methods", "base,multitask,mole"]) == 0
    said = capsys.readouterr().err
    for part in ("base model: to be trained", "trained/mole", "2 experts", "training multitask", "evaluation in batches", "disk: about"):
        assert part in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", SIZES)
def test_the_plan_for_a_backbone_of_the_paper_needs_no_hub(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DLPLORA_DATA", raising=False)
    assert main(["reproduce", "paper", "--backbone", name, "--dry-run", *places(tmp_path, "x")]) == 0
    said = capsys.readouterr().err
    for part in (
        *SIZES[name],
        "26 experts",
        "training pool: 26 x 340 steps of 8 rows, about 21.2 M tokens",
        "evaluation in batches of",
        "assumed",
    ):
        assert part in said
    assert "disk: about" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", SIZES)
def test_profile_and_protocol_of_a_backbone_agree(name: str) -> None:
    """One downloads and trains, the other evaluates; the sizes are those that latencies are measured on."""
    profile = build(Profile, load_yaml(configs_root() / "reproduce" / f"{name}.yaml"), name)
    protocol = load_protocol(profile.protocol)
    assert profile.protocol == name
    assert (profile.backbone, profile.revision) == (protocol.backbone, protocol.revision)
    assert protocol.suite == "paper26"
    assert profile.shape == name
    arguments = resolve(name, {}, None, None, None).over(profile.backbone or "", "0" * 40)[1].arguments("pool")
    assert "--data.init_args.suite=paper26" in arguments
    assert f"--model.init_args.base_model_name={protocol.backbone}" in arguments


def test_gates_with_a_budget_of_their_own_are_counted_apart() -> None:
    found = budgets(resolve("real26", {}, ["mole", "xlora", "meteora_gate"], [0, 1], None))
    assert [(found[name]["num_steps"], found[name]["runs"]) for name in ("gates", "trained/meteora_gate")] == [(1200, 4), (4800, 2)]


def test_an_adapter_on_all_tasks_sees_as_many_rows_as_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over fewer tasks than its recipe was written for: 18 of real26 without public rows, the 8 of the confusable pairs."""
    monkeypatch.delenv("DLPLORA_DATA", raising=False)
    monkeypatch.setattr("dlplora.reproduce.paper._hub_answers", lambda protocol: False)
    for name, tasks in (("real26", 18), ("confusable", 8)):
        found = budgets(resolve(name, {}, ["multitask", "multitask_r64"], None, None))
        for role in ("multitask", "multitask_r64"):
            assert found[role]["num_steps"] * found[role]["batch_size"] == tasks * 144 * 8
        assert found["pool"]["runs"] == tasks


def test_adapters_of_higher_rank_and_further_seeds_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, of 1089536 parameters an adapter: 52 of rank 8 and two of 8 times that, at 28 bytes, and 1543714304 weights at 2."""
    monkeypatch.delenv("DLPLORA_DATA", raising=False)
    said = list(announced(resolve("qwen2-1.5b", {}, ["oracle", "multitask_r64"], [0, 1], None)))
    bytes_needed = (2 * 26 + 2 * 8) * 1089536 * 28 + 1543714304 * 2
    assert f"disk: about {bytes_needed / 1e9:.1f} GB" in said[-1]
    (wide,) = [line for line in said if line.startswith("training multitask_r64")]
    (plain,) = [line for line in said if line.startswith("training pool")]
    gigabytes = [float(line.rsplit(", ", 1)[1].removesuffix(" GB")) for line in (wide, plain)]
    assert gigabytes[0] - gigabytes[1] == pytest.approx(7 * 1089536 * 16 / 1e9, abs=0.11)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--backbone", "qwen2-7"], "Did you mean 'qwen2-7b'?"),
        (["--methods", "dpl"], "dlp"),
        (["--tasks", "gsm"], "gsm8k"),
        (["--seeds", "-1"], "seed must be from 0"),
        (["--fresh"], "--fresh"),
        (["--data-root", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_said_before_anything_starts(
    arguments: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows")
    (rows / "gsm8k").mkdir()
    (rows / "gsm8k" / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    monkeypatch.setenv("DLPLORA_DATA", str(rows))
    assert main(["reproduce", "paper", *arguments, *places(tmp_path, "x")]) == 2
    assert part in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--backbone", "qwen2-7b", "--tasks", "gsm"], "suite 'paper26' has no task 'gsm'. Did you mean 'gsm8k'?"),
        (["--backbone", "qwen2-7b", "--tasks", "disfl_qa"], "suite 'paper26' has no task 'disfl_qa'"),
        (["--backbone", "local-small"], "pass --data-root DIR"),
    ],
)
def test_names_are_checked_before_the_hub_is_asked(
    arguments: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DLPLORA_DATA", raising=False)
    for further in ([], ["--dry-run"]):
        assert main(["reproduce", "paper", *arguments, *further, *places(tmp_path, "x")]) == 2
        said = capsys.readouterr().err.strip()
        assert part in said
        assert "\n" not in said
    assert not (tmp_path / "x").exists()


def test_options_of_the_paper_are_refused_for_nano(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "nano", "--backbone", "qwen2-7b"]) == 2
    assert "--backbone" in capsys.readouterr().err


KINDS = ("backbone", "pool", "multitask", "router", "trained")


@pytest.mark.parametrize("name", list_configs("reproduce"))
def test_every_profile_names_a_protocol_and_options_that_exist(name: str, tmp_path: Path) -> None:
    profile = build(Profile, load_yaml(configs_root() / "reproduce" / f"{name}.yaml"), name)
    protocol = load_protocol(profile.protocol)
    assert protocol.suite.startswith(("paper", "real26", "nano", "skills"))
    setting = Setting(
        backbone="BASE", suite=protocol.suite, data_root=str(tmp_path), tasks=("gsm8k",), configs=CONFIGS, options=profile.fit_options
    )
    for kind in KINDS:
        arguments = ["--config", str(artifacts.config_path(kind, setting)), *setting.arguments(kind)]
        assert "model" in check_command_line(["fit", *arguments])


def test_the_documents_name_the_estimates_that_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLPLORA_DATA", raising=False)
    text = (Path(__file__).resolve().parents[2] / "docs" / "reproduce_paper.md").read_text(encoding="utf-8")
    for name in SIZES:
        said = "\n".join(announced(resolve(name, {}, None, None, None)))
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        for cell in (one.strip() for one in row.split("|")[2:-1]):
            assert cell in said, (name, cell)
