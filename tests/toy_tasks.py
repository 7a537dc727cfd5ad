"""Two or three small local tasks as JSONL, for tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path

NAMES = ("colors", "pets", "echo")


def write_tasks(root: Path, num_train: int = 48, num_test: int = 8) -> Path:
    """``colors`` and ``pets`` are multiple choice, ``echo`` (longer) is generation."""
    rng = random.Random(7)
    for name in NAMES:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, num in (("train", num_train), ("test", num_test)):
            with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as handle:
                for _ in range(num):
                    handle.write(json.dumps(_row(name, rng)) + "\n")
    return root


def _row(name: str, rng: random.Random) -> dict[str, object]:
    who, thing = rng.choice(["Mia", "Leo", "Ann", "Tom"]), rng.choice(["plum", "pear", "box", "tree"])
    if name == "colors":
        return {"question": f"what is the {thing} ? red blue\nAnswer:", "choices": ["red", "blue"], "answer": int(thing in {"box", "tree"})}
    if name == "pets":
        return {"question": f"{who} sees a {thing} . cat dog\nAnswer:", "choices": ["cat", "dog"], "answer": int(who in {"Mia", "Leo"})}
    return {
        "question": f"{who} likes the {thing} . who likes what in the tree and in the box ?\nAnswer:",
        "answer": f"{who} likes the {thing}",
    }
