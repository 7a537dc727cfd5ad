"""Jobs of the engine, and the events that it reports for them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from dlplora.errors import DLPLoRAError
from dlplora.serve.sampling import Chosen, SamplingOptions

DecisionKind = Literal["routed", "pinned", "weights", "base"]
FinishReason = Literal["stop", "length", "cancelled"]


class QueueFullError(DLPLoRAError):
    """Too many requests wait; try again later."""


class BadRequestError(DLPLoRAError):
    """A request that cannot be served unchanged.

    Args:
        message: One line.
        param: The field that is wrong.
        code: A word for programs.
        status: HTTP status.
        retry_after: Value of the header ``Retry-After``.
    """

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400, retry_after: str | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status, self.retry_after = param, code, status, retry_after


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Which adapters a request asks for: by routing, one by name, by weights, or none."""

    kind: DecisionKind = "routed"
    weights: Mapping[str, float] = field(default_factory=dict)
    """Adapter -> weight, for ``pinned`` and ``weights``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What was decided for a prompt, or for a sentence."""

    kind: DecisionKind
    weights: Mapping[str, float]
    """Adapters with a weight other than zero."""
    confidence: float | None = None
    """Largest probability of the router; None without a router."""
    seconds: float = 0.0
    """Time of the decision, s; shared by the requests that were decided together."""
    out_of_scope: bool = False
    """Whether the base model answers because the prompt is of no task that the experts know."""

    @property
    def adapter(self) -> str:
        """The adapter with the largest weight, ``base`` if there is none."""
        return max(self.weights, key=lambda name: self.weights[name], default="base")


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt was routed."""

    decision: Decision


@dataclass(frozen=True, slots=True)
class Piece:
    """New text, and the tokens after it since the last piece."""

    text: str
    tokens: tuple[Chosen, ...]


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence ended: from character ``start`` of the answer on, ``decision`` holds."""

    start: int
    decision: Decision


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    waited_s: float
    first_token_s: float | None
    routing_s: float = 0.0
    """Part of ``first_token_s`` that routing took: question, router and buffers."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The request could not be finished."""

    error: DLPLoRAError


Event = Started | Piece | Sentence | Finished | Failed
_numbers = itertools.count()


@dataclass(kw_only=True, eq=False)
class Job:
    """One answer to generate. ``report`` is called from the engine's thread and must not block."""

    prompt_ids: tuple[int, ...]
    routed_text: str
    """What the router reads: the question without system text and template."""
    target: Target
    sampling: SamplingOptions
    max_tokens: int
    report: Callable[[Event], None]
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    question_s: float = 0.0
    """Time that finding ``routed_text`` took, s."""
    number: int = field(default_factory=lambda: next(_numbers))
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    """Set by ``Engine.cancel``; the engine frees the slot before its next step."""
