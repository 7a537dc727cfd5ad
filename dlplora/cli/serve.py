"""``dlplora serve``: options, start, reload and shutdown of the server."""

from __future__ import annotations

import argparse
import contextvars
import functools
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlplora.cli.pool import add_device_options
from dlplora.cli.serve_upstream import add_upstream_options, check_upstream, run_upstream
from dlplora.documents import read_text
from dlplora.errors import ConfigError, DLPLoRAError
from dlplora.interruption import exit_code

if TYPE_CHECKING:
    from dlplora.inference.fused_model import FusedCausalLM
    from dlplora.serve.engine import Engine
    from dlplora.tasks.registry import TrainingItems


def add_serve(commands: Any) -> argparse.ArgumentParser:
    """Declare ``serve``; returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve", help="run an OpenAI-compatible server that routes each request to adapters"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")
    parser.add_argument("--method", default="dlp", help="method that routes (default: dlp)")
    parser.add_argument("--method-param", action="append", default=[], metavar="KEY=VALUE", help="override a parameter of the method")
    parser.add_argument("--suite", metavar="NAME", help="suite of training rows, for methods that need them: nano, skills, local:TASK,TASK")
    parser.add_argument("--data-root", metavar="DIR", help="rows of local tasks (or DLPLORA_DATA)")
    add_device_options(parser)
    parser.add_argument("--max-batch", type=int, default=16, help="requests that run at once (default: 16)")
    parser.add_argument("--max-queue", type=int, default=64, help="waiting requests; further ones get status 429 (default: 64)")
    parser.add_argument("--max-model-len", type=int, help="tokens of a request, prompt included (default: the model's, at most 4096)")
    parser.add_argument("--default-max-tokens", type=int, default=512, help="tokens of a chat answer that sets no limit (default: 512)")
    parser.add_argument(
        "--min-confidence",
        type=float,
        metavar="P",
        help="the base model answers below this router probability; 0 turns this off (default: the threshold beside the router, if any)",
    )
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja chat template (default: the tokenizer's)")
    parser.add_argument("--api-key", help="key that clients must send (or DLPLORA_API_KEY); required unless the address is loopback")
    parser.add_argument("--admin-key", help="key of POST /admin/reload (or DLPLORA_ADMIN_KEY); without a key the endpoint is off")
    parser.add_argument("--insecure", action="store_true", help="allow other addresses than loopback without a key")
    add_upstream_options(parser)
    return parser


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(arguments: argparse.Namespace, api_key: str | None) -> None:
    if not _is_loopback(arguments.host) and api_key is None and not arguments.insecure:
        raise ConfigError(f"--host {arguments.host} can be reached from other machines: set --api-key, or pass --insecure.")
    if not 0 <= arguments.port <= 65535:
        raise ConfigError(f"--port must be between 0 and 65535, got {arguments.port}.")
    check_upstream(arguments)
    if arguments.default_max_tokens < 1:
        raise ConfigError(f"--default-max-tokens must be at least 1, got {arguments.default_max_tokens}.")


def _template(arguments: argparse.Namespace) -> str | None:
    from dlplora.serve.prompts import NANO_TEMPLATE

    if arguments.chat_template is None:
        return NANO_TEMPLATE if arguments.pretrained is None else None
    path = Path(arguments.chat_template)
    if not path.is_file():
        raise ConfigError(f"chat template not found: {path}.")
    return read_text(path)


def _few_shot(arguments: argparse.Namespace) -> TrainingItems | None:
    """Training items of a task, for methods that need examples; None without a suite."""
    from dlplora.tasks.registry import training_items

    suite = arguments.suite or ("nano" if arguments.pretrained is None else None)
    return None if suite is None else training_items(suite, arguments.data_root)


def _loader(arguments: argparse.Namespace) -> Callable[[], FusedCausalLM]:
    """A function that loads the model; called again for a reload."""
    from dlplora.cli.model_options import parse_parameter
    from dlplora.inference.fused_model import FusedCausalLM
    from dlplora.serve.catalog import check_names, public_name
    from dlplora.serve.deciding import require_servable

    options: dict[str, Any] = {key: value for key, value in (("dtype", arguments.dtype), ("device", arguments.device)) if value is not None}
    artifacts = {} if arguments.trained is None else {"trained": arguments.trained}

    def load() -> FusedCausalLM:
        fused = FusedCausalLM.from_pretrained(
            arguments.pretrained,
            pool=arguments.pool,
            method=arguments.method,
            router=arguments.router,
            multitask=arguments.multitask,
            method_params=dict(map(parse_parameter, arguments.method_param)),
            artifacts=artifacts,
            few_shot=_few_shot(arguments),
            **options,
        )
        try:
            check_names(fused.bank.names, public_name(arguments.pretrained))
            require_servable(fused)
        except DLPLoRAError:
            fused.close()  # before a reload takes up the old pool again
            raise
        return fused

    return load


def _folders(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The folders of the command line, as given and as absolute paths."""
    given = [arguments.pretrained, arguments.pool, arguments.router, arguments.multitask, arguments.trained, arguments.data_root]
    return tuple({name for one in given if one is not None and Path(one).exists() for name in (one, str(Path(one).resolve()))})


