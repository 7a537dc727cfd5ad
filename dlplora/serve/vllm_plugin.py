"""Routing inside a vLLM server: ``VLLM_PLUGINS=dlplora vllm serve BASE --enable-lora --lora-modules NAME=PATH …``.

Requests with ``model: auto`` get the name of the adapter that the method chooses, and are answered by vLLM's own endpoints;
``POST /v1/route`` routes without generating. All other requests pass unchanged. vLLM serves one adapter per request: the one with the
largest weight, for the whole answer.

Settings are environment variables: ``DLPLORA_POOL`` and the others in ``Settings``. Not run on a GPU; tested against the interface, with a
stub in place of vLLM's endpoints.

Source: vLLM 0.33, ``vllm/plugins/endpoint_plugins/interface.py``: an object with ``name``, ``required_tasks``, ``attach_router(app)``,
called while the application is built, and ``init_state(engine_client, state, args)``, called when the engine is there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from dlplora.errors import ConfigError, DLPLoRAError
from dlplora.serve.answers import described, headers_of
from dlplora.serve.catalog import AUTO, check_names
from dlplora.serve.deciding import Decider, require_servable
from dlplora.serve.failures import FAILURES
from dlplora.serve.jobs import BadRequestError, Decision, Target
from dlplora.serve.prompts import PromptBuilder
from dlplora.serve.schemas import Message
from dlplora.serve.server import error_body
from dlplora.serve.upstream.local_router import LocalRouter

log = logging.getLogger(__name__)
PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
MAX_BODY_BYTES = 64 << 20
TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES} bytes."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the environment says."""

    pool: str
    """``DLPLORA_POOL``: folder of the adapters; their names are those of ``--lora-modules``."""
    method: str = "dlp"
    """``DLPLORA_METHOD``."""
    router: str | None = None
    """``DLPLORA_ROUTER``: folder of a trained router."""
    pretrained: str | None = None
    """``DLPLORA_PRETRAINED``: the base model; default: the one that vLLM serves."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read the variables.

        Raises:
            ConfigError: Without a pool.
        """
        given = {name: environment.get(f"DLPLORA_{name.upper()}") or None for name in ("pool", "method", "router", "pretrained")}
        if given["pool"] is None:
            raise ConfigError("set DLPLORA_POOL to the folder of the adapters that vLLM serves.")
        return cls(**{key: value for key, value in given.items() if value is not None})


class AutoModel:
    """Decides for requests with ``model: auto``.

    Args:
        router: Decides.
        base: Name of the base model in vLLM.
    """

    def __init__(self, router: LocalRouter, base: str) -> None:
        fused = cast(Any, router)
        require_servable(fused)
        self.base = base
        self.names: tuple[str, ...] = tuple(router.bank.names)
        check_names(self.names, base)
        self._decider, self._lock = Decider(fused), threading.Lock()
        vocab_size = router.config.get_text_config().vocab_size
        self._prompts = PromptBuilder(router.tokenizer, vocab_size, router.max_length)

    async def decide(self, body: Mapping[str, Any]) -> tuple[Decision, str, str]:
        """The decision for a body, the name of the model for vLLM, and what the router read.

        Raises:
            BadRequestError: If there is no text to route, or more than the context holds.
        """
        text = await asyncio.to_thread(self._read, body)
        if not text:
            raise BadRequestError(
                "there is no text to route; name a model instead of 'auto'.", "messages" if "messages" in body else "prompt"
            )
        decision = await asyncio.to_thread(self._decide, text)
        return decision, decision.adapter if decision.weights else self.base, text

    def _decide(self, text: str) -> Decision:
        with self._lock:
            return self._decider.decide([Target()], [text])[0][0]

    def _read(self, body: Mapping[str, Any]) -> str:
        """The question of a request; parts that are not text, and messages of tools, are skipped."""
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            (prompt,) = prompt
        if isinstance(prompt, str) and prompt:
            return self._prompts.to_route(prompt, None)
        messages = [found for one in body.get("messages") or () if (found := _text_message(one)) is not None]
        return self._prompts.to_route(None, messages) if messages else ""


