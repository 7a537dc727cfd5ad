"""The HTTP application: OpenAI's endpoints, routing without generation, health, metrics, and a page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import secrets
from collections.abc import Callable
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from dlplora import __version__
from dlplora.errors import DLPLoRAError
from dlplora.serve.answers import described
from dlplora.serve.engine import Engine
from dlplora.serve.failures import FAILURES, refused_reload, without_paths
from dlplora.serve.jobs import BadRequestError, Target
from dlplora.serve.middleware import BodyLimit, CountResponses
from dlplora.serve.schemas import COMPLETIONS, ERRORS, ROUTES, ChatRequest, CompletionRequest, RouteRequest
from dlplora.serve.server import Server, ServerOptions, error_body, error_of

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src {script}; connect-src 'self'; base-uri 'none'; form-action 'none'"
"""The page loads nothing, runs its own script only, and talks to this server only."""


log = logging.getLogger(__name__)
_TYPE = re.compile(r"(?:str|int)$|list\[|constrained-")
"""In the place of an error: a type of a union, which is no part of the request."""


def key_check(expected: str | None) -> Callable[[Request], None]:
    """A dependency that refuses requests without the expected API key; None asks for none."""

    def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = expected is None or secrets.compare_digest(given.strip().encode("latin-1"), expected.encode())
        if not right or (expected is not None and scheme.lower() != "bearer"):
            raise BadRequestError("a valid API key is required: send the header 'Authorization: Bearer KEY'.", None, "invalid_api_key", 401)

    return check


def build_app(engine: Engine, options: ServerOptions | None = None) -> FastAPI:
    """The application for one engine."""
    options = options or ServerOptions()
    server = Server(engine, options)
    app = FastAPI(title="dlplora", version=__version__, docs_url=None, redoc_url=None, responses=ERRORS)
    app.state.server = server
    app.add_middleware(BodyLimit, limit=options.max_body_bytes)
    app.add_middleware(CountResponses, counter=server.metrics.responses)
    add_error_handlers(app)
    _add_completions(app, server)
    _add_information(app, server)
    return app


def _add_completions(app: FastAPI, server: Server) -> None:
    protected = [Depends(key_check(server.options.api_key))]

    @app.post("/v1/chat/completions", dependencies=protected, responses=COMPLETIONS)
    async def chat(http: Request, request: ChatRequest) -> Response:
        return await server.complete(http, request, [await asyncio.to_thread(server.prompts.chat, request)], True)

    @app.post("/v1/completions", dependencies=protected, responses=COMPLETIONS)
    async def completions(http: Request, request: CompletionRequest) -> Response:
        prompts = await asyncio.to_thread(server.prompts.completion, request)
        return await server.complete(http, request, prompts, False)

    @app.post("/v1/route", dependencies=protected, responses=ROUTES)
    async def route(request: RouteRequest) -> dict[str, Any]:
        text = await asyncio.to_thread(server.prompts.to_route, request.prompt, request.messages)
        decisions, _ = await asyncio.to_thread(server.engine.call, lambda: server.engine.decider.decide([Target()], [text]))
        return {"object": "route", "read": text, **described(decisions[0])}


def _add_information(app: FastAPI, server: Server) -> None:
    protected = [Depends(key_check(server.options.api_key))]
    page = (resources.files("dlplora.serve") / "page.html").read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0].encode()
    policy = PAGE_POLICY.format(script=f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'")

    @app.get("/v1/models", dependencies=protected)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": server.catalog.cards()}

    @app.get("/v1/models/{name:path}", dependencies=protected)
    async def model(name: str) -> dict[str, Any]:
        return server.catalog.card(name)

    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> str:
        return "ok"

    @app.get("/ready")
    async def ready() -> JSONResponse:
        alive = server.engine.is_alive
        state = {"ready": alive, "running": server.engine.num_running, "waiting": server.engine.num_waiting}
        return JSONResponse(state, 200 if alive else 503)

    @app.get("/metrics", dependencies=protected, response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": policy, "x-content-type-options": "nosniff"})

    if server.options.admin_key is not None and server.options.reload is not None:
        reload = server.options.reload

        @app.post("/admin/reload", dependencies=[Depends(key_check(server.options.admin_key))])
        async def reload_pool() -> dict[str, Any]:
            try:
                return {"adapters": list(await asyncio.to_thread(reload))}
            except FAILURES as error:
                reason = refused_reload(error)
                log.warning(reason)
                raise BadRequestError(without_paths(reason, server.options.folders), status=409) from error


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's form."""

    @app.exception_handler(DLPLoRAError)
    async def known(_: Request, error: DLPLoRAError) -> JSONResponse:
        status, body = error_body(error)
        after = "1" if status == 429 else getattr(error, "retry_after", None)
        return JSONResponse(body, status, headers=None if after is None else {"retry-after": after})

    @app.exception_handler(Exception)  # starlette raises it again behind the response, so the log has it
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        status, body = error_body(error)
        return JSONResponse(body, status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"][1:] if not _TYPE.match(str(part))]
        if first["type"] == "json_invalid":
            return JSONResponse(error_of("the body is not valid JSON.", "invalid_request_error", None, None), 400)
        name = ".".join(place) or (first.get("ctx") or {}).get("param")
        message = str(first["msg"]).removeprefix("Value error, ")
        return JSONResponse(error_of(f"{name}: {message}" if name else message, "invalid_request_error", name, None), 400)

    @app.exception_handler(HTTPException)
    async def httperror_of(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_of(str(error.detail), "invalid_request_error", None, None), error.status_code, headers=error.headers)
