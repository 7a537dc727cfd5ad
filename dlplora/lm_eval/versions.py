"""The releases of lm-eval that are tested."""

from __future__ import annotations

import importlib.metadata
import re

TESTED = ("0.4.10", "0.4.13")
"""The first and the last release of lm-eval that the tests cover."""


def untested_version() -> str | None:
    """One sentence if the installed lm-eval is none of the tested releases, else None."""
    installed = importlib.metadata.version("lm-eval")
    first, last = map(_numbers, TESTED)
    if first <= _numbers(installed) <= last:
        return None
    return f"lm-eval {installed} is installed; this dlplora is tested with {TESTED[0]} to {TESTED[1]}."


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
