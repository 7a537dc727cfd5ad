"""Outcomes of single questions: written with the record, read back, tied to it by checksum."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dlplora.errors import RecordError
from dlplora.evaluation.outcomes import outcomes_of, standard_errors
from dlplora.reporting import store
from dlplora.reporting.samples import Outcome, read_samples, write_samples
from dlplora.reporting.schema import read_record
from tests.unit.test_records import make_record

OUTCOMES = [
    Outcome(task="b", question=1, metrics={"acc": 0.0, "acc_norm": 1.0}, choice=2, routing=[(0, {"x": 1.0})]),
    Outcome(task="b", question=0, metrics={"acc": 1.0, "acc_norm": 1.0}, choice=0, routing=[(0, {"x": 0.75, "y": 0.25}), (12, {"y": 1.0})]),
    Outcome(task="g", question=0, metrics={"exact_match": 1.0, "rougeL": 0.5}, answer="ein Satz. „Ja“", bleu=list(range(10))),
]


def test_outcomes_survive_their_file(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.parquet", OUTCOMES)
    read = read_samples(tmp_path / "a.parquet")
    assert list(read) == ["b", "g"]
    assert read["b"].questions.tolist() == [0, 1]
    assert read["b"].metrics["acc"].tolist() == [1.0, 0.0]
    assert read["b"].choice == [0, 2]
    assert read["b"].bleu is None
    assert [json.loads(text or "null") for text in read["b"].routing] == [
        [[0, {"x": 0.75, "y": 0.25}], [12, {"y": 1.0}]],
        [[0, {"x": 1.0}]],
    ]
    assert set(read["g"].metrics) == {"exact_match", "rougeL"}
    assert read["g"].answer == ["ein Satz. „Ja“"]
    assert read["g"].bleu is not None
    assert read["g"].bleu.tolist() == [list(range(10))]
    assert read["g"].routing == [None]
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize(
    "text", ["[[[", "[" * 100_000, "5", "[5]", '[["a", {"x": 1}]]', '[[0, {"x": "y"}]]', '[[0, {"x": NaN}]]', '{"a": 1}']
)
def test_routing_that_is_none_names_the_file(text: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    write_samples(path, OUTCOMES)
    table = pq.read_table(path)
    column = pa.array([text] * table.num_rows)
    pq.write_table(table.set_column(table.column_names.index("routing"), "routing", column), path)
    rows = read_samples(path)["b"]
    with pytest.raises(RecordError) as caught:
        rows.parsed_routing(str(rows.routing[0]))
    assert f"{path}: column 'routing'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_names_its_outcomes(tmp_path: Path) -> None:
    path = store.save(make_record(), tmp_path, OUTCOMES)
    record = read_record(path)
    samples = store.load_samples(path, record, texts=False)
    assert samples is not None
    assert list(samples) == ["b", "g"]
    assert store.load_samples(path, dataclasses.replace(record, samples_sha256=None)) is None
    store.samples_path(path).write_bytes(b"PAR1 something else")
    with pytest.raises(RecordError, match="checksum"):
        store.load_samples(path, record)
    store.samples_path(path).unlink()
    with pytest.raises(RecordError, match="samples_sha256"):
        store.load_samples(path, record)


@pytest.mark.parametrize("content", [b"", b"PAR1 not parquet PAR1", b"{}"])
def test_damaged_outcomes_are_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(RecordError, match=r"x\.parquet: cannot be read") as caught:
        read_samples(tmp_path / "x.parquet")
    assert "\n" not in str(caught.value)


def test_records_of_version_1_are_read(tmp_path: Path) -> None:
    path = store.save(make_record(), tmp_path)
    raw = json.loads(path.read_text())
    del raw["training_tokens"], raw["samples_sha256"]
    path.write_text(json.dumps(raw | {"schema_version": 1}))
    record = read_record(path)
    assert record.training_tokens is None
    assert record.samples_sha256 is None


def test_outcomes_from_logged_samples() -> None:
    class Result:
        samples = {
            "dlplora_toy_m": [
                {"doc_id": 4, "filter": "none", "acc": 1.0, "acc_norm": 0.0, "filtered_resps": [(-3.0, False), (-1.0, True)]},
                {"doc_id": 4, "filter": "other", "acc": 0.0, "acc_norm": 0.0, "filtered_resps": [(-3.0, False), (-1.0, True)]},
            ],
            "dlplora_toy_g": [
                {"doc_id": i, "filter": "none", "exact_match": float(i), "bleu": ("a b c d", "a b c d"), "filtered_resps": ["a b c d"]}
                for i in range(2)
            ],
        }

    found = outcomes_of(Result(), "dlplora_toy_", {("dlplora_toy_m", 4): [(0, {"e": 1.0})]})  # type: ignore[arg-type]
    assert [(one.task, one.question, one.choice, one.answer) for one in found] == [
        ("m", 4, 1, None), ("g", 0, None, "a b c d"), ("g", 1, None, "a b c d"),
    ]  # fmt: skip
    assert found[0].routing == [(0, {"e": 1.0})]
    assert found[1].bleu == [4, 4, 4, 3, 2, 1, 4, 3, 2, 1]
    errors = standard_errors(found, 50)
    assert errors["m"]["acc"] is None
    assert errors["g"]["exact_match"] == pytest.approx(0.5)
    assert errors["g"]["bleu"] == 0.0
