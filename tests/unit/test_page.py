"""Figures, page and schema made from records."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dlplora.cli.main import main
from dlplora.reporting import figures, html, store
from dlplora.reporting.groups import group
from dlplora.reporting.reported import reported
from dlplora.reporting.schema import AGGREGATES, Record, json_schema, read_record, to_json
from tests.unit.test_comparison import saved
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
    for word in ("http-equiv", '<link rel="stylesheet', " src="):
        assert word not in page


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
    subprocess.run([*pip, "numpy", "scipy", "statsmodels", "pyarrow", "matplotlib", "sacrebleu", "pydantic", "pyyaml"], check=True)
    subprocess.run([*pip, "--no-deps", "-e", root], check=True)
    assert subprocess.run([python, "-c", "import torch"], stderr=subprocess.DEVNULL).returncode != 0
    for records in ("runs", "bench"):  # tables of quality take their ratios from the latency record
        shutil.copytree(root / "results" / records, tmp_path / "results" / records)
    command = [python, "-m", "dlplora.cli.main", "report", "all", "--readme", "none", "--out", "results"]
    subprocess.run(command, check=True, cwd=tmp_path)
    for path in (root / "results" / "tables").glob("nano*"):
        assert (tmp_path / "results" / "tables" / path.name).read_bytes() == path.read_bytes(), path.name
