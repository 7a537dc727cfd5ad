"""How every figure looks and is written: one mid-grey ink on a transparent ground, so that light and dark pages both show it.

Colours: Okabe and Ito's palette, told apart by colour-blind readers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INK = "#7a7f87"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#999933")


def pyplot() -> Any:
    """Matplotlib's pyplot without a display, in the house style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings: Any = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK)
    plt.rcParams.update({**settings, "svg.fonttype": "none", "svg.hashsalt": "dlplora", "font.size": 9, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "legend.frameon": False, "figure.facecolor": "none", "axes.facecolor": "none"})
    return plt


def write_figures(figures: Mapping[str, Any], folder: Path, prefix: str) -> list[Path]:
    """Write figures as SVG and PNG, each atomically, and close them.

    Args:
        figures: Name -> figure.
        folder: Made if it does not exist.
        prefix: Put before the names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        for suffix in ("svg", "png"):
            path = folder / f"{prefix}_{name}.{suffix}"
            temporary = path.with_name(f".{path.name}.tmp")
            metadata = {"Date": None} if suffix == "svg" else {"Software": None}
            figure.savefig(temporary, format=suffix, dpi=160, metadata=metadata, transparent=True)
            os.replace(temporary, path)
            written.append(path)
    pyplot().close("all")
    return written
