"""Markdown tables and the text in their cells; all tables of the package are written here.

Cells are Markdown. Text from files (names of tasks and methods, warnings) goes through ``code`` or ``plain`` first, so that it is shown
literally and never becomes markup.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_TAG_START = re.compile(r"<(?=[a-zA-Z/!?])")
_UNESCAPED_PIPE = re.compile(r"(?<!\\)\|")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int | Sequence[int] = 1) -> str:
    """A Markdown table; numbers are aligned to the right.

    Args:
        header: Titles of the columns.
        rows: Cells of every row. A pipe inside a cell is escaped, a line break becomes a space.
        left: Columns aligned to the left: the number of first columns, or indices.

    Raises:
        ValueError: If a row has another number of cells than the header.
    """
    aligned = set(range(left)) if isinstance(left, int) else set(left)
    ruler = "".join("---|" if index in aligned else "---:|" for index in range(len(header)))
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, the header has {len(header)}: {row!r}")
    return "\n".join([_line(header), f"|{ruler}", *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_UNESCAPED_PIPE.sub(r"\\|", " ".join(cell.splitlines())) for cell in cells) + " |"


def code(text: str) -> str:
    """Text in a code span; the fence is longer than any run of backticks inside it."""
    fence = "`"
    while fence in text:
        fence += "`"
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def plain(text: str) -> str:
    """Text that Markdown shows literally where it allows HTML: no tag starts in it."""
    return _TAG_START.sub("&lt;", text)
