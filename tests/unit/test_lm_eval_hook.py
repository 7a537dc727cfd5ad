"""The start-up hook, what it adds to lm-eval, and the stock command around ``--model dlplora``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import EntryPoint
from pathlib import Path

import lm_eval._cli.run as harness_run
import pytest
from lm_eval.api.registry import model_registry
from lm_eval.tasks import TaskManager

from dlplora.errors import ConfigError
from dlplora.lm_eval import command, guard, plugin, task_index, versions

STARTUP = Path(__file__).resolve().parents[2] / "startup"


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """An lm-eval of five small modules, and a dlplora that notes what it is called with."""
    for name in ("__init__", "models", "tasks", "_cli", "evaluator", "utils"):
        (tmp_path / "lm_eval").mkdir(exist_ok=True)
        (tmp_path / "lm_eval" / f"{name}.py").write_text("loaded = True\n")
    (tmp_path / "dlplora" / "lm_eval").mkdir(parents=True)
    for place in ("", "lm_eval/"):
        (tmp_path / "dlplora" / f"{place}__init__.py").write_text("")
    (tmp_path / "dlplora" / "lm_eval" / "plugin.py").write_text(
        "seen = []\ndef extend(module):\n    assert module.loaded\n    seen.append(module.__name__)\n"
    )
    return tmp_path


def start(code: str, *folders: Path, **environment: str) -> str:
    """Standard output of a Python without site-packages that begins with the line of the ``.pth`` file; it writes no error."""
    line = (STARTUP / "dlplora_lm_eval.pth").read_text()
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), **environment}
    done = subprocess.run([sys.executable, "-S", "-P", "-c", line + code], capture_output=True, text=True, env=variables, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_hook_extends_the_watched_modules_once_they_have_run(stand_ins: Path) -> None:
    code = "import lm_eval.utils, lm_eval.tasks, lm_eval._cli, lm_eval.models, lm_eval.evaluator\n"
    code += "from dlplora.lm_eval.plugin import seen\nprint(seen)"
    assert start(code, STARTUP, stand_ins) == "['lm_eval.tasks', 'lm_eval._cli', 'lm_eval.models', 'lm_eval.evaluator']\n"


def test_the_hook_can_be_turned_off(stand_ins: Path) -> None:
    code = "import lm_eval.models, sys\nprint('dlplora' in sys.modules)"
    assert start(code, STARTUP, stand_ins) == "True\n"
    assert start(code, STARTUP, stand_ins, DLPLORA_NO_LM_EVAL_HOOK="1") == "False\n"


def test_the_hook_is_silent_where_anything_is_missing(stand_ins: Path) -> None:
    assert start("print(1)", stand_ins) == "1\n"  # the .pth file alone
    (stand_ins / "dlplora" / "lm_eval" / "plugin.py").unlink()
    assert start("import lm_eval.models\nprint(lm_eval.models.loaded)", STARTUP, stand_ins) == "True\n"
    missing = "try:\n    import lm_eval.no\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert start(missing, STARTUP, stand_ins) == "lm_eval.no\n"


def test_the_hook_imports_nothing_at_start() -> None:
    code = "import json, os, sys\nprint(json.dumps(sorted(sys.modules)))"
    plain, hooked = (json.loads(start(code, *folders)) for folders in ((), (STARTUP,)))
    assert set(hooked) - set(plain) == {"_dlplora_lm_eval"}


def test_registration_is_lazy_and_repeatable() -> None:
    plugin.activate()
    plugin.activate()
    from dlplora.lm_eval.model import DLPLoRALM

    assert model_registry.get("dlplora") is DLPLoRALM
    assert "hf" in model_registry


def test_an_lm_eval_that_reads_entry_points_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = EntryPoint("dlplora", plugin.MODEL_TARGET, "lm_eval.models")
    monkeypatch.setattr(model_registry, "_objs", {"dlplora": theirs})
    plugin.activate()
    assert model_registry._objs == {"dlplora": theirs}
    monkeypatch.setattr(model_registry, "_objs", {})
    plugin.activate()
    assert list(model_registry) == ["dlplora"]


def test_the_declared_entry_point_is_what_the_hook_registers() -> None:
    (declared,) = importlib.metadata.entry_points(group="lm_eval.models", name="dlplora")
    assert declared.value == plugin.MODEL_TARGET
    scripts = [script.name for script in importlib.metadata.entry_points(group="console_scripts") if script.value.startswith("dlplora.")]
    assert not {"lm_eval", "lm-eval"} & set(scripts)


def _task(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(f"task: {name}\noutput_type: generate_until\ndoc_to_text: {text}\n")


def test_every_task_manager_knows_our_tasks(tmp_path: Path) -> None:
    plugin.activate()
    _task(tmp_path / "mine", "my_task", "mine")
    with task_index.task_index("ours"):
        plain = TaskManager()
        mine = TaskManager(include_path=str(tmp_path / "mine"))
    positional = TaskManager(None, [tmp_path / "mine"], False)
    assert "dlplora_nano_mcq" in plain.all_groups
    assert "arc_easy" not in plain.all_tasks
    for manager in (mine, positional):
        assert {"my_task", "dlplora_nano_object_counting"} <= set(manager.all_subtasks)
    with task_index.task_index("as called"):
        assert "dlplora_nano_mcq" not in TaskManager(include_defaults=False).all_tasks


def test_a_task_of_the_user_wins_over_ours(tmp_path: Path) -> None:
    plugin.activate()
    _task(tmp_path, "dlplora_nano_object_counting", "mine")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    entry = manager.task_index["dlplora_nano_object_counting"]
    assert entry.yaml_path is not None
    assert entry.yaml_path.is_relative_to(tmp_path)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Replaces what lm-eval does by a note of the options it got."""
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(harness_run.Run, "_execute", staticmethod(lambda args: calls.append(vars(args))))
    return calls


