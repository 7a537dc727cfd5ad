"""``dlplora serve --upstream`` against stubs of the documented APIs: what they are sent, and what comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server's packages are not installed: pip install -e '.[serve]'")
pytest.importorskip("httpx", reason="httpx is not installed")
import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.testclient import TestClient

from dlplora import FusedCausalLM
from dlplora.cli.main import main
from dlplora.cli.serve_upstream import find_upstream
from dlplora.errors import ConfigError
from dlplora.serve.prompts import NANO_TEMPLATE
from dlplora.serve.server import ServerOptions
from dlplora.serve.upstream.app import build_upstream_app
from dlplora.serve.upstream.client import UpstreamClient, checked_url
from dlplora.serve.upstream.local_router import LocalRouter
from dlplora.serve.upstream.proxy import UpstreamProxy

ZARGI = "Please write in Zargi: the cat sees the hat."
GATE = "Tom is at the gate with a brown glove. Does Tom pass?"
MESSAGES = [{"role": "user", "content": ZARGI}]


class Stub:
    """An upstream server of one kind that knows its adapters and keeps what it is sent."""

    def __init__(self, kind: str, adapters: list[str]) -> None:
        self.kind, self.adapters = kind, adapters
        self.seen: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.fails: Callable[[], Any] | None = None
        self.app = FastAPI()
        self.app.add_api_route("/health", lambda: "ok", methods=["GET"])
        if kind == "llama.cpp":
            rows = [{"id": i, "path": f"/models/{name}.gguf", "scale": 0.0} for i, name in enumerate([*adapters, "other"])]
            self.app.add_api_route("/lora-adapters", lambda: JSONResponse(rows), methods=["GET"])
        elif kind != "lorax":
            cards = [{"id": "BASE", "parent": None}, *({"id": name, "parent": "BASE"} for name in adapters)]
            self.app.add_api_route("/v1/models", lambda: JSONResponse({"object": "list", "data": cards}), methods=["GET"])
        for path in ("/v1/chat/completions", "/v1/completions", "/generate", "/generate_stream"):
            self.app.add_api_route(path, self.answer, methods=["POST"])

    async def answer(self, http: Request) -> Any:
        body, path = await http.json(), http.url.path
        self.seen.append((path, body, dict(http.headers)))
        if self.fails is not None:
            return self.fails()
        known = {"BASE", *self.adapters, *(f"BASE:{name}" for name in self.adapters)}
        if self.kind in {"vllm", "sglang"} and body.get("model") not in known:
            return JSONResponse({"error": {"message": "The model does not exist."}}, 404)
        if path == "/generate":
            details = {"finish_reason": "eos_token", "prompt_tokens": 4, "generated_tokens": 2}
            return {"generated_text": "merged text", "details": details}
        if path == "/generate_stream":
            last = {"finish_reason": "length", "prompt_tokens": 4, "generated_tokens": 2}
            events = [{"token": {"text": "merged"}, "details": None}, {"token": {"text": " text"}, "details": last}]
        elif body.get("stream"):
            events = [{"model": "/models/base.gguf", "choices": [{"index": 0, "delta": {"content": text}}]} for text in ("an", " answer")]
        else:
            message = {"message": {"role": "assistant", "content": "an answer"}}
            return {"id": "x", "model": "/models/base.gguf", "choices": [{"index": 0, **message, "finish_reason": "stop"}]}
        end = "" if path == "/generate_stream" else "data: [DONE]\n\n"  # LoRAX's own endpoint has no such event
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + end
        return StreamingResponse(iter([lines]), media_type="text/event-stream")


@pytest.fixture(scope="module")
def router() -> LocalRouter:
    return LocalRouter(artifacts={"router": None, "multitask": None})


@contextmanager
def doors(router: LocalRouter, stub: Stub, transport: Any = None, **options: Any) -> Iterator[TestClient]:
    transport = transport or httpx.ASGITransport(app=stub.app)
    names = router.bank.names

    async def look() -> Any:
        return await find_upstream(UpstreamClient("http://up", transport=httpx.ASGITransport(app=stub.app)), stub.kind, names, model="BASE")

    upstream = asyncio.run(look())
    client = UpstreamClient("http://up", api_key="theirs", transport=transport)
    proxy = UpstreamProxy(router, upstream, client, ServerOptions(base_name="nano", chat_template=NANO_TEMPLATE, **options))
    with TestClient(build_upstream_app(proxy)) as front:
        yield front


def stub_of(kind: str, router: LocalRouter) -> Stub:
    return Stub(kind, list(router.bank.names))


def test_routing_needs_no_layers_and_decides_as_the_whole_model(router: LocalRouter) -> None:
    fused = FusedCausalLM.from_pretrained(method="dlp", dtype="float32", device="cpu")
    stub = stub_of("vllm", router)
    with doors(router, stub) as front:
        for text in (ZARGI, GATE):
            found = front.post("/v1/route", json={"messages": [{"role": "user", "content": text}]}).json()
            expected: list[dict[str, Any]] = []
            fused.generate_text(f"{text}\nAnswer:", max_new_tokens=1, do_sample=False, trace=expected)
            assert found["weights"] == pytest.approx(expected[0]["weights"], abs=1e-5)
            assert found["applied"] == {found["adapter"]: 1.0}
    assert not stub.seen


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_one_adapter_by_name(kind: str, router: LocalRouter) -> None:
    stub = stub_of(kind, router)
    prefix = "BASE:" if kind == "sglang" else ""
    with doors(router, stub) as front:
        for model, wanted in (("auto", prefix + "translate_zargi"), ("base", "BASE"), ("gate_colors", prefix + "gate_colors")):
            body = {"model": model, "messages": MESSAGES, "max_tokens": 5, "temperature": 0, "dlplora": {"trace": True}}
            response = front.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            assert stub.seen[-1][:2] == (
                "/v1/chat/completions",
                {"model": wanted, "messages": MESSAGES, "max_tokens": 5, "temperature": 0.0},
            )
            assert response.json()["model"] == model
            assert response.json()["dlplora"]["adapter"] == response.headers["x-dlplora-selected-adapter"]
        two = {"model": "base", "messages": MESSAGES, "adapter_weights": {"gate_colors": 0.5, "translate_zargi": 0.5}}
        refused = front.post("/v1/chat/completions", json=two)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "adapter_weights")
        unknown = front.post("/v1/chat/completions", json={"model": "gate_color", "messages": MESSAGES})
        assert unknown.status_code == 404
        assert "gate_colors" in unknown.json()["error"]["message"]
        names = [card["id"] for card in front.get("/v1/models").json()["data"]]
        assert names == ["base", *router.bank.names, "auto"]
        assert front.get("/ready").status_code == 200
        assert 'dlplora_decisions_total{adapter="translate_zargi",decision="routed"}' in front.get("/metrics").text


def test_all_weights_for_llama_cpp_and_none_is_left_as_the_server_started(router: LocalRouter) -> None:
    stub = stub_of("llama.cpp", router)
    number = {name: i for i, name in enumerate(router.bank.names)}
    with doors(router, stub) as front:

        def scales(**body: Any) -> dict[int, float]:
            response = front.post("/v1/completions", json={"prompt": f"{ZARGI}\nAnswer:", **body})
            assert response.status_code == 200, response.text
            sent = stub.seen[-1][1]["lora"]
            assert [one["id"] for one in sent] == list(range(len(number) + 1))  # "other" is not in the pool and gets 0, too
            return {one["id"]: one["scale"] for one in sent if one["scale"]}

        weights = {"gate_colors": 0.25, "translate_zargi": 1.5}
        assert scales(model="base", adapter_weights=weights) == {number[name]: weight for name, weight in weights.items()}
        assert scales(model="base") == {}
        assert scales(model="auto") == {number["translate_zargi"]: 1.0}
        assert "model" not in stub.seen[-1][1]


def test_lorax_merges_several_and_names_one(router: LocalRouter) -> None:
    stub = stub_of("lorax", router)
    weights = {"gate_colors": 0.25, "translate_zargi": 0.75}
    with doors(router, stub) as front:
        body = {"model": "base", "messages": MESSAGES, "adapter_weights": weights, "temperature": 1e-9, "stop": "x", "max_tokens": 7}
        found = front.post("/v1/chat/completions", json=body).json()
        path, sent, _ = stub.seen[-1]
        assert (path, sent["inputs"]) == ("/generate", f"{ZARGI}\nAnswer:")
        merged = {"ids": list(weights), "weights": list(weights.values()), "merge_strategy": "linear"}
        options = {"max_new_tokens": 7, "do_sample": False, "stop": ["x"], "return_full_text": False, "details": True}
        assert sent["parameters"] == {"merged_adapters": merged, **options}
        assert found["choices"][0]["message"]["content"] == "merged text"
        assert (found["choices"][0]["finish_reason"], found["usage"]["total_tokens"]) == ("stop", 6)
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        lines = front.post("/v1/chat/completions", json={**body, **streamed}).text.split("\n\n")
        assert "data: [DONE]" in lines
        *events, usage = (json.loads(line[6:]) for line in lines if line.startswith("data: {"))
        assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "merged text"
        assert [event["choices"][0]["delta"].get("role") for event in events] == ["assistant", None]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert (usage["choices"], usage["usage"]["completion_tokens"], usage["model"]) == ([], 2, "base")
        penalties = {"frequency_penalty": 0.5, "presence_penalty": -0.5}
        front.post("/v1/chat/completions", json={**body, **penalties, "ignore_eos": True, "seed": -5})
        assert stub.seen[-1][1]["parameters"].items() >= {**penalties, "ignore_eos_token": True, "seed": 2**63 - 5}.items()
        one = {"messages": MESSAGES, "model": "base", "adapter_weights": {"gate_colors": 0.5}}
        refused = front.post("/v1/chat/completions", json=one)  # LoRAX would apply it at weight 1
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "adapter_weights")
        front.post("/v1/completions", json={"model": "gate_colors", "prompt": "x", "ignore_eos": True, "seed": -5, "stop": "x"})
        renamed = {"prompt": "x", "model": "gate_colors", "ignore_eos_token": True, "seed": 2**63 - 5, "stop": ["x"]}
        assert stub.seen[-1][:2] == ("/v1/completions", renamed)
        assert front.post("/v1/chat/completions", json={**body, "n": 2}).status_code == 400
        front.post("/v1/chat/completions", json={"model": "auto", "messages": MESSAGES})
        assert stub.seen[-1][:2] == ("/v1/chat/completions", {"messages": MESSAGES, "model": "translate_zargi"})


def test_a_stream_is_handed_on_under_our_name(router: LocalRouter) -> None:
    stub = stub_of("vllm", router)
    with doors(router, stub) as front:
        body = {"model": "auto", "messages": MESSAGES, "stream": True, "dlplora": {"trace": True}}
        response = front.post("/v1/chat/completions", json=body)
        lines = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
        assert lines.pop() == "data: [DONE]"
        first, *events = (json.loads(line[6:]) for line in lines)
        assert first["dlplora"]["adapter"] == response.headers["x-dlplora-selected-adapter"] == "translate_zargi"
        assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "an answer"
        assert {event["model"] for event in events} == {"auto"}


def test_keys_and_choices_of_the_upstream_are_not_the_clients(router: LocalRouter) -> None:
    stub = stub_of("vllm", router)
    with doors(router, stub, api_key="ours") as front:
        body = {"model": "auto", "messages": MESSAGES, "lora_path": "/etc", "adapter_id": "x", "top_k": 3}
        assert front.post("/v1/chat/completions", json=body).status_code == 401
        answered = front.post("/v1/chat/completions", json=body, headers={"authorization": "Bearer ours", "cookie": "a=b"})
        assert answered.status_code == 200
        _, sent, headers = stub.seen[-1]
        assert headers["authorization"] == "Bearer theirs"
        assert "cookie" not in headers
        assert sent == {"messages": MESSAGES, "top_k": 3, "model": "translate_zargi"}  # what we do not know goes on, adapters do not


def test_errors_of_the_upstream(router: LocalRouter) -> None:
    stub = stub_of("vllm", router)

    def answer(status: int, message: str, headers: dict[str, str] | None = None) -> Callable[[], Any]:
        return lambda: JSONResponse({"error": {"message": message}}, status, headers)

    with doors(router, stub) as front:

        def failed(stream: bool = False) -> tuple[int, str]:
            response = front.post("/v1/chat/completions", json={"model": "auto", "messages": MESSAGES, "stream": stream})
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert "/srv" not in response.text
            return response.status_code, response.json()["error"]["message"]

        for stream in (False, True):
            stub.fails = answer(500, "cannot open /srv/models/x")
            assert failed(stream)[0] == 502
            stub.fails = answer(404, "no")
            assert failed(stream)[0] == 502
            stub.fails = answer(400, "the prompt has 9 tokens too many")
            assert failed(stream) == (400, "the upstream server refused the request: the prompt has 9 tokens too many")
            stub.fails = answer(400, "cannot open /srv/models/x")
            assert failed(stream)[0] == 400
            for status, given, sent in (
                (429, "7", "7"),
                (503, "Wed, 21 Oct 2026 07:28:00 GMT", None),
                (503, "a\xe9;b", "1"),
                (429, None, "1"),
            ):
                stub.fails = answer(status, "slow down", None if given is None else {"retry-after": given})
                response = front.post("/v1/chat/completions", json={"model": "auto", "messages": MESSAGES, "stream": stream})
                assert (response.status_code, response.headers["retry-after"]) == (503, sent or given)
        stub.fails = lambda: "no object"
        assert failed()[0] == 502
        stub.fails = lambda: StreamingResponse(iter(['data: {"error": {"message": "/srv/x"}}\n\n']), media_type="text/event-stream")
        text = front.post("/v1/chat/completions", json={"model": "auto", "messages": MESSAGES, "stream": True}).text
        assert '"code": "upstream_error"' in text
        assert "/srv" not in text
        stub.fails = lambda: Response("[" * 100_000)
        assert failed()[0] == 502
    for error, status in ((httpx.ConnectError("x"), 502), (httpx.ReadTimeout("x"), 504)):

        def fail(_: Any, error: Exception = error) -> Any:
            raise error

        with doors(router, stub, httpx.MockTransport(fail)) as front:
            for stream in (False, True):
                response = front.post("/v1/chat/completions", json={"model": "auto", "messages": MESSAGES, "stream": stream})
                assert (response.status_code, response.json()["error"]["type"]) == (status, "server_error")
            assert front.get("/ready").status_code == 503


@pytest.mark.parametrize(
    ("kind", "event"),
    [
        ("vllm", {"choices": [{"index": 0, "delta": {"content": "half an ans"}, "finish_reason": None}]}),
        ("lorax", {"token": {"text": "half an ans"}, "details": None}),
    ],
)
def test_a_stream_that_breaks_off_is_no_answer(kind: str, event: Any, router: LocalRouter) -> None:
    stub = stub_of(kind, router)
    stub.fails = lambda: StreamingResponse(iter([f"data: {json.dumps(event)}\n\n"]), media_type="text/event-stream")
    weights = {"gate_colors": 0.5, "translate_zargi": 0.5} if kind == "lorax" else None
    with doors(router, stub) as front:
        body = {"model": "base", "messages": MESSAGES, "stream": True, "adapter_weights": weights}
        *_, last, rest = front.post("/v1/chat/completions", json=body).text.split("\n\n")
    assert rest == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "upstream_error"


def test_errors_of_our_own(router: LocalRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = stub_of("vllm", router)
    deep: Any = "x"
    for _ in range(300):
        deep = [deep]
    with doors(router, stub) as front:
        for body in ({"extra": deep}, {"messages": [{"role": "user", "content": "x", "extra": deep}]}):
            refused = front.post("/v1/chat/completions", json={"model": "auto", "messages": MESSAGES, **body})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(body)))

        async def broken(*_: Any) -> None:
            raise ZeroDivisionError("in /srv/secret")

        monkeypatch.setattr(UpstreamProxy, "complete", broken)
        careless = TestClient(front.app, raise_server_exceptions=False)
        failed = careless.post("/v1/chat/completions", json={"model": "auto", "messages": MESSAGES})
        assert failed.status_code == 500
        assert failed.json()["error"].items() >= {"type": "server_error", "param": None}.items()
        assert "secret" not in failed.text


def test_what_the_upstream_lacks_is_found_at_the_start(router: LocalRouter) -> None:
    async def find(stub: Stub, **options: Any) -> Any:
        return await find_upstream(
            UpstreamClient("http://up", transport=httpx.ASGITransport(app=stub.app)), stub.kind, router.bank.names, **options
        )

    some = list(router.bank.names)[1:]
    first = router.bank.names[0]
    for kind in ("vllm", "llama.cpp"):
        with pytest.raises(ConfigError, match=first):
            asyncio.run(find(Stub(kind, some)))
    with pytest.raises(ConfigError, match=r"no model 'BASSE'\. Did you mean 'BASE'"):
        asyncio.run(find(Stub("vllm", list(router.bank.names)), model="BASSE"))
    other = Stub("vllm", some)
    other.kind = "llama.cpp"
    with pytest.raises(ConfigError, match="answers 404 to GET /lora-adapters; check --upstream-kind"):
        asyncio.run(find(other))
    found = asyncio.run(find(Stub("vllm", [*some, "v2"]), given={first: "v2", "mix": some[0]}))
    assert (found.ids[first], found.ids["mix"], found.base) == ("v2", some[0], "BASE")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--upstream", "http://127.0.0.1:9"], "--upstream needs --upstream-kind"),
        (["--upstream-kind", "vllm"], "--upstream-kind needs --upstream"),
        (["--upstream", "file:///etc", "--upstream-kind", "vllm"], "expects an address"),
        (["--upstream", "http://a:b@host", "--upstream-kind", "vllm"], "user name or password"),
        (["--upstream", "http://127.0.0.1:9", "--upstream-kind", "vllm"], "it cannot be reached"),
        (["--upstream", "http://127.0.0.1:9", "--upstream-kind", "vllm", "--upstream-adapter", "x"], "expects NAME=ID"),
        (["--upstream", "http://127.0.0.1:9", "--upstream-kind", "vllm", "--method", "meteora_gate"], "'meteora_gate'"),
        (["--upstream", "http://127.0.0.1:9", "--upstream-kind", "vllm", "--method", "ties"], "dlplora export"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1


def test_addresses() -> None:
    assert checked_url("http://127.0.0.1:8080/v1/") == "http://127.0.0.1:8080"
    assert checked_url("https://host/prefix") == "https://host/prefix"


def test_an_embedding_in_several_files(tiny_llama: Any, tmp_path: Path) -> None:
    import torch

    from dlplora.inference.embedding_only import embedding_backbone

    tiny_llama.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = embedding_backbone(str(tmp_path))
    assert torch.equal(model.get_input_embeddings().weight, tiny_llama.get_input_embeddings().weight)
    assert sum(not parameter.is_meta for parameter in model.parameters()) == 1
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError, match="no safetensors file holds"):
        embedding_backbone(str(tmp_path))
