"""The lm_eval command: registration, our tasks, refusals, and everything else handed over untouched."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import lm_eval.__main__ as harness_main
import pytest
from lm_eval.api.registry import model_registry
from lm_eval.tasks import TaskManager

from dlplora.errors import ConfigError
from dlplora.lm_eval import command


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces lm-eval's command line by a note of what it was called with."""
    calls: list[list[str]] = []
    monkeypatch.setattr(harness_main, "cli_evaluate", lambda: calls.append(list(sys.argv[1:])))
    return calls


def test_registration_is_lazy_and_repeatable() -> None:
    command.register()
    command.register()
    from dlplora.lm_eval.model import DLPLoRALM

    assert model_registry.get("dlplora") is DLPLoRALM
    assert "hf" in model_registry


@pytest.mark.parametrize(
    "cache", [["--use_cache", "c"], ["--use_cache=c"], ["-c", "c"], ["-cc"], ["--use_c", "c"]], ids=lambda given: " ".join(given)
)
@pytest.mark.parametrize("model", [["--model", "dlplora"], ["--model=dlplora"], ["-M", "dlplora"]], ids=lambda given: " ".join(given))
def test_the_response_cache_is_refused(
    cache: list[str], model: list[str], handed_over: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["run", *model, "--model_args", "method=dlp", *cache, "--tasks", "arc_easy"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--use_cache is refused" in error
    assert handed_over == []


def test_other_uses_are_handed_over_untouched(handed_over: list[list[str]]) -> None:
    before = list(sys.argv)
    for arguments in (
        ["--model", "hf", "--model_args", "pretrained=gpt2", "--use_cache", "c", "--tasks", "arc_easy"],
        ["ls", "tasks"],
        ["validate", "--tasks", "arc_easy"],
        ["--model", "dlplora", "--tasks", "dlplora_nano_mcq", "--limit", "20", "--cache_requests", "true"],
        ["--model"],
        [],
    ):
        assert command.main(arguments) == 0
        assert handed_over.pop() == arguments
    assert sys.argv == before


def test_bad_input_is_one_line_and_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ConfigError("expected this,\n got that.")

    monkeypatch.setattr(harness_main, "cli_evaluate", fail)
    assert command.main(["--model", "dlplora", "--tasks", "dlplora_nano"]) == 2
    assert capsys.readouterr().err == "lm_eval: expected this, got that.\n"


def test_exits_of_lm_eval_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_main, "cli_evaluate", lambda: sys.exit(5))
    with pytest.raises(SystemExit) as exit_info:
        command.main(["ls"])
    assert exit_info.value.code == 5


def _task(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(f"task: {name}\noutput_type: generate_until\ndoc_to_text: {text}\n")


def test_our_tasks_are_known_while_open_only(tmp_path: Path) -> None:
    _task(tmp_path / "mine", "my_task", "mine")
    original = TaskManager.__init__
    with command.tasks_included(include_defaults=False):
        plain = TaskManager()
        mine = TaskManager(include_path=str(tmp_path / "mine"))
        positional = TaskManager(None, [tmp_path / "mine"], False)
    assert TaskManager.__init__ is original
    assert "dlplora_nano_mcq" in plain.all_groups
    assert "arc_easy" not in plain.all_tasks
    for manager in (mine, positional):
        assert {"my_task", "dlplora_nano_object_counting"} <= set(manager.all_subtasks)
    assert "dlplora_nano_mcq" not in TaskManager(include_defaults=False).all_tasks


def test_a_task_of_the_user_wins_over_ours(tmp_path: Path) -> None:
    _task(tmp_path, "dlplora_nano_object_counting", "mine")
    with command.tasks_included(include_defaults=False):
        manager = TaskManager(include_path=str(tmp_path))
    entry = manager.task_index["dlplora_nano_object_counting"]
    assert entry.yaml_path is not None
    assert entry.yaml_path.is_relative_to(tmp_path)


def test_the_hook_is_gone_after_an_error() -> None:
    original = TaskManager.__init__
    with pytest.raises(KeyError), command.tasks_included():
        raise KeyError("boom")
    assert TaskManager.__init__ is original


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tasks", "dlplora_nano_mcq"], True),
        (["-t", "dlplora_nano_mcq", "dlplora_nano_gen"], True),
        (["--tasks", "dlplora_nano_mcq,arc_easy"], False),
        (["--tasks", "dlplora_nano_mcq", "--include_path", "x"], False),
        (["--tasks", "dlplora_nano_mcq", "-C", "x.yaml"], False),
        (["ls", "tasks"], False),
        ([], False),
    ],
)
def test_lm_eval_s_own_tasks_are_indexed_unless_not_needed(arguments: list[str], expected: bool) -> None:
    assert command._only_our_tasks(command._peek(arguments)) is expected


def test_whose_command_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "lm_eval"
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    ours, sentence = command.console_command_is_ours()
    assert not ours
    assert "python -m dlplora.lm_eval" in sentence

    script.write_text("#!/usr/bin/env python3\nfrom dlplora.lm_eval.command import main\n")
    script.chmod(0o755)
    ours, sentence = command.console_command_is_ours()
    assert ours
    assert str(script) in sentence

    script.write_text("#!/usr/bin/env python3\nfrom lm_eval.__main__ import cli_evaluate\n")
    monkeypatch.setattr(model_registry, "_objs", {})
    ours, sentence = command.console_command_is_ours()
    assert not ours
    assert "--force-reinstall" in sentence
    monkeypatch.setattr(model_registry, "_objs", {"dlplora": "a:b"})  # an lm-eval that reads entry points
    assert command.console_command_is_ours()[0]
