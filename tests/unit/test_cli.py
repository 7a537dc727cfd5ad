"""The command line: bad input on every door gives one line and exit code 2; help needs no torch."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dlplora.cli.main import build_parser, main
from dlplora.config import ASSETS_ROOT

needs_assets = pytest.mark.skipif(not (ASSETS_ROOT / "nano" / "pool").is_dir(), reason="the embedded nano experts are not there yet")


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    text = capsys.readouterr().err.strip()
    assert text.count("\n") == 0, text
    return text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["eval", "--method", "dpl"], ["dpl", "dlp"]),
        (["eval", "--protocol", "nanno"], ["nanno", "nano"]),
        (["eval", "--tasks", "shelf_sortin"], ["shelf_sortin", "shelf_sorting"]),
        (["eval", "--method-param", "p"], ["KEY=VALUE"]),
        (["eval", "--method", "dlp", "--method-param", "pp=0.1"], ["pp"]),
        (["eval", "--pool", "/no/such/pool"], ["/no/such/pool"]),
        (["eval", "--pretrained", "./no_such_model"], ["no_such_model"]),
        (["eval", "--limit", "0"], ["limit"]),
        (["eval", "--seed", "-1"], ["seed", "-1"]),
        (["eval", "--seed", "4294967296"], ["seed", "4294967295"]),
        (["eval", "--method-param", "p=[1"], ["--method-param p", "'[1'"]),
        (["eval", "--tasks", ""], ["'tasks' is empty"]),
        (["eval", "--pool", " "], ["'pool' is empty"]),
        (["reproduce", "nano", "--seeds", ""], ["'seeds' is empty"]),
        (["reproduce", "nano", "--methods", ","], ["'methods' is empty"]),
        (["reproduce", "nano", "--limit", "0", "--dry-run"], ["limit"]),
        (["generate", "caf\udce9"], ["prompt", "UTF-8"]),
        (["pool", "check", ""], ["'folder' is empty"]),
        (["tasks", "--suite", "nanno"], ["nanno"]),
        (["tasks", "--suite", "local:x"], ["--data-root"]),
        (["pool", "list", "/no/such/pool"], ["/no/such/pool"]),
    ],
)
def test_bad_input_gives_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]) -> None:
    text = fails(capsys, *arguments)
    assert text.startswith("dlplora: error: ")
    for part in parts:
        assert part in text


@needs_assets
def test_an_empty_prompt_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "empty" in fails(capsys, "generate", "", "--raw")


@pytest.mark.parametrize(("command", "more"), [("tasks", ""), ("matrix status x", "; the same command continues where this one stopped")])
def test_only_commands_that_can_go_on_say_so(
    command: str, more: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(given: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("dlplora.cli.main._run", interrupted)
    assert main(command.split()) == 130
    assert capsys.readouterr().err == f"dlplora: interrupted{more}.\n"


def test_an_interrupted_training_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dlplora.training import launch

    def interrupted(_: object) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as Lightning's trainer does

    monkeypatch.setattr(launch, "run", interrupted)
    assert main(["fit", "--config", "router"]) == 130
    assert capsys.readouterr().err == "interrupted; --ckpt_path last continues from the newest checkpoint.\n"


def test_a_terminal_without_the_character_shows_its_escape() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(
        [sys.executable, "-m", "dlplora.cli.main", "tasks"], env=environment, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "\\u23ce" in shown.stdout


def test_help_loads_no_deep_learning_package() -> None:
    code = (
        "import sys; from dlplora.cli.main import build_parser; build_parser().format_help();"
        "print([name for name in ('torch', 'transformers', 'lightning', 'lm_eval', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reporting_loads_no_deep_learning_package() -> None:
    code = (
        "import sys; import dlplora.cli.report, dlplora.reporting.tables;"
        "print([name for name in ('torch', 'transformers', 'lightning', 'lm_eval', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_underscores_and_dashes_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert "/no/rows" in fails(capsys, "tasks", "--suite", "local:x", "--data_root", "/no/rows")
    assert main(["tasks", "--suite", "nano", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 26
    assert sum(row["kind"] == "mcq" for row in rows) == 18


def test_every_help_begins_with_what_the_command_does() -> None:
    def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                listed = {choice.dest for choice in action._choices_actions}
                for name, inner in action.choices.items():
                    if name in listed and name not in {"fit", "validate", "test"}:  # these three have one text of their own
                        yield inner
                        yield from parsers(inner)

    found = list(parsers(build_parser()))
    assert len(found) > 30
    for parser in found:
        assert re.match(r"[A-Z].*[.]", parser.description or "", re.DOTALL), parser.prog
        for action in parser._actions:
            assert action.help or action.choices, f"{parser.prog}: {action.dest}"


def test_former_names_of_options_are_read() -> None:
    assert build_parser().parse_args(["eval", "--released-code"]).teacher_forced
    assert not build_parser().parse_args(["eval"]).teacher_forced


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--format", "json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"base", "oracle", "multitask", "avg_delta", "dlp"} <= set(rows)
    assert rows["oracle"]["needs"] == ["task_id"] or rows["oracle"]["needs"] == "task_id"


def test_reports_need_results_and_damaged_records_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("build", "validate", "figures"):
        assert main(["report", action, "--out", str(tmp_path)]) == 2
        assert "holds no results" in capsys.readouterr().err
    for action, part in (
        ("all", "`dlplora eval` writes records"),
        ("compare-protocols", "holds no records of the released code's evaluation; `dlplora eval --teacher-forced` writes them"),
        ("check", "nano.json not found. The check guards the repository's own methods: run it in a clone"),
    ):
        assert main(["report", action, "--out", str(tmp_path)]) == 2
        assert part in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs" / "nano").mkdir(parents=True)
    assert main(["report", "build", "--out", str(tmp_path)]) == 0
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {"nano.md", "reported.md"}
    assert "README" not in capsys.readouterr().out  # that of the working directory belongs to other results
    assert main(["report", "build", "--check", "--out", str(tmp_path)]) == 0
    (tmp_path / "runs" / "nano" / "x.json").write_text("{}")
    assert main(["report", "validate", "--out", str(tmp_path)]) == 1
    assert "x.json" in capsys.readouterr().err


def test_pool_check_names_the_adapter_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str], make_adapter: Any) -> None:
    make_adapter(tmp_path / "good", seed=1)
    make_adapter(tmp_path / "dora", seed=2, use_dora=True)
    assert main(["pool", "check", str(tmp_path)]) == 2
    assert "'dora'" in capsys.readouterr().err


def test_pool_check_names_other_base_models_and_nested_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_adapter: Any
) -> None:
    pool = tmp_path / "pool"
    bases = {"one": "/a/folder", "two": "org/base-1b", "more": "org/other-2b", "three": "unsloth/Base-1b-bnb-4bit"}
    for seed, (name, base) in enumerate({**bases, "group/inner": "org/base-1b", "one/checkpoint-5": "org/base-1b"}.items()):
        config = make_adapter(pool / name, seed=seed) / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
    assert main(["pool", "check", str(pool)]) == 2
    note, error = capsys.readouterr().err.splitlines()
    assert note.startswith("note: group/inner does not lie directly in the pool and takes no part")
    assert "of another base model than 'unsloth/Base-1b-bnb-4bit', which most of them name: 'more' (org/other-2b)." in error
    assert main(error.partition("two names: dlplora ")[2].rstrip(".").split()) == 0  # what it advises
    assert main(note.partition("`dlplora ")[2].rstrip("`").split()) == 0
    capsys.readouterr()
    assert main(["pool", "check", str(pool)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("5 adapters fit together")
    assert main(["pool", "check", str(tmp_path)]) == 2
    assert f"There are some further down; pass one of these: {pool}, " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "--method", "base", "--limit", "1", "--out"],
        ["reproduce", "nano", "--methods", "base", "--limit", "1", "--out"],
        ["fit", "--config", "configs/train/router.yaml", "--model.init_args.export_folder"],
        ["fit", "--config", "configs/train/router.yaml", "--trainer.default_root_dir"],
    ],
)
def test_a_folder_that_takes_no_files_is_found_out_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main([*arguments, str(tmp_path / "file" / "results")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert f"cannot write in {tmp_path / 'file'}" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
