"""``dlplora report check`` and ``accept``: compare the guarded runs with the golden file."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from dlplora.atomic import write_atomically
from dlplora.documents import read_text
from dlplora.errors import ConfigError
from dlplora.reporting import goldens


def _observe(arguments: argparse.Namespace) -> dict[str, Any]:
    from dlplora.cli.terminal import quiet_loading, split_names
    from dlplora.evaluation import regression

    quiet_loading(None)
    names = split_names(arguments.methods) if arguments.methods else None
    observed = {}
    for guard in regression.chosen(names):
        start = time.perf_counter()
        observed[guard.name] = regression.observe(guard)
        print(f"{guard.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return observed


def run_check(arguments: argparse.Namespace) -> int:
    """Run the guarded methods again; exit 1 and say what moved if anything did."""
    path = goldens.golden_path("nano", Path(arguments.out))
    if not path.is_file():
        raise ConfigError(
            f"{path} not found. The check guards the repository's own methods: run it in a clone, or write the file: "
            "`dlplora report accept --reason TEXT`."
        )
    golden = goldens.read_golden(path)
    observed = _observe(arguments)
    findings = goldens.compare(golden, observed)
    for finding in findings:
        print(finding)
    if findings:
        print("If the change is intended: dlplora report accept --reason 'why the numbers move'", file=sys.stderr)
        return 1
    print(f"{len(observed)} guarded methods equal the golden file")
    return 0


def run_accept(arguments: argparse.Namespace) -> int:
    """Make what the guarded methods give now the accepted state, and write the reason into the changelog."""
    if not arguments.reason.strip():
        raise ConfigError("--reason must say why the numbers move.")
    changelog = Path(arguments.changelog)
    if not changelog.is_file():
        raise ConfigError(f"changelog not found: {changelog}. Run in the repository, or pass --changelog FILE.")
    path = goldens.golden_path("nano", Path(arguments.out))
    known = goldens.read_golden(path) if path.is_file() else {}
    text = read_text(changelog)
    observed = _observe(arguments)
    findings = goldens.compare(known, observed)
    noted = goldens.note_in_changelog(text, arguments.reason, findings)
    kept = known if arguments.methods else {}
    goldens.write_golden(path, {**kept, **observed})
    write_atomically(changelog, noted)
    for finding in findings:
        print(finding)
    print(f"wrote {path} and {changelog}")
    return 0
