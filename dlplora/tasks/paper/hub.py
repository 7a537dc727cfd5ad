"""Rows of a public data set, from the hub or from its cache, through ``huggingface_hub``."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dlplora.errors import TaskError
from dlplora.tasks.local import ENV_ROOT
from dlplora.tasks.paper.sources import Source

ENOUGH = 6
"""Rows read for each one wanted; the rest make up for repeated and unusable ones without a pass over 300 000 articles."""


CONVERTED = "refs/convert/parquet"
"""The branch that the hub itself fills with Parquet files of a data set, ``config/split/0000.parquet``."""


def snapshot(source: Source, revision: str | None = None) -> tuple[Path, str]:
    """The local folder of a data set at its revision, or at another one, and the commit that is.

    Raises:
        TaskError: If it is neither in the cache nor reachable; one line with what was looked for, where, and both ways to supply it.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from requests.exceptions import RequestException

    revision = revision or source.revision
    wanted = ["README.md", f"*{source.config}*" if source.config else "data/*"]
    try:
        folder = snapshot_download(source.hub_id, repo_type="dataset", revision=revision, allow_patterns=wanted)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, RequestException, OSError) as error:
        state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub did not answer: {str(error).splitlines()[0]}"
        raise TaskError(
            f"task '{source.name}': data set {source.hub_id} (revision {revision or 'newest'}) is not in the cache "
            f"{constants.HF_HUB_CACHE} and {state}. Either run once with a connection (unset HF_HUB_OFFLINE), or put "
            f"{source.name}/train.jsonl and {source.name}/test.jsonl into a folder and pass --data-root DIR or set {ENV_ROOT}."
        ) from error
    return Path(folder), Path(folder).name


def hub_rows(source: Source, split: str, num: int, seed: int) -> tuple[list[dict[str, Any]], str]:
    """Some rows of a split in our schema, and the commit of the data set.

    A repository that holds nothing but a loading script, which ``datasets`` no longer runs, is read from the hub's own conversion.

    Args:
        source: Which data set.
        split: Its split.
        num: Rows wanted in the end; a few times as many are read, drawn by ``seed``.
        seed: Of the draw.

    Raises:
        TaskError: If the data set is not available, lacks the split or a column, or holds no row of the task's kind.
    """
    table, commit = _table(source, split)
    indices = list(range(len(table)))
    random.Random(f"{source.name}/{split}/rows/{seed}").shuffle(indices)
    where = f"{source.hub_id}@{commit[:12]} split {split}"
    rows = list(_converted(source, table.select(sorted(indices[: ENOUGH * num])), where))
    if not rows:
        raise TaskError(f"{where}: no row can be used as {source.kind} of task '{source.name}'.")
    return rows, commit


def _table(source: Source, split: str) -> tuple[Any, str]:
    """All rows of a split as the hub has them, and their commit."""
    import datasets

    folder, commit = snapshot(source)
    try:
        return datasets.load_dataset(str(folder), source.config, split=split), commit
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
        unreadable = f"task '{source.name}': {source.hub_id}@{commit[:12]} cannot be read: {str(error).splitlines()[0]}"
        if source.revision is not None or source.config is None:  # a pin means these files and no others
            raise TaskError(unreadable) from error
    try:
        folder, commit = snapshot(source, CONVERTED)
    except TaskError as error:
        raise TaskError(f"{unreadable} Nor is there a conversion: {error}") from error
    files = sorted(str(path) for path in (folder / source.config / split).glob("*.parquet"))
    if not files:
        raise TaskError(f"{unreadable} Nor does its conversion at {commit[:12]} hold Parquet files in {source.config}/{split}.")
    return datasets.load_dataset("parquet", data_files={split: files}, split=split), commit


def _converted(source: Source, table: Any, where: str) -> Iterator[dict[str, Any]]:
    for raw in table:
        row = convert(source, raw, where)
        if row is not None:
            yield row


def _column(raw: Mapping[str, Any], path: str, where: str) -> Any:
    value: Any = raw
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise TaskError(f"{where}: column '{path}' is missing; found {', '.join(raw)}.")
        value = value[key]
    return value


def convert(source: Source, raw: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """One raw row in the schema of local files, or None if it is of the other kind, empty, or has no single right option."""
    question, answer = (_column(raw, path, where) for path in source.fields)
    if isinstance(answer, list):
        answer = answer[0] if answer else ""
    if source.name == "alpaca" and raw.get("input"):
        question = f"{question}\n{raw['input']}"
    if source.instruction:
        question = f"{source.instruction}\n{question}"
    if not str(question).strip() or not str(answer).strip():
        return None
    if source.kind == "gen":
        return {"question": str(question), "answer": str(answer), "task": source.name}
    options = [str(option) for option in _column(raw, "multiple_choice_targets", where)]
    right = [index for index, score in enumerate(_column(raw, "multiple_choice_scores", where)) if score == 1]
    if len(options) < 2 or len(right) != 1:
        return None
    return {"question": str(question), "choices": options, "answer": right[0], "task": source.name}
