"""Start-up hook of dlplora: lm-eval learns of the model ``dlplora`` and of our tasks when it is imported, and not before.

Python runs this module at every start (``dlplora_lm_eval.pth``), so it imports nothing but what Python has loaded by then. It waits for
four modules of lm-eval; what is done with them is in ``dlplora.lm_eval.plugin``. ``DLPLORA_NO_LM_EVAL_HOOK=1`` turns it off.
"""

import os
import sys

WATCHED = ("lm_eval.models", "lm_eval.tasks", "lm_eval._cli", "lm_eval.evaluator")
SWITCH = "DLPLORA_NO_LM_EVAL_HOOK"


class Finder:
    """Leaves the finding of modules to the other finders, and extends the watched ones once they have run."""

    def __init__(self):
        self.searching = set()

    def find_spec(self, name, path=None, target=None):
        """The specification of a watched module as the others find it; None for every other module."""
        if name not in WATCHED or name in self.searching:
            return None
        self.searching.add(name)
        try:
            found = (finder.find_spec(name, path, target) for finder in sys.meta_path if hasattr(finder, "find_spec"))
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self.searching.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            extend_after_loading(spec.loader)
        return spec


def extend_after_loading(loader):
    """Have this one loader hand its module to dlplora after it has run. A loader that takes no attributes is left alone."""
    run = loader.exec_module

    def exec_module(module):
        run(module)
        try:
            from dlplora.lm_eval.plugin import extend
        except ImportError:  # dlplora was removed, this file was not
            return
        extend(module)

    try:
        loader.exec_module = exec_module
    except AttributeError:
        return


if os.environ.get(SWITCH, "0") in ("", "0"):
    sys.meta_path.insert(0, Finder())
