"""The commit that lm-eval notes with its results: as lm-eval finds it, without git's error message outside a repository."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lm_eval.loggers import utils

from dlplora.lm_eval import commit, plugin
from dlplora.lm_eval.evaluate import without_environment_report

GIT = shutil.which("git")
NEEDS_GIT = pytest.mark.skipif(GIT is None, reason="git is not installed")


def git(*arguments: str) -> None:
    subprocess.run([str(GIT), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments], check=True, capture_output=True)


@pytest.fixture(params=["no repository", "empty repository", "repository", "folder that looks like one"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if "repository" in request.param and not request.param.startswith("no"):
        git("init", "-b", "main")
    if request.param == "repository":
        git("commit", "--allow-empty", "-m", "first")
    if request.param.startswith("folder"):
        (tmp_path / ".git" / "refs" / "heads").mkdir(parents=True)
        (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
        (tmp_path / ".git" / "refs" / "heads" / "main").write_text("0123abcd\n")
    return str(request.param)


@NEEDS_GIT
def test_the_commit_is_lm_evals_and_git_says_nothing(place: str, capfd: pytest.CaptureFixture[str]) -> None:
    expected = utils.get_git_commit_hash()
    assert ("fatal:" in capfd.readouterr().err) is (place != "repository")
    assert commit.commit() == expected
    assert (expected is None) is (place in ("no repository", "empty repository"))
    assert capfd.readouterr().err == ""


def test_without_git_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    assert commit.commit() is None
    assert utils.get_git_commit_hash() is None
    assert capfd.readouterr().err == ""


@pytest.fixture
def evaluator() -> ModuleType:
    """An evaluator whose evaluation says which function notes the commit."""
    module = ModuleType("lm_eval.evaluator")
    module.get_git_commit_hash = utils.get_git_commit_hash  # type: ignore[attr-defined]

    def simple_evaluate(model: Any, fail: bool = False) -> Any:
        if fail:
            raise ValueError("no")
        return module.get_git_commit_hash

    module.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    return module


def test_only_our_model_is_noted_quietly(evaluator: Any) -> None:
    before = evaluator.simple_evaluate
    plugin.extend(evaluator)
    extended = evaluator.simple_evaluate
    plugin.extend(evaluator)
    assert evaluator.simple_evaluate is extended
    assert extended is not before

    class Ours:
        __module__ = "dlplora.lm_eval.model"

    class Derived(Ours):
        __module__ = "mine"

    for model in ("dlplora", Ours(), Derived()):
        assert extended(model) is commit.commit
        assert extended(model=model) is commit.commit
        assert evaluator.get_git_commit_hash is utils.get_git_commit_hash
    for model in ("hf", "dlplora2", object(), None):
        assert extended(model) is utils.get_git_commit_hash
    with pytest.raises(ValueError, match="no"):
        extended("dlplora", fail=True)
    assert evaluator.get_git_commit_hash is utils.get_git_commit_hash


def test_what_else_replaces_the_function_is_left_alone(evaluator: Any) -> None:
    plugin.extend(evaluator)
    evaluator.get_git_commit_hash = other = object()
    assert evaluator.simple_evaluate("dlplora") is other
    del evaluator.get_git_commit_hash
    with pytest.raises(AttributeError):
        evaluator.simple_evaluate("dlplora")


def test_our_own_evaluations_still_note_no_commit() -> None:
    from lm_eval import evaluator as theirs

    plugin.extend(theirs)
    with without_environment_report():
        assert theirs.get_git_commit_hash() is None
        assert theirs.get_git_commit_hash is not utils.get_git_commit_hash
