"""The server through its endpoints."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server's packages are not installed: pip install -e '.[serve]'")
pytest.importorskip("httpx", reason="httpx is not installed")
from starlette.testclient import TestClient

from dlplora.inference.fused_model import FusedCausalLM
from dlplora.serve.answers import headers_of
from dlplora.serve.app import build_app
from dlplora.serve.engine import Engine, EngineOptions
from dlplora.serve.jobs import Decision, Target
from dlplora.serve.prompts import NANO_TEMPLATE, PromptBuilder
from dlplora.serve.schemas import ChatRequest
from dlplora.serve.server import ServerOptions
from tests.e2e.asked import GATE, ZARGI


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(FusedCausalLM.from_pretrained(method="dlp"), EngineOptions(max_batch=4, max_queue=8))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    options = ServerOptions(base_name="nano", chat_template=NANO_TEMPLATE, max_body_bytes=20_000)
    with TestClient(build_app(engine, options)) as client:
        yield client


def chat(text: str = ZARGI, **options: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": text}], "temperature": 0, **options}


def events(response: Any) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("text", [ZARGI, GATE])
def test_a_chat_answer_is_that_of_generate(client: TestClient, alone: dict[str, str], text: str) -> None:
    response = client.post("/v1/chat/completions", json=chat(text, dlplora={"trace": True}))
    body = response.json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": alone[text]}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    wanted = {ZARGI: "translate_zargi", GATE: "gate_colors"}[text]
    assert response.headers["x-dlplora-selected-adapter"] == wanted
    assert response.headers["x-dlplora-decision"] == "routed"
    assert float(response.headers["x-dlplora-confidence"]) > 0.9
    (trace,) = body["dlplora"]["choices"]
    assert [(one["text"], one["weights"]) for one in trace] == [(alone[text], {wanted: 1.0})]


def test_a_temperature_near_zero_is_greedy_beside_another_request(client: TestClient, alone: dict[str, str]) -> None:
    bodies = [chat(ZARGI, temperature=1e-38, n=2), chat(GATE)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda body: client.post("/v1/chat/completions", json=body).json(), bodies))
    assert [choice["message"]["content"] for body in found for choice in body["choices"]] == [alone[ZARGI], alone[ZARGI], alone[GATE]]


def test_a_stream_adds_up_to_the_answer(client: TestClient, alone: dict[str, str]) -> None:
    response = client.post(
        "/v1/chat/completions", json=chat(stream=True, stream_options={"include_usage": True}, dlplora={"trace": True}, n=2)
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    texts = {0: "", 1: ""}
    for event in events(response):
        assert event["object"] == "chat.completion.chunk"
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: alone[ZARGI], 1: alone[ZARGI]}
    last = events(response)[-1]
    assert last["usage"]["completion_tokens"] == 12
    assert last["dlplora"]["choices"][1][0]["adapter"] == "translate_zargi"


def test_completions_of_several_prompts_and_token_lists(client: TestClient, alone: dict[str, str], engine: Engine) -> None:
    prompts = [f"{ZARGI}\nAnswer:", f"{GATE}\nAnswer:"]
    ids = [engine.fused.tokenizer(prompt)["input_ids"] for prompt in prompts]
    for given in (prompts, ids):
        body = client.post("/v1/completions", json={"model": "auto", "prompt": given, "temperature": 0, "max_tokens": 30}).json()
        assert [choice["text"] for choice in body["choices"]] == [alone[ZARGI], alone[GATE]]
        assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
    body = client.post("/v1/completions", json={"prompt": prompts[0], "temperature": 0, "stop": [" zaro"], "logprobs": 1}).json()
    assert body["choices"][0]["text"] == " ru zuza"
    found = body["choices"][0]["logprobs"]
    assert (found["tokens"][:2], found["text_offset"][:2]) == ([" ru", " zuza"], [0, 3])
    assert [list(one) for one in found["top_logprobs"][:2]] == [[" ru"], [" zuza"]]


def test_models_pins_and_weights(client: TestClient) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert (cards[0]["id"], cards[0]["parent"], cards[-1]["id"]) == ("base", None, "auto")
    card = client.get("/v1/models/gate_colors").json()
    assert (card["root"], card["parent"]) == ("gate_colors", "base")
    answers = {
        name: client.post("/v1/chat/completions", json=chat(GATE, model=name, max_tokens=8)).json()["choices"][0]["message"]["content"]
        for name in ("gate_colors", "base:gate_colors", "nano:gate_colors", "bridge_colors", "base", "nano")
    }
    assert answers["gate_colors"] == answers["base:gate_colors"] == answers["nano:gate_colors"] == " no"
    assert answers["base"] == answers["nano"] != " no"
    weighted = chat(GATE, model="base", adapter_weights={"gate_colors": 1.0}, dlplora={"trace": True})
    body = client.post("/v1/chat/completions", json=weighted).json()
    assert body["choices"][0]["message"]["content"] == " no"
    assert body["dlplora"]["choices"][0][0]["decision"] == "weights"


def test_a_route_without_an_answer(client: TestClient) -> None:
    body = client.post(
        "/v1/route", json={"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": GATE}]}
    ).json()
    assert body["adapter"] == "gate_colors"
    assert body["read"] == f"{GATE}\nAnswer:"


@pytest.mark.parametrize(("path", "param"), [("/v1/route", "prompt"), ("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")])
def test_reading_a_prompt_does_not_hold_up_other_requests(
    path: str, param: str, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()

    def slow(self: PromptBuilder, *_: Any) -> str:
        begun.set()
        assert ended.wait(20), "the event loop was held up"
        return GATE

    body = chat(GATE, max_tokens=2) if param == "messages" else {"prompt": GATE}
    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as threads:
        patch.setattr(PromptBuilder, "question", slow)
        patch.setattr(PromptBuilder, "routed_text", slow)
        answer = threads.submit(client.post, path, json=body)
        assert begun.wait(20)
        assert client.get("/health").text == "ok"
        ended.set()
        assert answer.result().status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "the cat " * 600}, "prompt", "the context is"),
        ({"messages": [{"role": "system", "content": "the cat " * 600}, {"role": "user", "content": "x"}]}, "messages", "the context is"),
        ({"prompt": ""}, "prompt", "nothing to route"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages", "nothing to route"),
        ({}, "prompt", "either"),
    ],
)
def test_what_is_not_routed(body: dict[str, Any], param: str, message: str, client: TestClient) -> None:
    response = client.post("/v1/route", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert message in response.json()["error"]["message"]


def test_a_decision_reads_the_router_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    router: Any = engine.fused.method.router
    calls, real = [], router.probabilities
    monkeypatch.setattr(router, "probabilities", lambda *given: calls.append(len(given[0])) or real(*given))  # type: ignore[func-returns-value]
    decisions, weights = engine.decider.decide([Target(), Target()], [ZARGI, GATE])
    assert calls == [2]
    assert [decision.adapter for decision in decisions] == ["translate_zargi", "gate_colors"]
    assert weights.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])


BAD = [
    ({"model": "gate_color"}, 404, "model", "Did you mean 'gate_colors'?"),
    ({"messages": []}, 400, "messages", "at least 1"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "messages", ""),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages", ""),
    ({"n": 17}, 400, "n", "16"),
    ({"n": 0}, 400, "n", ""),
    ({"temperature": -1}, 400, "temperature", ""),
    ({"temperature": False}, 400, "temperature", ""),
    ({"max_tokens": "5"}, 400, "max_tokens", ""),
    ({"temperature": float("nan")}, 400, "temperature", ""),
    ({"top_p": -0.1}, 400, "top_p", ""),
    ({"n": 9}, 400, "n", "--max-queue is 8"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0", "needs 'content'"),
    ({"messages": [{"role": "tool"}]}, 400, "messages.0", "needs 'content'"),
    ({"max_tokens": 0}, 400, "max_tokens", ""),
    ({"max_tokens": 5000}, 400, "max_tokens", "context"),
    ({"stop": ["x"] * 17}, 400, "stop", ""),
    ({"tools": [{"type": "function"}]}, 400, "tools", "'tools' is not supported"),
    ({"user": "\ud800"}, 400, "user", "surrogate"),
    ({"adapter_weights": {"gate_colors": 1.0}}, 400, "adapter_weights", "needs model 'base'"),
    ({"model": "base", "adapter_weights": {"gate_color": 1.0}}, 400, "adapter_weights", "Did you mean 'gate_colors'?"),
    ({"model": "base", "adapter_weights": {"gate_colors": -1}}, 400, "adapter_weights", ""),
    ({"model": "base", "adapter_weights": {"gate_colors": float("inf")}}, 400, "adapter_weights", ""),
    ({"dlplora": {"traces": True}}, 400, "dlplora", ""),
    ({"seed": 2**70}, 400, "seed", ""),
    ({"messages": [{"role": "user", "content": "the cat " * 600}]}, 400, "messages", "no room"),
    ({"messages": [{"role": "user", "content": "x" * 30_000}]}, 413, None, "20000 bytes"),
]


@pytest.mark.parametrize(("change", "status", "param", "message"), BAD, ids=[str(change)[:50] for change, *_ in BAD])
def test_bad_requests_are_refused_in_openai_s_form(client: TestClient, change: Any, status: int, param: str | None, message: str) -> None:
    response = client.post("/v1/chat/completions", content=json.dumps({**chat(), **change}), headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert param is None or str(error["param"]).startswith(param)
    assert message in error["message"]
    assert "/" not in error["message"].replace("/v1", ""), "no paths"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"messages": 5}', b"[" * 5000])
def test_bodies_that_are_no_requests(client: TestClient, content: bytes) -> None:
    response = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "message" in response.json()["error"]


def test_unknown_fields_are_ignored_and_unsupported_ones_may_ask_for_nothing(client: TestClient) -> None:
    response = client.post("/v1/chat/completions", json=chat(user="me", store=True, tools=[], response_format={"type": "text"}))
    assert response.status_code == 200


NULLS = (
    "n",
    "stream",
    "ignore_eos",
    "stop",
    "temperature",
    "top_p",
    "seed",
    "logprobs",
    "adapter_weights",
    "dlplora",
    "max_tokens",
    "tools",
)


@pytest.mark.parametrize(
    "change",
    [
        dict.fromkeys(NULLS) | {"temperature": 0},
        {"temperature": None, "top_p": 0},
        {"stream_options": {"include_usage": None}, "dlplora": {"trace": None}},
    ],
)
def test_null_is_the_default(change: dict[str, Any], client: TestClient, alone: dict[str, str]) -> None:
    for path, body in (("/v1/chat/completions", chat(GATE)), ("/v1/completions", {"prompt": f"{GATE}\nAnswer:", "temperature": 0})):
        response = client.post(path, json={**body, **change, "model": None})
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        assert choice.get("text", choice.get("message", {}).get("content")) == alone[GATE]


def test_calls_of_tools_in_a_conversation(client: TestClient, engine: Engine, alone: dict[str, str]) -> None:
    """The chat template gets them with their arguments as objects."""
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "gate"}'}}
    said = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "brown"},
        {"role": "user", "content": GATE},
    ]
    response = client.post("/v1/chat/completions", json=chat(messages=said, dlplora={"trace": True}))
    assert response.status_code == 200, response.text
    assert response.headers["x-dlplora-selected-adapter"] == "gate_colors"
    place = "{% if one.tool_calls %}{{ one.tool_calls[0].function.arguments.at }}{% endif %}"
    template = "{% for one in messages %}{{ one.role }} " + place + " {{ one.tool_call_id }};{% endfor %}"
    request = ChatRequest.model_validate(chat(messages=said))
    assert PromptBuilder(engine.fused.tokenizer, 999, 999, template).chat(request).text == "user  ;assistant gate ;tool  c1;user  ;"


def test_health_metrics_and_the_page(client: TestClient) -> None:
    assert client.get("/health").text == "ok"
    assert client.get("/ready").json()["ready"] is True
    assert client.post("/v1/chat/completions", json=chat(GATE)).status_code == 200
    until = time.monotonic() + 10
    while "dlplora_requests_running 0.0" not in (metrics := client.get("/metrics").text):  # the slot is freed after the answer is sent
        assert time.monotonic() < until
    assert 'dlplora_decisions_total{adapter="gate_colors",decision="routed"}' in metrics
    page = client.get("/")
    assert "script-src 'sha256-" in page.headers["content-security-policy"]
    assert not re.search(r"\son\w+=|https?://", page.text), "no inline handlers, nothing from elsewhere"
    assert client.get("/nothing").json()["error"]["message"] == "Not Found"


def test_keys(engine: Engine) -> None:
    calls = []
    options = ServerOptions(api_key="secret", admin_key="admin", chat_template=NANO_TEMPLATE, reload=lambda: calls.append(1) or ["a"])  # type: ignore[func-returns-value]
    with TestClient(build_app(engine, options)) as client:
        for key in (None, "secre", "secrets", "sécret", ""):
            headers = {} if key is None else {"authorization": f"Bearer {key}".encode()}
            for path in ("/v1/models", "/metrics"):
                assert client.get(path, headers=headers).status_code == 401
            assert client.post("/v1/chat/completions", json=chat(), headers=headers).json()["error"]["type"] == "authentication_error"
        for scheme, status in (("Bearer", 200), ("bearer", 200), ("BEARER ", 200), ("Basic", 401), ("", 401)):
            assert client.get("/v1/models", headers={"authorization": f"{scheme} secret"}).status_code == status
        assert client.get("/health").status_code == 200
        assert client.post("/admin/reload", headers={"authorization": "Bearer secret"}).status_code == 401
        assert client.post("/admin/reload", headers={"authorization": "Bearer admin"}).json() == {"adapters": ["a"]}
    assert calls == [1]


def test_an_unexpected_error_is_500_in_openai_s_form(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "submit", lambda *_: {}["/srv/secret"])
    failed = TestClient(client.app, raise_server_exceptions=False).post("/v1/chat/completions", json=chat())
    assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in failed.text


def test_a_full_queue_is_429(engine: Engine, client: TestClient) -> None:
    response = client.post("/v1/completions", json={"prompt": ["x"] * 9, "max_tokens": 2})
    assert response.status_code == 400
    response = client.post("/v1/completions", json={"prompt": ["the"] * 8, "max_tokens": 2, "ignore_eos": True, "n": 1})
    assert len(response.json()["choices"]) == 8

    blocker = threading.Event()
    busy = threading.Thread(target=engine.call, args=(lambda: blocker.wait(30),))
    busy.start()
    results: list[int] = []
    waiting = threading.Thread(
        target=lambda: results.append(client.post("/v1/completions", json={"prompt": ["the"] * 8, "max_tokens": 1}).status_code)
    )
    waiting.start()
    while engine.num_waiting < 8:
        time.sleep(0.01)
    refused = client.post("/v1/chat/completions", json=chat())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    blocker.set()
    busy.join()
    waiting.join()
    assert results == [200]


def test_a_header_holds_any_name() -> None:
    headers = headers_of(Decision(kind="routed", weights={"größe 1%\n": 1.0}))
    assert headers["x-dlplora-selected-adapter"] == "gr%C3%B6%C3%9Fe%201%25%0A"
    assert headers_of(Decision(kind="routed", weights={"a-b_c.d": 1.0}))["x-dlplora-selected-adapter"] == "a-b_c.d"
