"""Whether a prompt belongs to a task of the experts: scores of a router, and thresholds chosen on validation prompts.

A larger score means that the prompt is more similar to the router's training prompts. ``max_probability`` is the largest calibrated
probability (Hendrycks and Gimpel, arXiv:1610.02136); ``energy`` is ``logsumexp`` of the calibrated logits, the negative of the free energy
(Liu et al., arXiv:2010.03759). Below the threshold a prompt is out of scope.

A threshold belongs to one router and is stored next to it in ``scope.json``. Shapes: B rows, E experts, n and m prompts.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dlplora.adapters.files import file_sha256
from dlplora.atomic import write_json
from dlplora.config import build
from dlplora.documents import read_json
from dlplora.errors import ConfigError, MethodError

SCOPE_FILE = "scope.json"
FILE_FORMAT = 1
Score = Literal["max_probability", "energy"]
Criterion = Literal["keep", "balanced_accuracy"]


@dataclass(frozen=True, kw_only=True)
class ScopeThreshold:
    """A threshold and how it was chosen."""

    score: Score
    """What is compared with it."""
    threshold: float
    """Prompts with a smaller score are out of scope."""
    criterion: Criterion
    """``keep``: the largest threshold that keeps the share ``keep`` of the in-scope prompts. ``balanced_accuracy``: the one with the
    largest mean of the in-scope share kept and the out-of-scope share rejected; of equal ones the smallest."""
    keep: float | None = None
    """Share to keep, for ``keep``."""
    num_in_scope: int = 0
    """Validation prompts of the router's tasks."""
    num_out_of_scope: int = 0
    """Validation prompts of other tasks."""
    in_scope_kept: float | None = None
    """Share of those prompts that is kept."""
    out_of_scope_kept: float | None = None
    """Share of these prompts that is kept, which should be small."""
    data: dict[str, Any] = field(default_factory=dict)
    """Suites and split that the prompts come from."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise ConfigError(f"scope: 'threshold' must be a finite number, got {self.threshold}.")
        if self.score == "max_probability" and not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"scope: 'threshold' of a probability must be between 0 and 1, got {self.threshold}.")
        for name in ("keep", "in_scope_kept", "out_of_scope_kept"):
            share = getattr(self, name)
            if share is not None and not 0.0 <= share <= 1.0:
                raise ConfigError(f"scope: '{name}' is a share, between 0 and 1, got {share}.")
        if self.num_in_scope < 0 or self.num_out_of_scope < 0:
            raise ConfigError(f"scope: numbers of prompts are at least 0, got {self.num_in_scope} and {self.num_out_of_scope}.")


@dataclass(frozen=True, kw_only=True)
class _Description(ScopeThreshold):
    """The content of ``scope.json``."""

    format: int
    router_sha256: str


def scores_of(probs: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """Every score (B,) of calibrated probabilities and logits, each (B, E)."""
    return {"max_probability": probs.amax(dim=-1), "energy": logits.logsumexp(dim=-1)}


def choose_threshold(
    score: Score,
    in_scope: Tensor,
    out_of_scope: Tensor | None = None,
    *,
    criterion: Criterion = "keep",
    keep: float = 0.95,
    data: dict[str, Any] | None = None,
) -> ScopeThreshold:
    """The threshold of a score.

    Args:
        score: Its name.
        in_scope: Scores of validation prompts of the router's tasks (n,).
        out_of_scope: Scores of validation prompts of other tasks (m,), for ``balanced_accuracy``; with ``keep`` they are only counted.
        criterion: See ``ScopeThreshold``.
        keep: Share of the in-scope prompts to keep, for ``keep``.
        data: Where the prompts come from, for the record.

    Raises:
        ConfigError: If there are no prompts, a score is not finite, or ``keep`` is not in (0, 1].
    """
    _require_scores(in_scope, "in-scope")
    if out_of_scope is not None:
        _require_scores(out_of_scope, "out-of-scope")
    if criterion == "balanced_accuracy":
        if out_of_scope is None:
            raise ConfigError("scope: criterion 'balanced_accuracy' needs out-of-scope validation prompts; give some, or use 'keep'.")
        threshold = _most_balanced(in_scope, out_of_scope)
    else:
        if not 0.0 < keep <= 1.0:
            raise ConfigError(f"scope: 'keep' must be in (0, 1], got {keep}.")
        rejected = len(in_scope) - math.ceil(round(keep * len(in_scope), 9))  # rounded: 0.55 * 100 is larger than 55
        threshold = float(in_scope.sort().values[rejected])
    return ScopeThreshold(
        score=score,
        threshold=threshold,
        criterion=criterion,
        keep=keep if criterion == "keep" else None,
        num_in_scope=len(in_scope),
        num_out_of_scope=0 if out_of_scope is None else len(out_of_scope),
        in_scope_kept=_kept(in_scope, threshold),
        out_of_scope_kept=None if out_of_scope is None else _kept(out_of_scope, threshold),
        data=data or {},
    )


def _require_scores(scores: Tensor, what: str) -> None:
    if scores.ndim != 1 or len(scores) == 0:
        raise ConfigError(f"scope: no {what} validation prompts; a threshold needs some.")
    if not bool(torch.isfinite(scores).all()):
        raise ConfigError(f"scope: a score of the {what} validation prompts is not finite. Train the router again.")


def _most_balanced(in_scope: Tensor, out_of_scope: Tensor) -> float:
    candidates = torch.unique(torch.cat([in_scope, out_of_scope]))  # ascending
    below_in, below_out = (torch.searchsorted(one.sort().values, candidates).double() / len(one) for one in (in_scope, out_of_scope))
    quality = below_out - below_in
    return float(candidates[(quality == quality.max()).nonzero()[0, 0]])


def _kept(scores: Tensor, threshold: float) -> float:
    return round(float((scores >= threshold).double().mean()), 6)


def write_scope(folder: str | os.PathLike[str], scope: ScopeThreshold) -> Path:
    """Write ``scope.json`` next to the router that it belongs to, atomically.

    Raises:
        MethodError: If the folder has no router.
    """
    weights, path = Path(folder) / "router.safetensors", Path(folder) / SCOPE_FILE
    if not weights.is_file():
        raise MethodError(f"no router in {folder}: router.safetensors is missing. Point to a folder written by router training.")
    write_json(path, {"format": FILE_FORMAT, "router_sha256": file_sha256(weights), **asdict(scope)})
    return path


def read_scope(folder: str | os.PathLike[str]) -> ScopeThreshold | None:
    """The threshold of a router; None if it has none.

    Raises:
        MethodError: If the file is damaged, or was made for other weights.
    """
    path = Path(folder) / SCOPE_FILE
    if not path.is_file():
        return None
    content = read_json(path, error=MethodError)
    description = build(_Description, content, str(path), error=MethodError)
    if description.format != FILE_FORMAT:
        raise MethodError(f"{path} has format {description.format}, expected {FILE_FORMAT}. Run `dlplora scope` again.")
    if description.router_sha256 != file_sha256(Path(folder) / "router.safetensors"):
        raise MethodError(f"{path} was made for another router than the one in its folder. Run `dlplora scope` again, or delete it.")
    values = asdict(description)
    return ScopeThreshold(**{name: value for name, value in values.items() if name not in {"format", "router_sha256"}})
