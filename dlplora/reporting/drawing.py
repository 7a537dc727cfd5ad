"""Style and output of all figures: mid-grey lines and text on a transparent background, visible on light and dark pages.

Colours: Okabe and Ito's palette, which colour-blind readers can distinguish.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlplora.atomic import replacing

INK = "#7a7f87"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to memory, with the settings of all figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings: Any = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK)
    plt.rcParams.update({**settings, "svg.fonttype": "none", "svg.hashsalt": "dlplora", "font.size": 9, "axes.spines.top": False})
    plt.rcParams.update({"axes.spines.right": False, "legend.frameon": False, "figure.facecolor": "none", "axes.facecolor": "none"})
    return plt


def write_figures(figures: Mapping[str, Any], folder: Path, prefix: str) -> list[Path]:
    """Write figures as SVG and PNG, each atomically, and close all that are open.

    Args:
        figures: Name -> figure.
        folder: Made if it does not exist.
        prefix: Put before the names.
    """
    written = []
    for name, figure in figures.items():
        for suffix in ("svg", "png"):
            path = folder / f"{prefix}_{name}.{suffix}"
            metadata = {"Date": None} if suffix == "svg" else {"Software": None}
            with replacing(path) as temporary:
                figure.savefig(temporary, format=suffix, dpi=160, metadata=metadata, transparent=True)
            written.append(path)
    close_figures()
    return written


def close_figures() -> None:
    """Close every figure drawn so far."""
    pyplot().close("all")


def label_points(axes: Any, points: Mapping[str, tuple[float, float]], size: float = 6.5) -> None:
    """Names next to points, the highest first; a name without room near its point is left out.

    Args:
        axes: With its limits set; names are placed in its pixels.
        points: Name -> position, in data coordinates.
        size: Of the text, in points.
    """
    figure = axes.figure
    figure.canvas.draw()
    scale = figure.dpi / 72
    where = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in where.values()]
    frame = axes.get_window_extent()
    offsets = [(6, 0, "left"), (-6, 0, "right"), *((dx, dy, side) for dy in (8, -8, 16, -16, 24, -24, 32, -32) for dx, side in OFFSETS)]
    for name, (x, y) in sorted(where.items(), key=lambda pair: -pair[1][1]):
        width, height = 0.56 * size * len(name) * scale, 1.15 * size * scale
        for dx, dy, side in offsets:
            left = x + dx * scale - (width if side == "right" else width / 2 if side == "center" else 0)
            box = (left, y + dy * scale - height / 2, left + width, y + dy * scale + height / 2)
            inside = box[0] >= frame.x0 and box[2] <= frame.x1 and box[1] >= frame.y0 and box[3] <= frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                arrow = {"arrowstyle": "-", "color": INK, "lw": 0.4, "shrinkA": 0, "shrinkB": 2} if abs(dy) > 8 else None
                axes.annotate(
                    name, points[name], (dx, dy), textcoords="offset points", fontsize=size, va="center", ha=side, arrowprops=arrow
                )
                taken.append(box)
                break


OFFSETS = ((0, "center"), (6, "left"), (-6, "right"))


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
