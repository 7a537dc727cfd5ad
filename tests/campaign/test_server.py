"""Malformed requests: a 4xx in OpenAI's form, or an answer; and the server still answers everybody."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server's packages are not installed: pip install -e '.[serve]'")
pytest.importorskip("httpx", reason="httpx is not installed")
from starlette.testclient import TestClient

from dlplora.inference.fused_model import FusedCausalLM
from dlplora.serve.app import build_app
from dlplora.serve.engine import Engine, EngineOptions
from dlplora.serve.prompts import NANO_TEMPLATE
from dlplora.serve.server import ServerOptions
from tests.campaign import mutations
from tests.campaign.workplace import LIMIT_S

SEED = 20261126
COMMON = {"model": "base", "temperature": 0, "max_tokens": 2, "n": 1, "stop": ["x"], "seed": 1, "adapter_weights": {"gate_colors": 1.0}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": COMMON | {"messages": [{"role": "user", "content": "the cat"}], "logprobs": True, "dlplora": {"trace": True}},
    "/v1/completions": COMMON | {"prompt": ["the cat"], "logprobs": 2, "top_p": 0.5, "presence_penalty": 0.1},
    "/v1/route": {"prompt": "the cat"},
}
HALF = "\\ud800"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(FusedCausalLM.from_pretrained(method="dlp"), EngineOptions(max_batch=4, max_queue=8))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    options = ServerOptions(base_name="nano", chat_template=NANO_TEMPLATE, max_body_bytes=20_000, default_max_tokens=2)
    with TestClient(build_app(engine, options), raise_server_exceptions=False) as client:
        yield client


def check(client: TestClient, path: str, body: bytes, what: str) -> int:
    """Post a body; returns the status."""
    start = time.process_time()
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    assert time.process_time() - start < LIMIT_S, what
    assert response.status_code < 500, (what, response.text)
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}, what
        assert "\n" not in error["message"], what
        assert len(error["message"]) < 6_000, what
    return response.status_code


def check_bodies(client: TestClient, number: int) -> None:
    for path, body in BODIES.items():
        assert check(client, path, json.dumps(body).encode(), "sound") == 200
        for index in range(number):
            rng = random.Random(f"{SEED}{path}{index}")
            if rng.random() < 0.15:
                content, what = mutations.spoilt_bytes(json.dumps(body).encode(), rng)
            else:
                text, what = mutations.document(body, rng)
                content = text.encode("utf-8", "surrogatepass")
            check(client, path, content, f"{path}: {what}")
        assert check(client, path, json.dumps(body).encode(), "sound") == 200


@pytest.mark.campaign
def test_mutated_bodies(client: TestClient) -> None:
    check_bodies(client, 150)


def test_a_short_sample(client: TestClient) -> None:
    check_bodies(client, 8)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/route", f'{{"prompt": "{HALF}"}}'),
        ("/v1/route", f'{{"messages": [{{"role": "user", "content": "{HALF}"}}]}}'),
        ("/v1/completions", f'{{"prompt": "{HALF}"}}'),
        ("/v1/completions", f'{{"prompt": ["x", "{HALF}"]}}'),
        ("/v1/completions", f'{{"prompt": "x", "model": "{HALF}"}}'),
        ("/v1/completions", f'{{"prompt": "x", "stop": ["{HALF}"]}}'),
        ("/v1/completions", f'{{"prompt": "x", "adapter_weights": {{"{HALF}": 1}}}}'),
        ("/v1/chat/completions", f'{{"messages": [{{"role": "user", "content": "{HALF}"}}]}}'),
    ],
)
def test_half_of_a_surrogate_pair_ends_nothing(client: TestClient, path: str, body: str) -> None:
    """It ended the thread that serves everybody."""
    assert check(client, path, body.encode(), body) == 400
    assert client.get("/ready").status_code == 200
    assert client.post("/v1/route", json={"prompt": "the cat"}).status_code == 200


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), ValueError(""), AssertionError(), ZeroDivisionError()])
def test_an_error_of_one_call_is_its_callers(engine: Engine, error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        engine.call(fail)
    assert engine.call(lambda: 5) == 5
    assert engine.is_alive
