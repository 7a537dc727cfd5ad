"""lm-eval's command with our model: options are checked before anything loads, and user errors are one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dlplora.documents import parse_yaml, read_text
from dlplora.errors import ConfigError, DLPLoRAError, nearest, one_line
from dlplora.lm_eval import CACHE_REFUSAL
from dlplora.lm_eval.commit import note_commit_quietly
from dlplora.lm_eval.task_index import MODEL_NAME, task_index
from dlplora.lm_eval.versions import untested_version

TASK_PREFIX = "dlplora_"


class Refused(SystemExit):
    """Ends the command with exit code 2 after one line on standard error."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        sys.stderr.write(f"lm_eval: {one_line(message)}\n")


def guarded(arguments: Any, execute: Callable[[], None]) -> None:
    """Run a command of lm-eval.

    Args:
        arguments: What lm-eval's own parser read.
        execute: Runs the command.

    Raises:
        Refused: For an error that bad input caused, with exit code 2.
    """
    options = _options(arguments)
    ours = options.get("model") == MODEL_NAME
    only_ours = _only_our_tasks(options)
    if ours:
        _check(options)
    try:
        with ExitStack() as stack:
            if ours:
                from lm_eval import evaluator

                from dlplora.lm_eval.distributed import shutdown_process_group

                stack.enter_context(shutdown_process_group())
                note_commit_quietly(evaluator)
            if only_ours:
                stack.enter_context(task_index("ours"))
            execute()
    except DLPLoRAError as error:
        raise Refused(str(error)) from error
    except ImportError as error:
        note = untested_version() if ours else None
        if note is None:
            raise
        raise Refused(f"{note} It lacks what dlplora needs: {error}.") from error
    except ValueError as error:
        if not (only_ours and str(error).startswith("Tasks not found")):
            raise
        raise Refused(_unknown_task(str(error))) from error


def readable(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command with our model as lm-eval's parser takes them: mappings in ``--model_args`` become JSON.

    Raises:
        Refused: If a mapping is not JSON.
    """
    named = [value for option, value in zip(arguments, [*arguments[1:], ""], strict=True) if option in {"--model", "-M"}]
    named += [option.removeprefix("--model=") for option in arguments if option.startswith("--model=")]
    if named[-1:] != [MODEL_NAME]:
        return list(arguments)
    from dlplora.lm_eval.model_args import with_mappings_as_json

    try:
        return with_mappings_as_json(arguments)
    except DLPLoRAError as error:
        raise Refused(str(error)) from error


def _options(arguments: Any) -> dict[str, Any]:
    """Options of the command line; what is not given there is read from the file of ``--config``, as lm-eval does."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    path = given.get("config")
    if path is None or not Path(path).is_file():
        return given
    try:
        read = parse_yaml(read_text(path), str(path))
    except ConfigError:  # lm-eval reports it
        return given
    return {**read, **given} if isinstance(read, dict) else given


def _check(options: Mapping[str, Any]) -> None:
    """Refuse options that would waste a run or give wrong results."""
    if options.get("use_cache") is not None:
        raise Refused(CACHE_REFUSAL)
    limit = options.get("limit")
    if isinstance(limit, (int, float)) and not limit > 0:
        raise Refused(f"--limit must be a positive number of questions per task, or a share of them below 1, got {limit:g}.")


def _only_our_tasks(options: Mapping[str, Any]) -> bool:
    """Whether the command names nothing but our tasks, so that lm-eval's own need not be indexed."""
    given = options.get("tasks") or []
    names = [name for part in ([given] if isinstance(given, str) else given) for name in str(part).split(",") if name]
    return bool(names) and all(name.startswith(TASK_PREFIX) for name in names) and options.get("include_path") is None


def _unknown_task(message: str) -> str:
    """lm-eval's list of unknown tasks with the nearest of ours."""
    from lm_eval.tasks import TaskManager

    with task_index("ours"):
        known = [name for name in TaskManager().all_tasks if name.startswith(TASK_PREFIX)]
    unknown = [name.strip() for name in message.partition(":")[2].split(",")]
    hints = "".join(nearest(name, known) for name in unknown)
    return f"unknown task {', '.join(unknown)}.{hints} `dlplora tasks` lists the nano suite; local rows need DLPLORA_DATA."
