"""``dlplora serve --upstream``: route here, generate on another server."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from dlplora.errors import ConfigError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from dlplora.serve.upstream.client import UpstreamClient
    from dlplora.serve.upstream.kinds import Upstream


def add_upstream_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of an upstream server."""
    parser.add_argument("--upstream", metavar="URL", help="route here, generate on this server; only the embedding is loaded here")
    parser.add_argument("--upstream-kind", choices=["vllm", "sglang", "lorax", "llama.cpp"], help="what that server is")
    parser.add_argument("--upstream-model", metavar="NAME", help="its base model (default: the first that it lists)")
    parser.add_argument("--upstream-adapter", action="append", default=[], metavar="NAME=ID", help="name of an adapter on that server")
    parser.add_argument("--upstream-api-key", metavar="KEY", help="key of that server (or DLPLORA_UPSTREAM_API_KEY)")
    parser.add_argument("--upstream-timeout", type=float, default=300.0, metavar="S", help="longest silence in an answer (default: 300 s)")


def check_upstream(arguments: argparse.Namespace) -> None:
    """Refuse options that need each other or exclude each other.

    Raises:
        ConfigError: Naming them.
    """
    if arguments.upstream is None:
        for name in ("upstream_kind", "upstream_model", "upstream_adapter", "upstream_api_key"):
            if getattr(arguments, name):
                raise ConfigError(f"--{name.replace('_', '-')} needs --upstream URL.")
        return
    if arguments.upstream_kind is None:
        raise ConfigError("--upstream needs --upstream-kind: vllm, sglang, lorax or llama.cpp.")
    if not arguments.upstream_timeout > 0:
        raise ConfigError(f"--upstream-timeout must be above 0 s, got {arguments.upstream_timeout}.")


def parse_ids(texts: Sequence[str]) -> dict[str, str]:
    """``NAME=ID`` options.

    Raises:
        ConfigError: If one has another form.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name and value):
            raise ConfigError(f"--upstream-adapter expects NAME=ID, got '{text}'.")
        found[name] = value
    return found


async def find_upstream(
    client: UpstreamClient, kind: str, names: Sequence[str], *, model: str | None = None, given: dict[str, str] | None = None
) -> Upstream:
    """Ask an upstream server for its models and adapters.

    Args:
        client: Connection to it.
        kind: One of ``KINDS``.
        names: Adapters of the pool.
        model: Name of the base model there, if it is known.
        given: Adapter -> its name or number there, where it differs, and further adapters.

    Raises:
        ConfigError: If it cannot be reached, or has not loaded an adapter.
    """
    from dlplora.serve.upstream.kinds import Upstream, base_of, numbers_of, require_adapters

    given = given or {}
    ids = {name: given.get(name, name) for name in dict.fromkeys([*names, *given])}
    if kind == "llama.cpp":
        return Upstream(kind=kind, ids=numbers_of(await client.get("/lora-adapters"), names, given))
    if kind == "lorax":  # it lists no adapters: they are loaded when they are first asked for
        return Upstream(kind=kind, base=model or "", ids=ids)
    cards = (await client.get("/v1/models")).get("data") or []
    if kind == "vllm":
        require_adapters(cards, ids)
    return Upstream(kind=kind, base=base_of(cards, model), ids=ids)


def run_upstream(
    arguments: argparse.Namespace,
    listen: Callable[[], socket.socket],
    few_shot: Callable[[str, int], Any] | None,
    template: str | None,
    api_key: str | None,
) -> int:
    """Load the router, look at the upstream server, and serve until interrupted."""
    try:
        import httpx  # noqa: F401
        import uvicorn

        from dlplora.serve.upstream.app import build_upstream_app
    except ImportError as error:
        raise ConfigError(f"the server needs the package '{error.name}': pip install 'dlplora[serve]'.") from error
    from dlplora.cli.model_options import parse_parameter
    from dlplora.serve.catalog import public_name
    from dlplora.serve.server import ServerOptions
    from dlplora.serve.upstream.client import UpstreamClient, checked_url
    from dlplora.serve.upstream.local_router import LocalRouter
    from dlplora.serve.upstream.proxy import UpstreamProxy

    url = checked_url(arguments.upstream)
    key = arguments.upstream_api_key or os.environ.get("DLPLORA_UPSTREAM_API_KEY") or None
    given = parse_ids(arguments.upstream_adapter)
    router = LocalRouter(
        arguments.pretrained,
        pool=arguments.pool,
        method=arguments.method,
        method_params=dict(map(parse_parameter, arguments.method_param)),
        artifacts={"router": arguments.router, "multitask": arguments.multitask, "trained": arguments.trained},
        few_shot=few_shot,
    )

    async def look() -> Upstream:
        client = UpstreamClient(url, api_key=key, timeout_s=10.0)
        try:
            return await find_upstream(client, arguments.upstream_kind, router.bank.names, model=arguments.upstream_model, given=given)
        finally:
            await client.close()

    upstream = asyncio.run(look())
    options = ServerOptions(
        base_name=public_name(arguments.pretrained),
        created=int(time.time()),
        api_key=api_key,
        default_max_tokens=arguments.default_max_tokens,
        chat_template=template,
    )
    client = UpstreamClient(url, api_key=key, timeout_s=arguments.upstream_timeout)
    proxy = UpstreamProxy(router, upstream, client, options, arguments.min_confidence)
    listener = listen()
    server = uvicorn.Server(uvicorn.Config(build_upstream_app(proxy), log_level="warning", timeout_keep_alive=30))
    host, port = listener.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"dlplora: routing to {len(router.bank.names)} adapters of {url} on {where}", file=sys.stderr, flush=True)
    print(f"dlplora: {proxy.describe_scope()}", file=sys.stderr, flush=True)
    server.run(sockets=[listener])
    return 0
