"""Route a request, then let the upstream server generate with the chosen adapters.

A decision holds for the whole answer, because the upstream server cannot change adapters at sentence ends.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Histogram

from dlplora.errors import DLPLoRAError
from dlplora.serve.answers import described, headers_of
from dlplora.serve.catalog import Catalog
from dlplora.serve.deciding import Decider, require_servable
from dlplora.serve.jobs import BadRequestError, Decision, Target
from dlplora.serve.prompts import Prompt, PromptBuilder
from dlplora.serve.schemas import ChatRequest, CompletionRequest
from dlplora.serve.server import ServerOptions, error_body
from dlplora.serve.upstream.client import UNREADABLE, UpstreamClient
from dlplora.serve.upstream.kinds import Upstream
from dlplora.serve.upstream.local_router import LocalRouter
from dlplora.serve.upstream.lorax import LoraxFormat, generate_body, openai_fields

_OURS = frozenset(
    {"dlplora", "adapter_weights", "model", "lora", "lora_path", "merged_adapters", "adapter_id", "adapter_source", "api_token"}
)
"""Fields of a request that are not forwarded: ours, and those with which a client could choose adapters of the server itself."""


@dataclass(frozen=True, kw_only=True)
class Decided:
    """A decision, and what the upstream server makes of it."""

    decision: Decision
    applied: Mapping[str, float]

    def described(self) -> dict[str, Any]:
        """As JSON; ``applied`` are the weights that the upstream server uses."""
        return {**described(self.decision), "applied": {name: round(weight, 6) for name, weight in self.applied.items()}}


@dataclass
class Names:
    """Adapters that may be requested: those of the pool, which the router knows, and further ones of the upstream server."""

    names: tuple[str, ...]


@dataclass
class UpstreamProxy:
    """The state of the endpoints.

    Args:
        router: Decides.
        upstream: Names in the upstream server.
        client: Connection to it.
        options: Of the application; ``default_max_tokens`` is only used for LoRAX's own endpoint.
        min_confidence: See ``Decider``.

    Raises:
        ConfigError: If the method cannot route prompts on its own.
    """

    router: LocalRouter
    upstream: Upstream
    client: UpstreamClient
    options: ServerOptions
    min_confidence: float | None = None
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        fused = cast(Any, self.router)
        require_servable(fused)
        self._deciding = Decider(fused, self.min_confidence)
        self._lock = threading.Lock()
        further = [name for name in self.upstream.ids if not name.startswith("#") and name not in self._deciding.names]
        self.decider = Names((*self._deciding.names, *further))
        self.catalog = Catalog(cast(Any, self), self.options.base_name, self.options.created)
        vocab_size = self.router.config.get_text_config().vocab_size
        self.prompts = PromptBuilder(self.router.tokenizer, vocab_size, self.router.max_length, self.options.chat_template)
        self.responses = Counter("dlplora_responses", "Responses by path and status.", ["path", "status"], registry=self.registry)
        self.decisions = Counter("dlplora_decisions", "Routed prompts.", ["decision", "adapter"], registry=self.registry)
        self.routing = Histogram("dlplora_routing_seconds", "Time of a routing decision.", registry=self.registry)

    def chat_prompt(self, request: ChatRequest) -> Prompt:
        """What is routed of a conversation; the upstream server applies its own chat template, so ours is needed for LoRAX only."""
        if self.prompts.chat_template is None and self.upstream.kind != "lorax":
            text = self.prompts.to_route(None, request.messages)
            return Prompt((), text, text)
        return self.prompts.chat(request)

    def describe_scope(self) -> str:
        """See ``Decider``."""
        return self._deciding.describe_scope()

    async def decide(self, target: Target, texts: Sequence[str]) -> list[Decided]:
        """Decisions for several prompts of one request.

        Raises:
            BadRequestError: If given weights are more than the upstream server can apply.
        """
        if target.kind in {"pinned", "weights"}:
            decisions = [Decision(kind=target.kind, weights=target.weights) for _ in texts]
        else:
            decisions = await asyncio.to_thread(self._route, target, list(texts))
        found = []
        for decision in decisions:
            applied = self.upstream.applied(decision.weights)
            if decision.kind == "weights" and applied != dict(decision.weights):
                raise BadRequestError(
                    f"this upstream server serves {'a single adapter' if self.upstream.kind == 'lorax' else 'one adapter per request,'} at "
                    "weight 1; write the weighted one with `dlplora export peft`, load it there, and name it.",
                    "adapter_weights",
                )
            self.decisions.labels(decision.kind, decision.adapter).inc()
            self.routing.observe(decision.seconds)
            found.append(Decided(decision=decision, applied=applied))
        return found

    def _route(self, target: Target, texts: list[str]) -> list[Decision]:
        with self._lock:
            return self._deciding.decide([target] * len(texts), texts)[0]

    async def complete(self, http: Request, request: ChatRequest | CompletionRequest, prompts: Sequence[Prompt], chat: bool) -> Response:
        """Decide, forward the request, and return the answer."""
        target = self.catalog.target(request.model, request.adapter_weights)
        decided = await self.decide(target, [prompt.routed_text for prompt in prompts])
        first = decided[0]
        if any(dict(other.applied) != dict(first.applied) for other in decided):
            raise BadRequestError("the prompts of this request need different adapters; send each in a separate request.", "prompt")
        if self.upstream.merges(first.applied):
            if len(prompts) > 1:
                raise BadRequestError("several weighted adapters need one prompt per request on this upstream server.", "prompt")
            shape: LoraxFormat | None = LoraxFormat(chat, request.stream_options is not None and request.stream_options.include_usage)
            path = "/generate_stream" if request.stream else "/generate"
            merged = self.upstream.merged(first.applied)
            body = generate_body(request, prompts[0].text, merged, self.options.default_max_tokens)
        else:
            shape, path, body = None, f"/v1/{'chat/completions' if chat else 'completions'}", self._body(request, first)
        headers = headers_of(first.decision)
        if request.stream:
            events = self._events(path, body, request, first, shape)
            beginning = await anext(events)  # an error before the first event is an ordinary response
            headers["cache-control"] = "no-store"
            return StreamingResponse(_after(beginning, events), media_type="text/event-stream", headers=headers)
        found = await _unless_gone(http, self.client.post(path, body))
        found = {**(found if shape is None else shape.whole(found)), "model": request.model}
        if request.wants_trace:
            found["dlplora"] = first.described()
        return JSONResponse(found, headers=headers)

    def _body(self, request: ChatRequest | CompletionRequest, decided: Decided) -> dict[str, Any]:
        sent = {key: value for key, value in request.model_dump(mode="json", exclude_unset=True).items() if key not in _OURS}
        if self.upstream.kind == "lorax":
            sent = openai_fields(sent)
        return {**sent, **self.upstream.fields(decided.applied)}

    async def _events(
        self, path: str, body: Mapping[str, Any], request: ChatRequest | CompletionRequest, decided: Decided, shape: LoraxFormat | None
    ) -> AsyncIterator[str]:
        """Server-sent events: the trace first if it is wanted, then those of the upstream server under the model's name here."""
        async with self.client.stream(path, body) as data:
            yield ": routed\n\n"
            if request.wants_trace:
                name = "chat.completion.chunk" if isinstance(request, ChatRequest) else "text_completion"
                head = {"id": "route", "object": name, "created": int(time.time()), "model": request.model, "choices": []}
                yield _sse({**head, "dlplora": decided.described()})
            complete = False
            async for text in data:
                if text == "[DONE]":
                    complete = True
                    break
                for event in _read(text, shape):
                    yield _sse({**event, "model": request.model})
            if not (complete or (shape is not None and shape.complete)):
                raise BadRequestError("the upstream server ended before its answer was complete.", None, "upstream_error", 502)
        yield "data: [DONE]\n\n"


def _read(text: str, shape: LoraxFormat | None) -> list[dict[str, Any]]:
    """The events of OpenAI's stream that are made of one event of the upstream server."""
    try:
        event = json.loads(text)
    except UNREADABLE:
        event = None
    if not isinstance(event, dict) or "error" in event:
        raise BadRequestError("the upstream server failed while it answered.", None, "upstream_error", 502)
    return [event] if shape is None else shape.chunks(event)


async def _after(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    try:
        async for event in rest:
            yield event
    except DLPLoRAError as error:  # the connection broke, or the answer did
        yield _sse(error_body(error)[1])


def _sse(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _unless_gone(http: Request, work: Any) -> Any:
    """Wait for an answer, and cancel the upstream request if the client disconnects."""

    async def disconnected() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise BadRequestError("the client closed the connection.", status=499)
    finally:
        for task in (working, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, DLPLoRAError):
                await task
