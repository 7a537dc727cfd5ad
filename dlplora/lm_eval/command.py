"""lm-eval's command with ``--model dlplora``: options are checked before anything is loaded, and bad input is one line.

``guarded`` wraps the stock command, which the start-up hook extends (``dlplora.lm_eval.plugin``): ``lm_eval``, ``lm-eval``,
``python -m lm_eval`` and ``accelerate launch -m lm_eval``. ``main`` is ``python -m dlplora.lm_eval``, which needs no hook. All other uses
of lm-eval (other models, ``ls``, ``validate``) are unchanged.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from dlplora.lm_eval.guard import Refused
from dlplora.lm_eval.plugin import activate

HOOK = "_dlplora_lm_eval"
REINSTALL = "`pip install --force-reinstall --no-deps lm-eval` puts lm-eval's own back."


def main(argv: Sequence[str] | None = None) -> int:
    """Run lm-eval's command line.

    Args:
        argv: Arguments without the program name; the process's own by default.

    Returns:
        0, or 2 after an error that bad input caused (one line on stderr). lm-eval's own exits pass through.
    """
    saved = sys.argv
    sys.argv = [saved[0] if saved else "lm_eval", *(sys.argv[1:] if argv is None else argv)]
    try:
        activate()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except Refused:
        return 2
    finally:
        sys.argv = saved
    return 0


def hook_state() -> tuple[bool, str]:
    """Whether the stock command knows ``--model dlplora``, and one sentence that says so or what to do (``dlplora doctor``)."""
    found = shutil.which("lm_eval", path=sysconfig.get_path("scripts")) or shutil.which("lm_eval")
    if found is None:
        return False, f"no lm_eval command in this environment; `python -m lm_eval` works. {REINSTALL}"
    if b"dlplora.lm_eval.command" in Path(found).read_bytes():
        return False, f"{found} was written by an older dlplora. {REINSTALL}"
    if any(type(finder).__module__ == HOOK for finder in sys.meta_path):
        return True, f"{found} knows --model dlplora."
    if importlib.util.find_spec(HOOK) is not None:
        return False, f"{found} does not know --model dlplora: DLPLORA_NO_LM_EVAL_HOOK is set. `python -m dlplora.lm_eval` does."
    return False, f"{found} does not know --model dlplora: reinstall dlplora with pip or uv, or use `python -m dlplora.lm_eval`."