def reloader(engine: Engine, load: Callable[[], FusedCausalLM], context: contextvars.Context) -> Callable[[], Sequence[str]]:
    """A function that loads the pool again once no request is in a slot; requests that wait are not dropped.

    Args:
        engine: The running engine.
        load: Loads the model.
        context: Where the base model was loaded, so that it is not read again.
    """

    def swap() -> FusedCausalLM:
        from dlplora.inference.fused_model import FusedCausalLM
        from dlplora.serve.failures import FAILURES

        old = engine.fused
        old.close()
        try:
            return context.copy().run(_in_its_own_thread, load)
        except FAILURES:
            engine.adopt(FusedCausalLM(old.model, old.tokenizer, old.pool, old.method, backend=old.backend, context=old.context))
            raise

    def reload() -> Sequence[str]:
        engine.run_idle(swap)
        return engine.decider.names

    return reload


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port.") from error
    return listener


def run_serve(arguments: argparse.Namespace) -> int:
    """Load, listen, and serve until interrupted."""
    try:
        return _run(arguments)
    except KeyboardInterrupt as error:
        print("dlplora: the server has stopped.", file=sys.stderr)
        return exit_code(error)


def _run(arguments: argparse.Namespace) -> int:
    api_key = arguments.api_key or os.environ.get("DLPLORA_API_KEY") or None
    admin_key = arguments.admin_key or os.environ.get("DLPLORA_ADMIN_KEY") or None
    _check(arguments, api_key)
    if arguments.upstream is not None:
        listen = functools.partial(_listen, arguments.host, arguments.port)
        return run_upstream(arguments, listen, _few_shot(arguments), _template(arguments), api_key)
    try:
        import uvicorn

        from dlplora.serve.app import build_app
    except ImportError as error:
        raise ConfigError(f"the server needs the package '{error.name}': pip install 'dlplora[serve]'.") from error
    from dlplora.inference.loading import backbones_kept
    from dlplora.serve.catalog import public_name
    from dlplora.serve.engine import Engine, EngineOptions
    from dlplora.serve.server import ServerOptions

    options = EngineOptions(
        max_batch=arguments.max_batch,
        max_queue=arguments.max_queue,
        max_model_len=arguments.max_model_len,
        min_confidence=arguments.min_confidence,
    )
    template = _template(arguments)
    listener = _listen(arguments.host, arguments.port)
    with backbones_kept():
        load = _loader(arguments)
        engine = _in_its_own_thread(lambda: Engine(load(), options))
        reload = reloader(engine, load, contextvars.copy_context())
        server_options = ServerOptions(
            base_name=public_name(arguments.pretrained),
            created=int(time.time()),
            api_key=api_key,
            admin_key=admin_key,
            default_max_tokens=arguments.default_max_tokens,
            chat_template=template,
            reload=reload,
            folders=_folders(arguments),
        )
        server = uvicorn.Server(uvicorn.Config(build_app(engine, server_options), log_level="warning", timeout_keep_alive=30))
        _reload_on_signal(reload)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"dlplora: serving {len(engine.decider.names)} adapters on http://{shown}:{port}", file=sys.stderr, flush=True)
        print(f"dlplora: {engine.decider.describe_scope()}", file=sys.stderr, flush=True)
        try:
            server.run(sockets=[listener])
        finally:
            engine.close()
    return 0


def _in_its_own_thread(work: Callable[[], Any]) -> Any:
    """What ``work`` returns or raises, from a thread that ends with it.

    OpenMP keeps a pool of threads for every thread that has computed something. As soon as all pools together have more threads than
    there are cores, threads that wait sleep between two operations instead of spinning, and a decoding step of a small model takes half
    as long again. With loading done and its thread gone, the engine's thread is the only one with a pool.
    """
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(contextvars.copy_context().run, work).result()


def _reload_on_signal(reload: Callable[[], Sequence[str]]) -> None:
    """Reload the pool on SIGHUP, in a thread of its own: the signal handler must return at once."""
    from dlplora.serve.failures import FAILURES, refused_reload

    def work() -> None:
        try:
            print(f"dlplora: reloaded, {len(reload())} adapters", file=sys.stderr, flush=True)
        except FAILURES as error:
            print(f"dlplora: {refused_reload(error)}", file=sys.stderr, flush=True)

    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=work, daemon=True).start())
