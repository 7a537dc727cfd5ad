"""The ``lm_eval`` / ``lm-eval`` command: lm-eval's own, with the model ``dlplora`` and our tasks known to it.

lm-eval 0.4.13 discovers no plug-ins, so this command registers ours and hands over to ``lm_eval.__main__:cli_evaluate``;
an lm-eval that reads the entry points of group ``lm_eval.models`` finds the same class by itself. Everything else that
``lm_eval`` can do (other models, ``run``, ``ls``, ``validate``, the old flags) passes through untouched.

``python -m dlplora.lm_eval`` is the same command where another package owns the console script.
"""

from __future__ import annotations

import argparse
import inspect
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dlplora.errors import DLPLoRAError, nearest
from dlplora.lm_eval import CACHE_REFUSAL

MODEL_NAME = "dlplora"
MODEL_TARGET = "dlplora.lm_eval.model:DLPLoRALM"
TASK_PREFIX = "dlplora_"


def register() -> None:
    """Make ``--model dlplora`` (and ``lm_eval.simple_evaluate("dlplora", ...)``) known to lm-eval. Safe to call twice."""
    import lm_eval.models  # noqa: F401  (fills the registry; a newer lm-eval also reads our entry point here)
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=MODEL_TARGET)


@contextmanager
def tasks_included(*, include_defaults: bool = True) -> Iterator[None]:
    """While open, every ``TaskManager`` also knows our tasks and those of the folder ``DLPLORA_DATA``; lm-eval has no hook for that.

    Our folder is read before the user's ``--include_path``, so a user's task of the same name wins.

    Args:
        include_defaults: False leaves lm-eval's thousands of own tasks unread, which saves most of its start-up time.
    """
    from lm_eval.tasks import TaskManager

    from dlplora.tasks import lm_eval_dir
    from dlplora.tasks.export import local_tasks

    original: Callable[..., None] = TaskManager.__init__
    signature = inspect.signature(original)

    def with_ours(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments.get("include_path") or []
        paths = list(given) if isinstance(given, (list, tuple)) else [given]
        ours = lm_eval_dir()
        if all(Path(path).resolve() not in {ours, *ours.parents} for path in paths):
            paths[:0] = [ours] if local is None else [ours, local]
        bound.arguments["include_path"] = paths
        if not include_defaults:
            bound.arguments["include_defaults"] = False
        original(*bound.args, **bound.kwargs)

    with ExitStack() as stack:
        local = stack.enter_context(local_tasks())
        TaskManager.__init__ = with_ours  # type: ignore[method-assign]
        try:
            yield
        finally:
            TaskManager.__init__ = original  # type: ignore[method-assign]


def _peek(argv: Sequence[str]) -> argparse.Namespace:
    """The few options this wrapper looks at; lm-eval's own parser has the last word on all of them."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--model", "-M")
    parser.add_argument("--tasks", "-t", nargs="+", action="extend", default=[])
    parser.add_argument("--use_cache", "-c")
    parser.add_argument("--config", "-C")
    parser.add_argument("--include_path")
    parser.add_argument("--limit", "-L", type=float)
    try:
        return parser.parse_known_args(list(argv))[0]
    except argparse.ArgumentError:  # lm-eval reports it, in its own words
        return argparse.Namespace(model=None, tasks=[], use_cache=None, config=None, include_path=None, limit=None)


def _only_our_tasks(options: argparse.Namespace) -> bool:
    """Whether the command names nothing but our tasks, so that lm-eval's own need not be indexed."""
    names = [name for given in options.tasks for name in given.split(",") if name]
    plain = bool(names) and all(name.startswith(TASK_PREFIX) for name in names)
    return plain and options.config is None and options.include_path is None


def main(argv: Sequence[str] | None = None) -> int:
    """Run lm-eval's command line.

    Args:
        argv: Arguments without the program name; the process's own by default.

    Returns:
        0, or 2 after an error that bad input caused (one line on stderr). lm-eval's own exits pass through.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _peek(arguments)
    if options.model == MODEL_NAME and options.use_cache is not None:
        return _fail(CACHE_REFUSAL)
    if options.model == MODEL_NAME and options.limit is not None and not options.limit > 0:
        return _fail(f"--limit must be a positive number of questions a task, or a share of them below 1, got {options.limit:g}.")
    saved = sys.argv
    sys.argv = [saved[0] if saved else "lm_eval", *arguments]
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        from dlplora.lm_eval.distributed import shutdown_process_group

        with shutdown_process_group(), tasks_included(include_defaults=not _only_our_tasks(options)):
            cli_evaluate()
    except DLPLoRAError as error:
        return _fail(str(error))
    except ValueError as error:
        if not (_only_our_tasks(options) and str(error).startswith("Tasks not found")):
            raise
        return _fail(_unknown_task(str(error)))
    finally:
        sys.argv = saved
    return 0


def _unknown_task(message: str) -> str:
    """lm-eval's list of unknown tasks with the nearest of ours."""
    from lm_eval.tasks import TaskManager

    with tasks_included(include_defaults=False):
        known = [name for name in TaskManager().all_tasks if name.startswith(TASK_PREFIX)]
    unknown = [name.strip() for name in message.partition(":")[2].split(",")]
    hints = "".join(nearest(name, known) for name in unknown)
    return f"unknown task {', '.join(unknown)}.{hints} `dlplora tasks` lists the nano suite; local rows need DLPLORA_DATA."


def _fail(message: str) -> int:
    sys.stderr.write(f"lm_eval: {' '.join(message.split())}\n")
    return 2


def console_command_is_ours() -> tuple[bool, str]:
    """Whether ``lm_eval --model dlplora`` works when typed, and one sentence that says why or what to do (``dlplora doctor``).

    A later re-installation of lm-eval puts its own console script over ours.
    """
    scripts = sysconfig.get_path("scripts")
    found = shutil.which("lm_eval", path=scripts) or shutil.which("lm_eval")
    if found is None:
        return False, "no lm_eval command in this environment; use `python -m dlplora.lm_eval`, or install dlplora with pip."
    if b"dlplora.lm_eval.command" in Path(found).read_bytes():
        return True, f"{found} is dlplora's and knows --model dlplora."
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if MODEL_NAME in model_registry:
        return True, f"{found} is lm-eval's own and finds --model dlplora by entry point."
    return False, (
        f"{found} is lm-eval's own and does not know --model dlplora; use `python -m dlplora.lm_eval`, "
        "or put ours back with `pip install --force-reinstall --no-deps dlplora`."
    )