@pytest.mark.parametrize("cache", [["--use_cache", "c"], ["--use_cache=c"], ["-c", "c"], ["-cc"], ["--use_c", "c"]], ids=" ".join)
@pytest.mark.parametrize("model", [["--model", "dlplora"], ["--model=dlplora"], ["-M", "dlplora"]], ids=" ".join)
def test_the_response_cache_is_refused(
    cache: list[str], model: list[str], executed: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["run", *model, "--model_args", "method=dlp", *cache, "--tasks", "arc_easy"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--use_cache is refused" in error
    assert executed == []


def test_options_of_a_config_file_are_checked_too(
    tmp_path: Path, executed: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: dlplora\ntasks: [dlplora_nano_mcq]\nuse_cache: c\n")
    assert command.main(["run", "--config", str(path)]) == 2
    assert "--use_cache is refused" in capsys.readouterr().err
    assert command.main(["run", "--config", str(path), "--model", "hf"]) == 0
    path.write_text("model: [")
    assert command.main(["run", "--config", str(path)]) == 0  # lm-eval reports it
    assert len(executed) == 2


def test_other_uses_are_untouched(executed: list[dict[str, object]]) -> None:
    before = list(sys.argv)
    for arguments, model in (
        (["--model", "hf", "--model_args", "pretrained=gpt2", "--use_cache", "c", "--tasks", "arc_easy"], "hf"),
        (["--model", "dlplora", "--tasks", "dlplora_nano_mcq", "--limit", "20", "--cache_requests", "true"], "dlplora"),
    ):
        assert command.main(arguments) == 0
        assert executed.pop()["model"] == model
    assert sys.argv == before


def test_bad_input_is_one_line_and_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: object) -> None:
        raise ConfigError("expected this,\n got that.")

    monkeypatch.setattr(harness_run.Run, "_execute", staticmethod(fail))
    assert command.main(["--model", "dlplora", "--tasks", "dlplora_nano"]) == 2
    assert capsys.readouterr().err == "lm_eval: expected this, got that.\n"


def test_exits_of_lm_eval_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_run.Run, "_execute", staticmethod(lambda args: sys.exit(5)))
    with pytest.raises(SystemExit) as exit_info:
        command.main(["--model", "dlplora", "--tasks", "dlplora_nano"])
    assert exit_info.value.code == 5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tasks": ["dlplora_nano_mcq"]}, True),
        ({"tasks": "dlplora_nano_mcq,dlplora_nano_gen"}, True),
        ({"tasks": ["dlplora_nano_mcq,arc_easy"]}, False),
        ({"tasks": ["dlplora_nano_mcq"], "include_path": "x"}, False),
        ({}, False),
    ],
)
def test_lm_eval_s_own_tasks_are_indexed_unless_not_needed(options: dict[str, object], expected: bool) -> None:
    assert guard._only_our_tasks(options) is expected


def test_an_untested_lm_eval_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for version, tested in (("0.4.10", True), ("0.4.13", True), ("0.4.13.dev0", True), ("0.4.9", False), ("0.4.14", False), ("1.0", False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert (versions.untested_version() is None) is tested, version

    def fail(args: object) -> None:
        raise ImportError("cannot import name 'X'")

    monkeypatch.setattr(harness_run.Run, "_execute", staticmethod(fail))
    assert command.main(["--model", "dlplora", "--tasks", "dlplora_nano"]) == 2
    error = capsys.readouterr().err
    assert "lm-eval 1.0 is installed; this dlplora is tested with 0.4.10 to 0.4.13. It lacks what dlplora needs" in error
    with pytest.raises(ImportError):
        command.main(["--model", "hf", "--tasks", "dlplora_nano"])


def test_what_doctor_says_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "lm_eval"
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    ready, sentence = command.hook_state()
    assert not ready
    assert "--force-reinstall --no-deps lm-eval" in sentence

    script.write_text("#!/usr/bin/env python3\nfrom dlplora.lm_eval.command import main\n")
    script.chmod(0o755)
    ready, sentence = command.hook_state()
    assert not ready
    assert "older dlplora" in sentence

    script.write_text("#!/usr/bin/env python3\nfrom lm_eval.__main__ import cli_evaluate\n")
    finder = type("Finder", (), {"__module__": command.HOOK, "find_spec": lambda *_: None})()
    monkeypatch.setattr(sys, "meta_path", [finder, *(one for one in sys.meta_path if type(one).__module__ != command.HOOK)])
    assert command.hook_state() == (True, f"{script} knows --model dlplora.")
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[1:])
    ready, sentence = command.hook_state()
    assert not ready
    assert "python -m dlplora.lm_eval" in sentence
