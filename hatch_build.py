"""What a wheel holds beyond the package ``dlplora``, in a normal and in an editable installation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class WheelFiles(BuildHookInterface[Any]):
    """Puts three things in their places.

    * The start-up hook for lm-eval beside the package, where Python looks for ``.pth`` files. An editable installation has it too.
    * ``baselines/*.py`` into ``dlplora/baselines``: no distribution but ours should own a name as common as ``baselines``.
    * ``configs`` into ``dlplora/_configs``.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called once before a wheel is built; ``version`` is ``standard`` or ``editable``."""
        root = Path(self.root)
        startup = {str(root / "startup" / name): name for name in ("dlplora_lm_eval.pth", "_dlplora_lm_eval.py")}
        if version == "editable":
            build_data["force_include_editable"] = startup
            return
        methods = [path for path in sorted((root / "baselines").glob("*.py")) if path.name != "__init__.py"]
        build_data["force_include"] |= {
            **startup,
            **{str(path): f"dlplora/baselines/{path.name}" for path in methods},
            str(root / "configs"): "dlplora/_configs",
        }
