"""Prometheus metrics of one server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dlplora.serve.engine import Engine
from dlplora.serve.jobs import Event, Finished, Sentence, Started

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of requests, tokens and decisions, and the state of the engine."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.responses = Counter("dlplora_responses", "Responses by path and status.", ["path", "status"], registry=self.registry)
        self.prompt_tokens = Counter("dlplora_prompt_tokens", "Prompt tokens processed.", registry=self.registry)
        self.completion_tokens = Counter("dlplora_completion_tokens", "Tokens generated.", registry=self.registry)
        self.decisions = Counter("dlplora_decisions", "Routed prompts and sentences.", ["decision", "adapter"], registry=self.registry)
        self.routing = Histogram("dlplora_routing_seconds", "Time of a routing decision.", buckets=_SECONDS, registry=self.registry)
        self.waiting = Histogram("dlplora_wait_seconds", "Time in the queue.", buckets=_SECONDS, registry=self.registry)
        self.first_token = Histogram("dlplora_first_token_seconds", "Time to the first token.", buckets=_SECONDS, registry=self.registry)
        self.first_routing = Histogram(
            "dlplora_first_token_routing_seconds",
            "Routing (question, router, buffers) within the time to the first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        for name, text, value in (
            ("dlplora_requests_running", "Requests in a slot.", lambda: engine.num_running),
            ("dlplora_requests_waiting", "Requests in the queue.", lambda: engine.num_waiting),
            ("dlplora_cache_bytes", "Keys and values held.", engine.cache_bytes),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)

    def observe(self, event: Event) -> None:
        """Count an event of the engine."""
        if isinstance(event, (Started, Sentence)):
            self.decisions.labels(event.decision.kind, event.decision.adapter).inc()
            self.routing.observe(event.decision.seconds)
        elif isinstance(event, Finished):
            self.prompt_tokens.inc(event.prompt_tokens)
            self.completion_tokens.inc(event.completion_tokens)
            self.waiting.observe(event.waited_s)
            if event.first_token_s is not None:
                self.first_token.observe(event.first_token_s)
                self.first_routing.observe(event.routing_s)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return bytes(generate_latest(self.registry))
