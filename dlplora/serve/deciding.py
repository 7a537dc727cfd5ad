"""Routing weights for the requests of a batch. Shapes: B requests, E experts."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlplora.errors import ConfigError, DLPLoRAError, GenerationError, NotFiniteError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.base import FusionMethod
from dlplora.modules.routing_state import NOT_FINITE
from dlplora.serve.failures import FAILURES, shown
from dlplora.serve.jobs import Decision, Target
from dlplora.types import PromptBatch

log = logging.getLogger(__name__)


def require_servable(fused: FusedCausalLM) -> None:
    """Refuse methods that do not decide weights per prompt or sentence.

    Raises:
        ConfigError: Naming the method and the reason.
    """
    name, granularity = fused.method.name, fused.method.granularity
    if granularity == "token" or fused.patched.hooks:
        raise ConfigError(f"method '{name}' routes single tokens inside the layers; the server needs one that routes prompts or sentences.")
    if any(layer.gate is not None for layer in fused.patched.layers.values()):
        raise ConfigError(f"method '{name}' has gates inside the layers; the server needs one that routes prompts or sentences.")
    if fused.method.kv_policy == "prompt_frozen" or fused.method.prompt_routing != "whole":
        raise ConfigError("the server supports kv_policy stale and recompute, and prompt_routing whole.")
    if fused.request_router.num_weights != fused.bank.num_experts:
        raise ConfigError(f"method '{name}' weights layers separately; the server has one weight per adapter and request.")
    if "task_id" in fused.method.metadata.needs:
        raise ConfigError(f"method '{name}' needs the task of each prompt, which a request does not have.")


class Decider:
    """Routing weights of requests and of their sentences.

    Args:
        fused: The model.
        min_confidence: Below this probability a routed request is out of scope and gets the base model; 0 never does. None takes the
            threshold that was chosen for the router (`dlplora scope`), if there is one.

    Raises:
        ConfigError: If a bound is given and the method has no probabilities.
    """

    def __init__(self, fused: FusedCausalLM, min_confidence: float | None = None) -> None:
        if min_confidence and type(fused.method).route_with_confidence is FusionMethod.route_with_confidence:
            raise ConfigError(f"--min-confidence {min_confidence:g}: method '{fused.method.name}' has no probabilities; leave it out.")
        self.fused, self.min_confidence = fused, min_confidence
        self.names: tuple[str, ...] = tuple(fused.bank.names)
        self._zeros = torch.zeros(fused.bank.num_experts, device=fused.device)
        self._routes = fused.method.name != "base"

    def describe_scope(self) -> str:
        """One line: which prompts the base model answers."""
        scope = self.fused.method.scope
        if not self._routes or self.min_confidence == 0 or (self.min_confidence is None and scope is None):
            return "every prompt is routed; no out-of-scope threshold is in use"
        if self.min_confidence is not None or scope is None:
            return f"the base model answers prompts whose largest probability is below {self.min_confidence:g} (--min-confidence)"
        return (
            f"the base model answers prompts whose {scope.score} is below {scope.threshold:.4g}, the router's out-of-scope threshold; "
            "--min-confidence 0 routes every prompt, as `dlplora generate` does"
        )

    @torch.no_grad()
    def decide(self, targets: Sequence[Target], texts: Sequence[str], *, prompts: bool = True) -> tuple[list[Decision], Tensor]:
        """Decisions and weights (B, E), float32; the router reads all texts in one batch.

        Args:
            targets: What each request asks for.
            texts: What the router reads for each.
            prompts: Whether these are prompts, which may be out of scope. Thresholds are chosen on prompts; sentences of an answer are
                not held against them.
        """
        started = time.perf_counter()
        weights = self._zeros.repeat(len(targets), 1)
        kinds: list[Any] = [target.kind for target in targets]
        confidences: list[float | None] = [None] * len(targets)
        routed = [row for row, target in enumerate(targets) if target.kind == "routed" and self._routes]
        if routed:
            found, sure, rejected = self._route([texts[row] for row in routed], prompts)
            for place, row in enumerate(routed):
                confidences[row] = None if sure is None else sure[place]
                if rejected[place]:
                    kinds[row] = "base"
                else:
                    weights[row] = found[place]
        for row, target in enumerate(targets):
            for name, value in target.weights.items():
                if name not in self.names:
                    raise GenerationError(f"the pool has no adapter '{name}' any more.")
                weights[row, self.names.index(name)] = value
        seconds = time.perf_counter() - started
        decisions = [
            Decision(
                kind=kind,
                weights=self._kept(values),
                confidence=confidence,
                seconds=seconds,
                out_of_scope=kind == "base" and target.kind == "routed" and self._routes,
            )
            for kind, values, confidence, target in zip(kinds, weights.tolist(), confidences, targets, strict=True)
        ]
        return decisions, weights

    def decide_each(
        self, targets: Sequence[Target], texts: Sequence[str], *, prompts: bool = True
    ) -> list[tuple[Decision, Tensor] | DLPLoRAError]:
        """As ``decide``, but an error or weights that are not finite belong to one request: a batch that fails is decided one by one."""
        try:
            decisions, weights = self.decide(targets, texts, prompts=prompts)
        except FAILURES as error:
            if len(targets) > 1:
                return [self.decide_each([one], [text], prompts=prompts)[0] for one, text in zip(targets, texts, strict=True)]
            if not isinstance(error, DLPLoRAError):
                log.exception("a prompt or sentence could not be routed; its request is reported as failed")
            return [shown(error)]
        finite = weights.isfinite().all(dim=-1).tolist()
        return [
            (decision, own) if fine else NotFiniteError(NOT_FINITE) for decision, own, fine in zip(decisions, weights, finite, strict=True)
        ]

    def _route(self, texts: Sequence[str], prompts: bool) -> tuple[Tensor, list[float] | None, list[bool]]:
        """Weights (B, E), confidences, and which texts are out of scope."""
        fused = self.fused
        batch = PromptBatch.from_texts(texts, fused.tokenizer, device=fused.device)
        weights, confidence = fused.request_router.route_with_confidence(batch)
        if weights is None:
            raise ConfigError(f"method '{fused.method.name}' returned no routing weights.")
        rejected = self._rejected(batch, confidence) if prompts else None
        return (
            weights.to(fused.device),
            None if confidence is None else confidence.tolist(),
            [False] * len(texts) if rejected is None else rejected.tolist(),
        )

    def _rejected(self, batch: PromptBatch, confidence: Tensor | None) -> Tensor | None:
        """Which prompts are out of scope, bool (B,); None without a threshold."""
        scope = self.fused.method.scope
        if self.min_confidence is not None or scope is None:
            return None if confidence is None else confidence < (self.min_confidence or 0.0)
        if scope.score == "max_probability" and confidence is not None:  # no second pass of the router
            return confidence < scope.threshold
        return self.fused.method.scope_scores(batch)[scope.score] < scope.threshold

    def _kept(self, values: Sequence[float]) -> dict[str, float]:
        return {name: round(value, 6) for name, value in zip(self.names, values, strict=True) if value != 0}
