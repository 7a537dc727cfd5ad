"""Figures, page and schema made from records."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from dlplora.cli.main import main
from dlplora.methods.registry import available_presets, load_method_spec
from dlplora.reporting import figures, html, store
from dlplora.reporting.groups import group
from dlplora.reporting.methods import OTHER, group_of, method_facts
from dlplora.reporting.reported import reported
from dlplora.reporting.schema import AGGREGATES, Record, json_schema, read_record, to_json
from tests.unit.test_comparison import outcomes, saved
from tests.unit.test_records import make_record


@pytest.fixture
def results(tmp_path: Path) -> Path:
    saved(tmp_path, "dlp", {"a": 0.9, "b": 0.9, "g": 0.8})
    saved(tmp_path, "base", {"a": 0.2, "b": 0.3, "g": 0.1})
    return tmp_path


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def unpacked(text: str) -> dict:
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_the_page_holds_what_the_records_say(results: Path) -> None:
    records, _ = store.load_all(results)
    reader = store.OutcomeReader(results)
    item = SimpleNamespace(prompt="Is </script> safe?", answer="yes", choices=("yes", "no"))
    page = html.page(group(records, reader), reader, lambda suite, task: [item] * 3)
    data = data_of(page)
    (one,) = data["groups"]
    assert (one["suite"], one["protocol"], one["backbone"]) == ("toy", "toy", "tiny")
    row = next(row for row in one["rows"] if row["method"] == "dlp")
    assert row["cells"]["mcq_acc"][0] == pytest.approx(0.7)
    assert row["cells"]["mcq_acc"][2] == "best"
    assert row["tasks"] == {"a": 0.5, "b": 0.9, "g": 0.25}
    assert "gen_bleu" in row["cells"]
    assert "training_tokens" not in row["cells"]  # not measured: an empty cell
    task = unpacked(one["questions"]["a"])
    assert task["items"][0] == ["Is </script> safe?", ["yes", "no"], "yes"]
    assert task["items"][3] is None  # only three items are known
    assert (task["num"], task["total"]) == (60, 60)
    written = {name: cells for name, _, cells in task["methods"]}
    assert list(written) == ["base", "dlp"]
    samples = reader(next(record for record in records if record.method_name == "dlp"))
    assert samples is not None
    assert [cell[0] for cell in written["dlp"]] == samples["a"].metrics["acc"].tolist()
    assert [task["said"][cell[1]] for cell in written["dlp"]] == samples["a"].choice
    assert len(data["reported"]) == len(reported())
    for word in ('http-equiv="refresh"', '<link rel="stylesheet', " src="):
        assert word not in page


HOSTILE = "<img src=x onerror=alert(1)>"


def hostile_results(root: Path) -> None:
    """One method and one task whose names are markup, and a figure with a script."""
    tasks = {HOSTILE if name == "a" else name: row for name, row in make_record().tasks.items()}
    record = dataclasses.replace(make_record(method_name="<!--<script>"), tasks=tasks, suite_tasks=list(tasks))
    rows = [dataclasses.replace(row, task=HOSTILE) if row.task == "a" else row for row in outcomes({"a": 1, "b": 1, "g": 1})]
    store.save(record, root, rows)
    store.save(dataclasses.replace(record, method_name="dlp"), root, rows)
    (root / "figures").mkdir()
    (root / "figures" / "other.svg").write_text(
        f"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script>{HOSTILE}</svg>"
    )


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text inside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag in {"script", "style"}:
            self.inside.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem in {"script", "style"}:
            self.inside[-1] += data


def test_text_from_files_is_text_in_the_page(tmp_path: Path) -> None:
    hostile_results(tmp_path)
    item = SimpleNamespace(prompt=f"</script><script>alert(1)</script>{HOSTILE}", answer="<b>", choices=("<i>", "<!--"))
    records, problems = store.load_all(tmp_path)
    assert problems == []
    reader = store.OutcomeReader(tmp_path)
    others = {"other": (tmp_path / "figures" / "other.svg").read_text()}
    page = html.page(group(records, reader), reader, lambda suite, task: [item], others=others)
    plain = html.page([], reader, lambda suite, task: [])
    shape = [tag for tag, _ in Elements(page).found]
    assert shape == [tag for tag, _ in Elements(plain).found]  # the same elements whatever the records hold
    assert "img" not in shape
    assert "svg" not in shape
    data = data_of(page)
    (one,) = data["groups"]
    assert HOSTILE in one["tasks"]
    assert {row["method"] for row in one["rows"]} == {"<!--<script>", "dlp"}
    assert "<script>" in one["figures"]["other"]  # shown as an image, in which no script runs
    assert unpacked(one["questions"][HOSTILE])["items"][0][0] == item.prompt
    raw = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert raw
    assert "<" not in raw[1]


def test_the_page_runs_its_own_scripts_only(results: Path) -> None:
    records, _ = store.load_all(results)
    reader = store.OutcomeReader(results)
    page = Elements(html.page(group(records, reader), reader, lambda suite, task: []))
    (policy,) = [attrs["content"] for tag, attrs in page.found if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    assert rules["default-src"] == ["'none'"]
    assert rules["img-src"] == ["data:"]
    kinds = [(tag, attrs.get("type")) for tag, attrs in page.found if tag in {"script", "style"}]
    for (tag, kind), text in zip(kinds, page.inside, strict=True):
        checksum = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        if kind is None:  # JSON is never run
            assert f"'sha256-{checksum}'" in rules[f"{tag}-src"]
    assert len(rules["script-src"]) == 2
    assert not any(source.startswith("'unsafe") for sources in rules.values() for source in sources)
    for tag, attrs in page.found:
        assert not [name for name in attrs if name.startswith("on") or name == "style"], tag
    script = page.inside[-1]
    assert "innerHTML" not in script
    assert "insertAdjacentHTML" not in script


def test_methods_stand_in_groups_and_columns_can_be_chosen(results: Path) -> None:
    saved(results, "ties", {"a": 0.2, "b": 0.3, "g": 0.1})
    record = next(record for record in store.load_all(results)[0] if record.method_name == "base")
    assert group_of(dataclasses.replace(record, method={"method": "base"})).key == "reference"
    assert group_of(dataclasses.replace(record, method={"method": "of_another_package"})) == OTHER
    shipped = {load_method_spec(name).method for name in available_presets()}
    known = [name for one in method_facts().groups for name in one.classes]
    assert set(known) == shipped  # every shipped method has a group, and only one
    assert len(known) == len(set(known))
    assert set(method_facts().clone_of) | set(method_facts().clone_of.values()) <= set(available_presets())
    records, _ = store.load_all(results)
    reader = store.OutcomeReader(results)
    data = data_of(html.page(group(records, reader), reader, lambda suite, task: []))
    assert [key for key, _ in data["kinds"]] == [*(one.key for one in method_facts().groups), "other"]
    assert [one["key"] for one in data["columns"] if one["hidden"]] == ["gen_bleu", "gen_rouge1", "latency.ttft_ratio"]


def test_a_large_page_holds_fewer_questions_and_says_so(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, _ = store.load_all(results)
    reader = store.OutcomeReader(results)
    (one,) = data_of(html.page(group(records, reader), reader, lambda suite, task: []))["groups"]
    whole = sum(map(len, one["questions"].values()))
    monkeypatch.setattr(html, "MOST_PACKED", whole - 1)
    (one,) = data_of(html.page(group(records, reader), reader, lambda suite, task: []))["groups"]
    task = unpacked(one["questions"]["g"])
    assert task["num"] < task["total"] == 60
    assert sum(map(len, one["questions"].values())) < whole


def test_commands_write_page_and_figures(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "html", "--out", str(results)]) == 0
    assert data_of((results / "index.html").read_text())["groups"][0]["suite"] == "toy"
    assert main(["report", "figures", "--out", str(results), "--suite", "toy"]) == 0
    drawn = {path.name for path in (results / "figures").iterdir()}
    assert {"toy_radar.svg", "toy_radar.png"} <= drawn
    capsys.readouterr()
    for action in ("html", "figures"):
        assert main(["report", action, "--out", str(results / "nothing")]) == 2
        assert "holds no results" in capsys.readouterr().err
    store.samples_path(next(store.iterate(results))).write_bytes(b"damaged")
    assert main(["report", "validate", "--out", str(results), "--suite", "toy"]) == 1
    assert "checksum" in capsys.readouterr().err


def test_pictures_without_their_numbers_are_left_out(results: Path) -> None:
    records, _ = store.load_all(results)
    load = lambda record: store.load_samples(store.record_path(record, results), record)  # noqa: E731
    assert set(figures.figures(records, load)) == {"radar"}  # neither latency nor routing was kept
    assert figures.figures([], load) == {}


def test_the_schema_fits_the_records(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    raw = json.loads(to_json(make_record()))
    validator.validate(raw)
    for damage in ({"seed": "0"}, {"unknown": 1}, {"status": "maybe"}, {"schema_version": 99}):
        assert not validator.is_valid(raw | damage)
    committed = Path(__file__).resolve().parents[2] / "docs" / "record.schema.json"
    assert json.loads(committed.read_text()) == schema, "run: dlplora report schema > docs/record.schema.json"
    for path in store.iterate(committed.parents[1] / "results", "nano"):
        assert isinstance(read_record(path), Record)
        validator.validate(json.loads(path.read_text()))


def test_reporting_works_without_deep_learning_packages(results: Path) -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'transformers', 'peft', 'lightning', 'datasets', 'lm_eval'}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from dlplora.cli.main import main\n"
        f"root = {str(results)!r}\n"
        "for action in (['build', '--readme', root + '/none'], ['validate'], ['figures'], ['list']):\n"
        "    assert main(['report', *action, '--suite', 'toy', '--out', root]) == 0, action\n"
        "for action in ('html', 'all'):\n"
        "    assert main(['report', action, '--out', root]) == 0, action\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(AGGREGATES)
    assert (results / "tables" / "toy.md").is_file()


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif("DLPLORA_FRESH_ENVIRONMENT" not in os.environ, reason="installs packages: set DLPLORA_FRESH_ENVIRONMENT=1 to run it")
def test_reporting_works_in_a_fresh_environment_without_torch(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [python, "-m", "pip", "install", "-q", "-c", root / "constraints.txt"]
    subprocess.run([*pip, "numpy", "scipy", "pyarrow", "matplotlib", "sacrebleu", "pydantic", "pyyaml"], check=True)
    subprocess.run([*pip, "--no-deps", "-e", root], check=True)
    assert subprocess.run([python, "-c", "import torch"], stderr=subprocess.DEVNULL).returncode != 0
    for records in ("runs", "bench"):  # tables of quality take their ratios from the latency record
        shutil.copytree(root / "results" / records, tmp_path / "results" / records)
    command = [python, "-m", "dlplora.cli.main", "report", "all", "--readme", "none", "--out", "results"]
    subprocess.run(command, check=True, cwd=tmp_path)
    for path in (root / "results" / "tables").glob("nano*"):
        assert (tmp_path / "results" / "tables" / path.name).read_bytes() == path.read_bytes(), path.name