def _text_message(message: Any) -> Message | None:
    if not isinstance(message, dict):
        return None
    content = message.get("content")
    if isinstance(content, list):
        content = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    try:
        return Message.model_validate({"role": message.get("role"), "content": content})
    except ValidationError:
        return None


class RouteAuto:
    """Middleware that replaces ``auto`` by the name of an adapter, and the decision into the headers of the answer.

    Args:
        app: vLLM's application.
        state: Its state; ``state.dlplora`` is the ``AutoModel`` once the engine is there.
    """

    def __init__(self, app: ASGIApp, state: Any) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body of a completion; pass everything else on unchanged."""
        auto: AutoModel | None = getattr(self.state, "dlplora", None)
        if auto is None or scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            await self.app(scope, receive, send)
            return
        raw = await _body(receive)
        if raw is None:
            await _failed(BadRequestError(TOO_LARGE, status=413))(scope, receive, send)
            return
        body = _parsed(raw)
        headers: list[tuple[bytes, bytes]] = []
        if body is not None and body.get("model") == AUTO:
            try:
                decision, name, _ = await auto.decide(body)
                raw = json.dumps({**body, "model": name}).encode()
            except FAILURES as error:
                await _failed(error)(scope, receive, send)
                return
            headers = [(key.encode(), value.encode()) for key, value in headers_of(decision).items()]
            length = str(len(raw)).encode()
            kept = [(key, value) for key, value in scope["headers"] if key != b"content-length"]
            scope = {**scope, "headers": [*kept, (b"content-length", length)]}
        await self.app(scope, _replay(raw, receive), _adding(headers, send))


def _failed(error: Exception) -> JSONResponse:
    if not isinstance(error, DLPLoRAError):
        log.error("a request could not be routed", exc_info=error)
    status, answer = error_body(error)
    return JSONResponse(answer, status)


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None if it is larger than ``MAX_BODY_BYTES``."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if sum(map(len, parts)) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):  # vLLM says what is wrong with it
        return None
    return body if isinstance(body, dict) else None


def _replay(raw: bytes, receive: Receive) -> Receive:
    sent = False

    async def replayed() -> AsgiMessage:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": raw, "more_body": False}

    return replayed


def _adding(headers: Sequence[tuple[bytes, bytes]], send: Send) -> Send:
    async def added(message: AsgiMessage) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *headers]}
        await send(message)

    return added


class EndpointPlugin:
    """What vLLM finds under the entry point ``vllm.endpoint_plugins``."""

    name = "dlplora"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the middleware and ``POST /v1/route``, which the server's API key protects like every path below ``/v1``."""
        app.add_middleware(RouteAuto, state=app.state)

        @app.post("/v1/route")
        async def route(http: Request) -> JSONResponse:
            auto: AutoModel | None = getattr(app.state, "dlplora", None)
            if auto is None:
                return JSONResponse(error_body(BadRequestError("the server is starting.", status=503))[1], 503)
            raw = await _body(http.receive)
            if raw is None:
                return _failed(BadRequestError(TOO_LARGE, status=413))
            try:
                decision, name, text = await auto.decide(_parsed(raw) or {})
            except FAILURES as error:
                return _failed(error)
            return JSONResponse({"object": "route", "read": text, **described(decision), "model": name})

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Load the router for the base model that vLLM serves; the engine itself is not used.

        Raises:
            DLPLoRAError: If a setting is missing, or the method cannot route without the layers of the base model.
        """
        settings = Settings.from_environment()
        router = await asyncio.to_thread(
            LocalRouter,
            settings.pretrained or args.model,
            pool=settings.pool,
            method=settings.method,
            artifacts={"router": settings.router},
        )
        served = getattr(args, "served_model_name", None)
        base = served[0] if isinstance(served, list) and served else served or args.model
        state.dlplora = AutoModel(router, str(base))
        loaded = {str(getattr(one, "name", one)) for one in getattr(args, "lora_modules", None) or ()}
        missing = sorted(set(router.bank.names) - loaded)
        if missing:
            log.warning("adapters of the pool that --lora-modules does not name: %s", ", ".join(missing))
