"""The committed table of composites is what the committed records say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dlplora.errors import RecordError
from dlplora.reporting.composite_tables import SUITE, page, write_kv_policy
from dlplora.reporting.groups import latest
from dlplora.reporting.store import load_all

ROOT = Path(__file__).resolve().parents[2] / "results"


def test_tables_are_fresh(tmp_path: Path) -> None:
    records, problems = load_all(ROOT, SUITE)
    assert not problems
    assert page(latest(records)) == (ROOT / "tables" / "composite.md").read_text(encoding="utf-8")
    table = write_kv_policy(ROOT / "bench" / "kv_policy.json", tmp_path / "kv_policy.md")
    assert table.read_text() == (ROOT / "tables" / "kv_policy.md").read_text(encoding="utf-8")


def test_missing_records_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no records of suite 'nano_composite'"):
        page([])
    with pytest.raises(RecordError, match="cannot be read as a kv_policy benchmark"):
        write_kv_policy(tmp_path / "none.json", tmp_path / "table.md")
    shutil.copy(ROOT / "tables" / "kv_policy.md", tmp_path / "broken.json")
    with pytest.raises(RecordError, match=r"run `python -m benchmarks\.kv_policy run`"):
        write_kv_policy(tmp_path / "broken.json", tmp_path / "table.md")
