"""Writes ``composite.json``: one frozen example of every reading and n. ``python tests/golden/composite.py``."""

from __future__ import annotations

import json
from pathlib import Path

from dlplora.tasks.composite import READINGS, SIZES, composite_row, composites
from dlplora.tasks.registry import get_suite

KEYS = ("task", "question", "answer", "answer_form")


def examples() -> dict[str, dict[str, object]]:
    """The first composite of each."""
    rows = {f"{reading}_{n}": composite_row(composites(get_suite("nano"), reading, n, 2)[0]) for reading in READINGS for n in SIZES}
    return {name: {key: row[key] for key in KEYS} for name, row in rows.items()}


if __name__ == "__main__":
    Path(__file__).with_suffix(".json").write_text(json.dumps(examples(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
