"""The application in front of an upstream server: OpenAI's endpoints, routing without generation, health and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest

from dlplora import __version__
from dlplora.serve.app import add_error_handlers, key_check
from dlplora.serve.jobs import Target
from dlplora.serve.middleware import BodyLimit, CountResponses
from dlplora.serve.schemas import ChatRequest, CompletionRequest, RouteRequest
from dlplora.serve.upstream.proxy import UpstreamProxy

HEALTH = "/health"
"""All four kinds have it."""


def build_upstream_app(proxy: UpstreamProxy) -> FastAPI:
    """The application for one upstream server."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await proxy.client.close()

    app = FastAPI(title="dlplora", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(BodyLimit, limit=proxy.options.max_body_bytes)
    app.add_middleware(CountResponses, counter=proxy.responses)
    add_error_handlers(app)
    _add_completions(app, proxy)
    _add_information(app, proxy)
    return app


def _add_completions(app: FastAPI, proxy: UpstreamProxy) -> None:
    protected = [Depends(key_check(proxy.options.api_key))]

    @app.post("/v1/chat/completions", dependencies=protected)
    async def chat(http: Request, request: ChatRequest) -> Response:
        return await proxy.complete(http, request, [await asyncio.to_thread(proxy.chat_prompt, request)], True)

    @app.post("/v1/completions", dependencies=protected)
    async def completions(http: Request, request: CompletionRequest) -> Response:
        return await proxy.complete(http, request, await asyncio.to_thread(proxy.prompts.completion, request), False)

    @app.post("/v1/route", dependencies=protected)
    async def route(request: RouteRequest) -> dict[str, Any]:
        text = await asyncio.to_thread(proxy.prompts.to_route, request.prompt, request.messages)
        (decided,) = await proxy.decide(Target(), [text])
        return {"object": "route", "read": text, **decided.described()}


def _add_information(app: FastAPI, proxy: UpstreamProxy) -> None:
    protected = [Depends(key_check(proxy.options.api_key))]

    @app.get("/v1/models", dependencies=protected)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": proxy.catalog.cards()}

    @app.get("/v1/models/{name:path}", dependencies=protected)
    async def model(name: str) -> dict[str, Any]:
        return proxy.catalog.card(name)

    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> str:
        return "ok"

    @app.get("/ready")
    async def ready() -> JSONResponse:
        started = time.perf_counter()
        reached = await proxy.client.alive(HEALTH)
        return JSONResponse({"ready": reached, "upstream_s": round(time.perf_counter() - started, 6)}, 200 if reached else 503)

    @app.get("/metrics", dependencies=protected)
    async def metrics() -> Response:
        return Response(generate_latest(proxy.registry), media_type="text/plain; version=0.0.4")
