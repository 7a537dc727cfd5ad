"""Documentation that cannot go stale unnoticed: links lead somewhere, commands parse, code compiles, the site builds."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from dlplora.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "baselines" / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_site" not in path.parts),
]
LINK = re.compile(r"\[[^\]]*\]\((?!https?:|mailto:)([^)\s]*)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
HAND_PARSED = {"fit", "validate", "test"}
"""Subcommands whose options LightningCLI reads."""


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def anchors(page: Path) -> set[str]:
    """Heading anchors as GitHub and MkDocs make them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{page.name}: {target}"


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language == "sh":
                for line in block.replace("\\\n", " ").splitlines():
                    if re.match(r"\s*(\w+=\S+\s+)*(\S*/)?dlplora\s", line):
                        yield str(page.relative_to(ROOT)), line.strip()


COMMANDS = list(commands())


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line}"[:90] for page, line in COMMANDS])
def test_commands_of_the_documentation_parse(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    words = words[next(index for index, word in enumerate(words) if word.rpartition("/")[2] == "dlplora") + 1 :]
    if words[0] in HAND_PARSED:
        configs = [word for flag, word in pairwise(words) if flag == "--config"]
        configs += words[1:2] if not words[1].startswith("-") else []
        assert configs, line
        for config in configs:
            assert (ROOT / config).is_file() or "/" not in config or not config.startswith("configs/"), line
        return
    build_parser().parse_args([word for word in words if word != "…"])  # exits with what is wrong


PYTHON = [(page, block) for page in PAGES for language, block in BLOCK.findall(page.read_text(encoding="utf-8")) if language == "python"]


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[f"{page.name}-{number}" for number, (page, _) in enumerate(PYTHON)])
def test_python_blocks_compile_and_import_what_exists(page: Path, block: str) -> None:
    compile(block, str(page), "exec")
    for module, imported in re.findall(r"^from (dlplora[\w.]*) import ([\w, ]+)", block, re.MULTILINE):
        if module == "dlplora.baselines.nearest_length":  # the example of a page, which tests/e2e/test_adding_a_baseline.py runs
            continue
        found = __import__(module, fromlist=[name.strip() for name in imported.split(",")])
        for name in imported.split(","):
            assert hasattr(found, name.strip()), f"{page.name}: {module}.{name.strip()}"


def test_the_tutorials_python_gives_what_it_says() -> None:
    (block,) = [block for page, block in PYTHON if page.name == "tutorial.md"]
    done = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip().startswith("ru ")  # what the README shows, too


def test_the_site_builds_with_every_link_checked(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **quiet})
    assert done.returncode == 0, done.stderr[-3000:]
    site = tmp_path / "site"
    for page in ("index.html", "tutorial/index.html", "method/dlp/index.html", "record/index.html", "tables/nano/index.html"):
        assert (site / page).is_file(), page
    assert "FusedCausalLM" in (site / "reference" / "inference" / "index.html").read_text(encoding="utf-8")
    assert "mean_experts_kept" not in (site / "method" / "dlp" / "index.html").read_text(encoding="utf-8")
    for page in PAGES:
        if page.parent.name == "docs" and page.name != "index.md":
            assert (site / page.stem / "index.html").is_file(), page.name  # a page that the navigation does not name is there all the same
