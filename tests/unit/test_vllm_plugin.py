"""The endpoint plug-in against vLLM's interface, with a stub in the place of vLLM's endpoints."""

from __future__ import annotations

import asyncio
import tomllib
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server's packages are not installed: pip install -e '.[serve]'")
pytest.importorskip("httpx", reason="httpx is not installed")
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from dlplora.errors import ConfigError
from dlplora.inference.backbones import nano_asset
from dlplora.serve.deciding import Decider

ROOT = Path(__file__).resolve().parents[2]
ZARGI = "Please write in Zargi: the cat sees the hat.\nAnswer:"


def plugin() -> Any:
    """As vLLM makes it: the entry point is a callable without arguments."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    module, _, name = groups["vllm.endpoint_plugins"]["dlplora"].partition(":")
    return getattr(import_module(module), name)()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[TestClient, list[dict[str, Any]]]]:
    """The order of vLLM: its own routes, then the plug-in's, then the state."""
    app, seen = FastAPI(), []

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def core(http: Request) -> dict[str, Any]:
        body = await http.json()
        seen.append(body)
        return {"model": body.get("model")}

    one = plugin()
    assert one.name == "dlplora"
    assert one.required_tasks is None or "generate" in one.required_tasks
    one.attach_router(app)
    with TestClient(app) as client:
        assert client.post("/v1/route", json={"prompt": "x"}).status_code == 503  # the engine is not there yet
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("DLPLORA_POOL", str(nano_asset("pool")))
            patched.setenv("DLPLORA_ROUTER", str(nano_asset("router")))
            modules = [Namespace(name="translate_zargi", path="/x")]
            args = Namespace(model=str(nano_asset("backbone")), served_model_name=["nano"], lora_modules=modules)
            asyncio.run(one.init_state(object(), app.state, args))
        yield client, seen


def test_auto_becomes_the_name_of_an_adapter(served: Any) -> None:
    client, seen = served
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    message = {"role": "user", "content": [{"type": "text", "text": ZARGI}, image]}
    for body in ({"prompt": ZARGI}, {"prompt": [ZARGI], "tools": [1]}, {"messages": [{"role": "tool", "content": "x"}, message]}):
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        response = client.post(path, json={**body, "model": "auto"})
        assert response.json() == {"model": "translate_zargi"}
        assert seen[-1] == {**body, "model": "translate_zargi"}
        assert response.headers["x-dlplora-selected-adapter"] == "translate_zargi"
        assert response.headers["x-dlplora-decision"] == "routed"


def test_all_else_passes_as_it_is(served: Any) -> None:
    client, seen = served
    response = client.post("/v1/completions", json={"prompt": ZARGI, "model": "gate_colors"})
    assert seen[-1] == {"prompt": ZARGI, "model": "gate_colors"}
    assert not [name for name in response.headers if name.startswith("x-dlplora")]


def test_a_route_without_an_answer(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, seen = served
    before = len(seen)
    found = client.post("/v1/route", json={"prompt": ZARGI}).json()
    assert (found["object"], found["model"], found["decision"]) == ("route", "translate_zargi", "routed")
    assert len(seen) == before
    for path, body in (("/v1/route", {}), ("/v1/completions", {"model": "auto", "prompt": [1, 2]}), ("/v1/completions", {"model": "auto"})):
        refused = client.post(path, json=body)
        assert refused.status_code == 400
        assert "no text to route" in refused.json()["error"]["message"]
    refused = client.post("/v1/route", json={"prompt": "the cat " * 3000})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    with monkeypatch.context() as patch:
        patch.setattr(Decider, "decide", lambda *_: {}["of the router"])
        for path in ("/v1/route", "/v1/completions"):
            failed = client.post(path, json={"model": "auto", "prompt": ZARGI})
            assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")


def test_a_pool_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLPLORA_POOL", raising=False)
    with pytest.raises(ConfigError, match="DLPLORA_POOL"):
        asyncio.run(plugin().init_state(None, Namespace(), Namespace(model="x")))
