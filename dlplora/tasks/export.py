"""Local tasks as lm-eval YAML files, for our command and for stock ``lm_eval --include_path``."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dlplora.atomic import write_together
from dlplora.tasks import lm_eval_dir
from dlplora.tasks.composite_export import composite_configs, composite_folders
from dlplora.tasks.local import ENV_ROOT, data_root, local_suite, readable_tasks
from dlplora.tasks.types import Task

PREFIX = "dlplora_local_"
GROUP = "dlplora_local"


def rows_sha256(root: str | None, task: str) -> str:
    """Checksum over the files of one local task, in hexadecimal."""
    digest = hashlib.sha256()
    for split in ("train", "test"):
        path = data_root(root) / task / f"{split}.jsonl"
        if path.is_file():
            digest.update(f"{split}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def task_config(task: Task, root: str | None) -> dict[str, Any]:
    """What lm-eval reads about one local task; the shared part is included from this package.

    Generated answers end at the first newline, or at an empty line if some reference answer has several lines.
    """
    config: dict[str, Any] = {
        "include": str(lm_eval_dir() / "local" / f"_{task.kind}.yaml"),
        "task": f"{PREFIX}{task.name}",
        "dataset_kwargs": {"task": task.name, "data_root": str(data_root(root).resolve())},
        "metadata": {"version": 1.0, "rows_sha256": rows_sha256(root, task.name)},
    }
    if "train" in task.rows:
        config["fewshot_split"] = "train"
    if task.kind == "gen" and any("\n" in item.answer for item in task.rows.get("test", ())):
        config["generation_kwargs"] = {"do_sample": False, "max_gen_toks": 128, "until": ["\n\n"]}
    return config


def export_local(names: Sequence[str], root: str | None, folder: str | os.PathLike[str]) -> list[Path]:
    """Write one YAML file per task, the group ``dlplora_local``, and composites of the tasks (``composite_export``).

    Args:
        names: Task names; ``["all"]`` takes every task of the folder.
        root: Folder of the rows; None reads ``DLPLORA_DATA``.
        folder: Made if it does not exist.

    Returns:
        The files written.

    Raises:
        TaskError: If rows are missing or malformed; nothing is written then.
    """
    made = composite_folders(data_root(root), names)
    tasks = [task for task in local_suite([name for name in names if name not in made], root).tasks if "test" in task.rows]
    configs = {task.name: task_config(task, root) for task in tasks}
    target = Path(folder)
    group = {"group": GROUP, "task": [config["task"] for config in configs.values()], "metadata": {"version": 1.0}}
    files = {**configs, "_group": group, **composite_configs(tasks, data_root(root), made)}
    texts = {target / f"{name}.yaml": yaml.safe_dump(one, sort_keys=False, allow_unicode=True) for name, one in files.items()}
    write_together(texts)
    return list(texts)


@contextmanager
def local_tasks(names: Sequence[str] | None = None, root: str | None = None) -> Iterator[Path | None]:
    """A temporary folder of YAML files of local tasks, for the time of the block.

    Args:
        names: Task names; None takes those of the data folder that can be read, and the rest silently not: a broken file must not
            stop an evaluation that does not use it.
        root: Folder of the rows; None reads ``DLPLORA_DATA``, and without it there are no local tasks.

    Yields:
        The folder, or None if there are no local tasks.
    """
    if root is None and names is None and not Path(os.environ.get(ENV_ROOT) or "\0").is_dir():
        yield None
        return
    wanted = [*readable_tasks(root), *composite_folders(data_root(root))] if names is None else list(names)
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="dlplora_tasks_") as folder:
        export_local(wanted, root, folder)
        yield Path(folder)
