"""Compare a router's confidence on the prompts of a run with that on its validation prompts. A drop means that the text has changed.

Shapes: B rows, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dlplora.config import short
from dlplora.errors import ConfigError

log = logging.getLogger(__name__)

WINDOW = 32
"""Prompts over which the confidence is averaged."""
FAR_BELOW = 0.8
"""Share of the validation confidence below which a warning is due. On nano, mixed questions (composites) reach 0.88 of it, prompts of
other kinds and questions drowned in a system text 0.4 to 0.78."""


USED = ("validation_accuracy", "validation_calibration_error")
"""Measurements of a router that are used, both shares."""


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Check the measurements that are used.

    Raises:
        ConfigError: If one is not a number from 0 to 1; it may be missing or null.
    """
    for key in USED:
        value = metrics.get(key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0.0 <= value <= 1.0):
            raise ConfigError(f"router: '{key}' under 'metrics' must be a number from 0 to 1, got {short(value)}.")


class ConfidenceMonitor:
    """Warns once if the mean confidence over ``WINDOW`` routed texts is far below that on validation.

    The confidence is the largest probability. Its mean on validation is at least accuracy minus expected calibration error, which
    ``router.json`` holds; a router without these numbers is not watched.

    Args:
        metrics: Of the router, as ``router.json`` holds them.
    """

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        accuracy, error = (metrics.get(key) for key in USED)
        self.expected = None if accuracy is None or error is None else float(accuracy) - float(error)
        self.warned = False
        self._seen: list[Tensor] = []

    def add(self, probabilities: Tensor) -> None:
        """Take the probabilities (B, E) of some routed texts; waits for the device once per window."""
        if self.expected is None or self.warned:
            return
        self._seen.append(probabilities.detach().amax(dim=-1))
        num = sum(len(part) for part in self._seen)
        if num < WINDOW:
            return
        mean = float(sum(part.sum() for part in self._seen)) / num
        self._seen = []
        if mean < FAR_BELOW * self.expected:
            self.warned = True
            log.warning(
                "the router's mean confidence on the last %d texts is %.2f, on validation it was %.2f: these texts differ from those "
                "it was trained on, and experts may be chosen wrongly. --trace shows what the router reads (docs/prompts_and_routing.md).",
                num,
                mean,
                self.expected,
            )
