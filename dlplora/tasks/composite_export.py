"""Composites of local tasks, and files of ready-made composites, as lm-eval YAML files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlplora.tasks import lm_eval_dir
from dlplora.tasks.composite import READINGS, SIZES
from dlplora.tasks.composite_metrics import TOTALS
from dlplora.tasks.composite_rows import is_composite_file, read_composites
from dlplora.tasks.types import Task

PREFIX = "dlplora_local_composite_"
TOKENS_AN_ANSWER = 64


def composite_folders(root: Path, names: Sequence[str] = ("all",)) -> list[str]:
    """Those of the named folders (``["all"]``: of all) that hold ready-made composites, sorted."""
    found = [path.parent.name for path in sorted(root.glob("*/test.jsonl")) if is_composite_file(path)]
    return [name for name in found if name in names or list(names) == ["all"]]


def composite_configs(tasks: Sequence[Task], root: Path, made: Sequence[str]) -> dict[str, dict[str, Any]]:
    """File name -> what lm-eval reads: every reading and n that the tasks suffice for, and one task for each file of composites.

    Args:
        tasks: Local tasks with test rows.
        root: Folder of the rows.
        made: Folders of ready-made composites.
    """
    configs: dict[str, dict[str, Any]] = {}
    for reading in READINGS:
        usable = [task.name for task in tasks if reading != "serial" or "train" in task.rows]
        for n in SIZES:
            if n <= len(usable):
                source = {"tasks": usable, "reading": reading, "n": n}
                configs[f"_composite_{reading}_{n}"] = _config(f"{PREFIX}{reading}_{n}", source, usable, root, n, reading)
    if configs:
        group = {"group": PREFIX.rstrip("_"), "task": [config["task"] for config in configs.values()], "metadata": {"version": 1.0}}
        configs["_composite_group"] = group
    for name in made:
        rows = read_composites(root / name / "test.jsonl")
        inside = sorted({part.task for row in rows for part in row.parts})
        configs[name] = _config(f"dlplora_local_{name}", {"rows": name}, inside, root, max(len(row.parts) for row in rows), "serial")
    return configs


def _config(name: str, source: dict[str, Any], tasks: Sequence[str], root: Path, n: int, reading: str) -> dict[str, Any]:
    metrics = [*TOTALS, *(f"exact_match_{task}" for task in tasks)]
    alone = reading == "mixture"
    return {
        "include": str(lm_eval_dir() / "local_composite" / "_composite.yaml"),
        "task": name,
        "dataset_kwargs": {**source, "data_root": str(root.resolve())},
        "generation_kwargs": {
            "do_sample": False,
            "max_gen_toks": 128 if alone else TOKENS_AN_ANSWER * n,
            "until": ["\n"] if alone else ["\n\n"],
        },
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
        "metadata": {"version": 1.0},
    }
