"""Records against committed ones: verdicts at their limits, by hand, and the README's figures in the printed table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlplora.reporting.schema import Record, read_record, to_json
from dlplora.reporting.store import file_checksum, load_all, samples_path
from dlplora.reproduce import comparison
from dlplora.reproduce.comparison import Comparison, committed_records, compare, legend, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def committed() -> list[Record]:
    return [record for record in load_all(RESULTS, "nano")[0] if record.protocol_name == "nano"]


def of(committed: list[Record], method: str, seed: int = 0) -> Record:
    (found,) = [record for record in committed if (record.method_name, record.seed) == (method, seed)]
    return found


def copied(record: Record, root: Path, change: Callable[[dict[str, list[object]]], None] | None = None, **fields: object) -> Record:
    """The record with its outcomes under another results folder, some of them changed."""
    source = samples_path(RESULTS / "runs" / "nano" / f"{record.method_name}-{record.cell}-s{record.seed}.json")
    values = pq.read_table(source).to_pydict()
    if change is not None:
        change(values)
    target = root / "runs" / "nano" / f"{record.method_name}-{record.cell}-s{record.seed}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [(field.name, pa.string() if pa.types.is_dictionary(field.type) else field.type) for field in pq.read_schema(source)]
    )
    pq.write_table(pa.table(values, schema=schema), samples_path(target))
    changed = dataclasses.replace(record, samples_sha256=file_checksum(samples_path(target)), **fields)  # type: ignore[arg-type]
    target.write_text(to_json(changed))
    return read_record(target)


def flip(count: int) -> Callable[[dict[str, list[object]]], None]:
    """Change right to wrong, or wrong to right, for some multiple-choice questions."""

    def change(values: dict[str, list[object]]) -> None:
        rows = [i for i, value in enumerate(values["acc"]) if value is not None][:count]
        for row in rows:
            values["acc"][row] = 1.0 - float(values["acc"][row])  # type: ignore[arg-type]
            values["choice"][row] = 1 - min(int(values["choice"][row]), 1)  # type: ignore[call-overload]

    return change


def other_answers(count: int) -> Callable[[dict[str, list[object]]], None]:
    def change(values: dict[str, list[object]]) -> None:
        rows = [i for i, value in enumerate(values["answer"]) if value is not None][:count]
        for row in rows:
            values["answer"][row] = f"{values['answer'][row]} again"

    return change


def verdict(record: Record, root: Path, committed: list[Record]) -> Comparison:
    (found,) = compare([record], root, committed, RESULTS)
    return found


def test_the_same_answers_are_equal_whatever_made_them(committed: list[Record], tmp_path: Path) -> None:
    record = copied(of(committed, "dlp"), tmp_path, pool_hash="other", created="2030-01-01T00:00:00+00:00")
    found = verdict(record, tmp_path, committed)
    assert (found.verdict, found.num_questions, found.num_changed) == ("equal", 2600, 0)


@pytest.mark.parametrize(("count", "wanted"), [(26, "within"), (27, "differs")])
def test_one_question_in_a_hundred_may_flip(count: int, wanted: str, committed: list[Record], tmp_path: Path) -> None:
    found = verdict(copied(of(committed, "base"), tmp_path, flip(count)), tmp_path, committed)
    assert (found.verdict, found.num_changed) == (wanted, count)


def test_other_answers_that_are_as_wrong_are_within(committed: list[Record], tmp_path: Path) -> None:
    found = verdict(copied(of(committed, "base"), tmp_path, other_answers(500)), tmp_path, committed)
    assert (found.verdict, found.num_changed) == ("within", 500)


@pytest.mark.parametrize(
    ("key", "shift", "wanted"), [("gen_bleu", 0.9, "within"), ("gen_bleu", 1.1, "differs"), ("mcq_acc", 0.011, "differs")]
)
def test_no_score_may_move_by_more_than_a_point(key: str, shift: float, wanted: str, committed: list[Record], tmp_path: Path) -> None:
    record = of(committed, "multitask")
    moved = {**record.aggregates, key: (record.aggregates[key] or 0.0) + shift}
    assert verdict(copied(record, tmp_path, other_answers(1), aggregates=moved), tmp_path, committed).verdict == wanted


def test_what_has_no_committed_record_is_new(committed: list[Record], tmp_path: Path) -> None:
    record = of(committed, "base")
    for name, other in (("seed", 7), ("method_hash", "0" * 12), ("protocol_hash", "0" * 12), ("method_name", "mine")):
        changed = dataclasses.replace(record, samples_sha256=None, **{name: other})  # type: ignore[arg-type]
        assert verdict(changed, tmp_path, committed).verdict == "new"


def test_limited_records_are_compared_on_their_questions(committed: list[Record], tmp_path: Path) -> None:
    def first_two(values: dict[str, list[object]]) -> None:
        kept = [i for i, question in enumerate(values["question"]) if int(question) < 2]  # type: ignore[call-overload]
        for name in values:
            values[name] = [values[name][i] for i in kept]

    record = of(committed, "dlp")
    limited = copied(record, tmp_path, first_two, limit=2)
    path = tmp_path / "runs" / "nano" / f"dlp-{record.cell}-s0.json"
    scratch = tmp_path / "scratch" / "nano" / path.name
    scratch.parent.mkdir(parents=True)
    for file in (path, samples_path(path)):
        file.rename(scratch.with_suffix(file.suffix))
    found = verdict(limited, tmp_path, committed)
    assert (found.verdict, found.num_questions) == ("equal", 52)


def table_cells() -> dict[str, list[str]]:
    """Method -> accuracy and exact match with errors, from the main tables of nano without their marks; that of the most seeds counts."""
    text = (RESULTS / "tables" / "nano.md").read_text(encoding="utf-8").partition("## Protocol `nano_linear`")[0]
    tables = [part for part in text.split("\n\n") if part.startswith("| method | data it saw |")]
    assert len(tables) == 2
    rows = [line for part in reversed(tables) for line in part.splitlines() if line.startswith("| `")]
    cells = {row.split("`")[1]: [cell.strip(" *°").replace("*", "") for cell in row.split("|")[4:6]] for row in rows}
    return {name: found for name, found in cells.items() if all("±" in cell for cell in found)}


def test_the_table_shows_the_committed_figures_in_100_columns(committed: list[Record]) -> None:
    names = sorted({record.method_name for record in committed})
    records = [of(committed, name) for name in names]
    comparisons = compare(records, RESULTS, committed_records(RESULTS, records), RESULTS)
    text = table(comparisons, committed)
    assert max(map(len, [*text.splitlines(), *legend(comparisons).splitlines()])) <= 100
    rows = {line.split()[0]: line for line in text.splitlines()[2:]}
    assert list(rows) == names
    cells = table_cells()
    assert {"base", "oracle", "dlp"} <= set(cells)
    for name, (accuracy, exact) in ((name, cells[name]) for name in names):
        assert f" {accuracy} " in rows[name], name
        assert f" {exact} " in rows[name], name
    assert "mean of seeds 0, 1, 2" in text
    assert all(row.endswith("       0  equal") for row in rows.values())


def test_a_moved_seed_moves_the_mean(committed: list[Record]) -> None:
    record = of(committed, "base")
    moved = dataclasses.replace(record, aggregates={**record.aggregates, "mcq_acc": (record.aggregates["mcq_acc"] or 0.0) + 0.3})
    text = table([Comparison(record=moved, verdict="differs")], committed)
    seeds = [float(of(committed, "base", seed).aggregates["mcq_acc"] or 0.0) for seed in (0, 1, 2)]
    assert f"{100 * (sum(seeds) / 3 + 0.1):.1f} ±" in text


def test_records_of_all_seeds_have_a_column_for_it(committed: list[Record]) -> None:
    longest = max({record.method_name for record in committed}, key=len)
    records = [of(committed, longest, seed) for seed in (0, 1)]
    lines = table(compare(records, RESULTS, committed, RESULTS), committed).splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [[longest, "0"], [longest, "1"]]
    assert max(map(len, lines)) <= 100


def test_an_installation_without_a_clone_has_nothing_to_compare_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert comparison.committed_results() == RESULTS
    monkeypatch.setattr(comparison, "PACKAGE_ROOT", tmp_path / "dlplora")
    assert comparison.committed_results() is None
