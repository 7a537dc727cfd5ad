"""The campaigns run only where ``-m campaign`` asks for them; a short seeded sample of each is part of the ordinary tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the campaigns out of other runs: they take a quarter of an hour."""
    if "campaign" in (config.getoption("markexpr") or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("campaign")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
