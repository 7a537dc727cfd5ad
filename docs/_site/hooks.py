"""Links of the documentation that point out of ``docs/``: on GitHub they lead to files of the repository, here to copies of pages.

A link to a file that the site does not hold becomes its name in code type; one to a file that does not exist stops the build.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COPIES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "baselines/README.md": "fidelity.md",
    "results/tables/nano.md": "tables/nano.md",
    "results/tables/reported.md": "tables/reported.md",
    "results/tables": "tables/nano.md",
    "docs/record.schema.json": "record.md",
}
"""Repository file -> page of the site that has its content."""
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.hooks.links")


def rewritten(text: str, page: str, folder: Path) -> str:
    """Markdown with every link out of the documentation replaced.

    Args:
        text: Content of the page.
        page: Its path on the site, such as ``tables/nano.md``.
        folder: Where its links start from, in the repository.
    """

    def link(found: re.Match[str]) -> str:
        title, target, anchor = found[1], found[2], found[3] or ""
        place = Path(os.path.normpath(folder / target))
        name = place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else target
        if name.startswith("results/figures/") and place.is_file():
            return f"[{title}]({os.path.relpath('figures/' + place.name, Path(page).parent)})"
        if name in COPIES:
            return f"[{title}]({os.path.relpath(COPIES[name], Path(page).parent)}{anchor})"
        if place.is_relative_to(ROOT / "docs") and place.suffix == ".md":
            return f"[{title}]({os.path.relpath(place.relative_to(ROOT / 'docs'), Path(page).parent)}{anchor})"
        if not place.exists():
            log.warning("%s: link to %s, which does not exist", page, target)
        return title if title.startswith("`") else f"{title} (`{name}`)"

    return LINK.sub(link, text)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """MkDocs calls this with every page; generated ones had their links replaced when they were made."""
    source = ROOT / "docs" / page.file.src_uri
    return rewritten(markdown, page.file.src_uri, source.parent) if source.is_file() else markdown
