"""What dlplora adds to lm-eval: the model ``dlplora``, our tasks, and one-line errors in the stock command.

The start-up hook of an installed dlplora calls ``extend`` with a module of lm-eval that was just imported. Nothing here imports torch. For
other models the only change is that our tasks are known.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

from dlplora.lm_eval.commit import note_commit_quietly
from dlplora.lm_eval.task_index import MODEL_NAME, current_index

logger = logging.getLogger(__name__)

MODEL_TARGET = "dlplora.lm_eval.model:DLPLoRALM"


def extend(module: ModuleType) -> None:
    """Extend a module of lm-eval that has been imported. Safe to call twice; a module that has nothing to extend is left alone."""
    if module.__name__ == "lm_eval.models":
        _register()
    elif module.__name__ == "lm_eval.tasks" and hasattr(module, "TaskManager"):
        _include_tasks(module.TaskManager)
    elif module.__name__ == "lm_eval._cli" and hasattr(module, "HarnessCLI"):
        _guard_command(module.HarnessCLI)
    elif module.__name__ == "lm_eval.evaluator" and hasattr(module, "simple_evaluate"):
        note_commit_quietly(module)


def activate() -> None:
    """Extend lm-eval in this process, with or without the start-up hook."""
    import lm_eval._cli
    import lm_eval.models
    import lm_eval.tasks

    for module in (lm_eval.models, lm_eval.tasks, lm_eval._cli):
        extend(module)


def _register() -> None:
    """Register the model by name, not yet imported. An lm-eval that reads entry points has done so already."""
    from lm_eval.api import registry

    models = getattr(registry, "model_registry", None)
    if models is not None and MODEL_NAME not in models:
        models.register(MODEL_NAME, target=MODEL_TARGET)


def _extended(function: Callable[..., Any]) -> bool:
    return getattr(function, "_extended_by_dlplora", False)


def _include_tasks(manager: Any) -> None:
    """Make our tasks and those of the folder ``DLPLORA_DATA`` known to every task manager.

    Ours are read before the caller's ``include_path``, so a task of the caller's wins over one of ours of the same name.
    """
    original = manager.__init__
    signature = inspect.signature(original)
    if _extended(original) or not {"include_path", "include_defaults"} <= set(signature.parameters):
        return

    @functools.wraps(original)
    def with_ours(self: Any, *args: Any, **kwargs: Any) -> None:
        kind = current_index()
        if kind == "as called":
            original(self, *args, **kwargs)
            return
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments.get("include_path") or []
        paths = list(given) if isinstance(given, (list, tuple)) else [given]
        bound.arguments["include_path"] = _our_folders(paths, self) + paths
        if kind == "ours":
            bound.arguments["include_defaults"] = False
        original(*bound.args, **bound.kwargs)

    with_ours._extended_by_dlplora = True  # type: ignore[attr-defined]
    manager.__init__ = with_ours


def _our_folders(paths: list[Any], manager: Any) -> list[str]:
    """Folders to read in addition to ``paths``; the temporary one of local tasks lives as long as the manager."""
    from dlplora.tasks import lm_eval_dir
    from dlplora.tasks.export import local_tasks

    ours = lm_eval_dir()
    if any(Path(path).resolve() in {ours, *ours.parents} for path in paths):
        return []
    stack = ExitStack()
    local = stack.enter_context(local_tasks())
    weakref.finalize(manager, stack.close)
    return [str(ours)] if local is None else [str(ours), str(local)]


def _guard_command(command: Any) -> None:
    """Have lm-eval's command run through ``dlplora.lm_eval.guard.guarded``, and its arguments through ``readable`` before."""
    original, parse = getattr(command, "execute", None), getattr(command, "parse_args", None)
    if original is None or parse is None or _extended(original):
        return

    @functools.wraps(parse)
    def parse_args(self: Any) -> Any:
        from dlplora.lm_eval.guard import readable

        sys.argv[1:] = readable(sys.argv[1:])
        return parse(self)

    @functools.wraps(original)
    def execute(self: Any, args: Any) -> None:
        from dlplora.lm_eval.guard import guarded

        guarded(args, lambda: original(self, args))

    execute._extended_by_dlplora = True  # type: ignore[attr-defined]
    command.execute, command.parse_args = execute, parse_args
