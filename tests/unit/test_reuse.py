"""A record is reused only where the present code of the method made it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlplora import provenance
from dlplora.cli.main import main
from dlplora.evaluation import reuse
from dlplora.evaluation.method_code import method_code, method_files
from dlplora.methods import registry
from dlplora.methods.base import FusionMethod
from dlplora.reporting import store
from dlplora.reporting.schema import read_record, to_json
from tests.toy_tasks import NAMES, write_tasks
from tests.unit.test_records import make_record

METHOD = '''"""Always the expert of a number."""
from dataclasses import dataclass
import torch
from dlplora.methods.base import FusionMethod, Metadata
from dlplora.baselines._number import NUMBER


class Numbered(FusionMethod):
    name = "numbered"
    metadata = Metadata(title="Numbered", granularity="prompt")

    def route(self, prompts):
        return torch.nn.functional.one_hot(torch.full((len(prompts),), NUMBER), 3).float()
'''


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], type[FusionMethod]]:
    """Writes the method and its helper as an author does in ``baselines/``, and loads them as a new process would."""
    original = registry._modules_of

    def load(name: str, text: str) -> Any:
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"dlplora.baselines.{name}", path)
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, made)
        exec(compile(text, str(path), "exec"), made.__dict__)  # an import may take the bytecode of the second before
        return made

    def both(method: str, helper: str) -> type[FusionMethod]:
        load("_number", helper)
        made = load("numbered", method)
        monkeypatch.setattr(registry, "_modules_of", lambda name: [*original(name), *([made] if name == "dlplora.baselines" else [])])
        return made.Numbered  # type: ignore[no-any-return]

    return both


def test_the_hash_covers_code_and_helpers_but_no_comments(write: Callable[[str, str], type[FusionMethod]]) -> None:
    first = method_code(write(METHOD, "NUMBER = 0\n"))
    assert list(method_files(registry.method_class("numbered"))) == ["dlplora.baselines.numbered", "dlplora.baselines._number"]
    same = write(METHOD.replace("Always the", "One").replace("    def", "    # why\n    def"), '"""Said."""\nNUMBER  =  0\n')
    assert method_code(same) == first
    assert method_code(write(METHOD, "NUMBER = 1\n")) != first
    assert method_code(write(METHOD.replace("3)", "3) * 1.0"), "NUMBER = 0\n")) != first
    assert method_code(type("InANotebook", (FusionMethod,), {"__module__": "in_no_file"})) is None


def test_a_method_that_changed_is_evaluated_again(
    write: Callable[[str, str], type[FusionMethod]],
    tmp_path: Path,
    tiny_llama_folder: Path,
    make_adapter: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = write_tasks(tmp_path / "rows")
    for seed, name in enumerate(NAMES):
        make_adapter(tmp_path / "pool" / name, seed=seed)
    command = ["eval", "--suite", "local:echo", "--data-root", str(rows), "--pretrained", str(tiny_llama_folder), "--limit", "2"]
    command += ["--pool", str(tmp_path / "pool"), "--method", "numbered", "--out", str(tmp_path / "results")]

    def evaluate(text: str, number: int) -> tuple[str, dict[str, Any]]:
        made = method_code(write(text, f"NUMBER = {number}\n"))
        assert main(command) == 0
        said = capsys.readouterr()
        record = json.loads(Path(json.loads(said.out)["record"]).read_text())
        assert record["provenance"]["method_code"] == made
        return said.err, record

    said, first = evaluate(METHOD, 0)
    assert "evaluating numbered" in said
    assert f"{first['cell']}-s0.json is limited to some questions (--limit), so no table shows it" in said
    said, again = evaluate(METHOD + "# a comment\n", 0)
    assert "reusing " in said
    assert again == first
    said, other = evaluate(METHOD, 1)
    assert f"not reused: {tmp_path}" in said
    assert "was made by other code of the method" in said
    assert other["cell"] == first["cell"]  # cells of committed records do not move
    assert other["provenance"]["method_code"] != first["provenance"]["method_code"]


NOW = {"commit": "abc1234", "dirty": True, "changes": {"library": "l1", "all": "c1"}}


@pytest.mark.parametrize(
    ("made_by", "reason"),
    [
        ({"git": {"commit": "abc1234", "dirty": False}}, None),
        ({"git": {"commit": None, "dirty": None}, "method_code": "m"}, None),
        ({"git": {"commit": "older", "dirty": False}, "method_code": "n"}, "other code of the method"),
        ({"git": {"commit": "abc1234", "dirty": True}}, "uncommitted code"),
        ({"git": {"commit": "abc1234", "dirty": True, "changes": {"library": "l0", "all": "c0"}}, "method_code": "m"}, "uncommitted code"),
        ({"git": {**NOW, "commit": "older"}}, "uncommitted code"),
        ({"git": {**NOW, "changes": {"library": "l1", "all": "c0"}}}, "uncommitted code"),
        ({"git": NOW, "method_code": "m"}, None),
    ],
)
def test_what_speaks_against_a_record(made_by: dict[str, Any], reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "git_state", lambda: NOW)
    found = store.outdated(made_by, "m")
    assert found is None if reason is None else reason in str(found)
    path = store.save(make_record(provenance=made_by), tmp_path)
    known = store.find_cell("c0ffee", 0, "toy", "dlp", tmp_path, scratch=True)  # which does not know the method's code
    assert known == (None if reason == "uncommitted code" else path)


def test_a_record_does_not_depend_on_the_files_of_other_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "git_state", lambda: NOW)
    made_by = {"git": {**NOW, "changes": {"library": "l1", "all": "c0"}}, "method_code": "m"}
    assert store.outdated(made_by, "m") is None
    assert "uncommitted code" in str(store.outdated(made_by))


def test_what_a_reused_record_does_not_cover_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dlplora.evaluation.protocol import load_protocol
    from dlplora.evaluation.runner import known_record, prepare

    run = prepare(load_protocol("nano"), "nano", "dlp", 0)
    made_by = {"git": {"commit": "abc1234", "dirty": False}}
    record = dataclasses.replace(make_record(provenance=made_by, cell=run.cell()), suite="nano")
    path = store.save(record, tmp_path)
    assert read_record(path) == record
    monkeypatch.setattr(reuse, "changed_files", list)
    assert known_record(run, tmp_path) == reuse.Known(path=path, note="it does not say which code of the method made it")
    monkeypatch.setattr(reuse, "changed_files", lambda: [Path("/elsewhere.py")])
    assert known_record(run, tmp_path).note == "it was made without the uncommitted changes in 1 file"
    monkeypatch.setattr(reuse, "changed_files", lambda: [path.resolve() for path in method_files(type(run.method)).values()])
    assert known_record(run, tmp_path).path is None
    assert "dlp.py has changed" in known_record(run, tmp_path).note
    told = dataclasses.replace(record, provenance={**made_by, "method_code": method_code(type(run.method))})
    path.write_text(to_json(told))
    assert known_record(run, tmp_path).path == path  # its code is the present one, changed or not


def test_a_change_of_uncommitted_code_has_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(provenance, "PACKAGE_ROOT", tmp_path / "dlplora")
    assert provenance.git_state() == {"commit": None, "dirty": None}
    (tmp_path / "baselines").mkdir()
    code, new = tmp_path / "baselines" / "a.py", tmp_path / "baselines" / "ü b.py"
    code.write_text("1")
    git("init")
    assert provenance.git_state()["dirty"] is True
    git("add", ".")
    git("commit", "-m", "x")
    clean = provenance.git_state()
    assert clean["dirty"] is False
    assert "changes" not in clean
    (tmp_path / "README.md").write_text("no result depends on it")
    assert provenance.git_state() == clean
    seen = []
    for path, text in ((code, "2"), (code, "3"), (new, "1"), (new, "2")):
        path.write_text(text)
        seen.append(provenance.git_state()["changes"]["all"])
    assert provenance.changed_files() == [code.resolve(), new.resolve()]
    new.unlink()
    assert provenance.git_state()["changes"] == {"library": provenance._content_hash([]), "all": seen[1]}
    assert len(set(seen)) == 4
    code.unlink()
    assert provenance.git_state()["changes"]["all"] not in seen
    (tmp_path / "dlplora").mkdir()
    (tmp_path / "dlplora" / "c.py").write_text("1")
    assert provenance.git_state()["changes"]["library"] != provenance._content_hash([])
