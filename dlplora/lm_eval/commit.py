"""lm-eval stores the commit of the working folder with its results. Outside a git repository, git then prints an error of its own.

Evaluations of our model note the same commit without that message; those of other models are unchanged. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

from dlplora.lm_eval.task_index import MODEL_NAME


def note_commit_quietly(evaluator: ModuleType) -> None:
    """Wrap ``simple_evaluate`` of lm-eval's evaluator. Safe to call twice."""
    original = evaluator.simple_evaluate
    if getattr(original, "_extended_by_dlplora", False):
        return

    @functools.wraps(original)
    def simple_evaluate(*args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get("model")
        theirs = getattr(sys.modules.get("lm_eval.loggers.utils"), "get_git_commit_hash", None)
        if not _is_ours(model) or theirs is None or getattr(evaluator, "get_git_commit_hash", None) is not theirs:
            return original(*args, **kwargs)
        from dlplora.lm_eval.evaluate import replaced

        with replaced(evaluator, "get_git_commit_hash", commit):
            return original(*args, **kwargs)

    simple_evaluate._extended_by_dlplora = True  # type: ignore[attr-defined]
    evaluator.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]


def _is_ours(model: Any) -> bool:
    return model == MODEL_NAME if isinstance(model, str) else any(kind.__module__.startswith("dlplora.") for kind in type(model).__mro__)


def commit() -> str | None:
    """What lm-eval's ``get_git_commit_hash`` returns; git's own messages are not shown."""
    from lm_eval.loggers.utils import get_commit_from_path

    try:
        described = subprocess.run(["git", "describe", "--always"], capture_output=True, check=True)
    except (subprocess.CalledProcessError, FileNotFoundError):
        return get_commit_from_path(os.getcwd())
    return described.stdout.strip().decode()
