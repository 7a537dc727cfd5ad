"""Requests drawn from the OpenAPI schema: no 500, and every response is one that the schema describes.

Skipped without schemathesis; ``pip install schemathesis`` to run it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")
pytest.importorskip("fastapi", reason="the server's packages are not installed: pip install -e '.[serve]'")
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from dlplora.inference.fused_model import FusedCausalLM
from dlplora.serve.app import build_app
from dlplora.serve.engine import Engine, EngineOptions
from dlplora.serve.prompts import NANO_TEMPLATE
from dlplora.serve.server import ServerOptions


@pytest.fixture(scope="module")
def api() -> Iterator[Any]:
    """The application on a model whose answers are short."""
    engine = Engine(FusedCausalLM.from_pretrained(method="dlp"), EngineOptions(max_batch=8, max_model_len=24))
    options = ServerOptions(
        base_name="nano", chat_template=NANO_TEMPLATE, api_key="key", admin_key="admin", reload=lambda: ["a"], default_max_tokens=4
    )
    yield schemathesis.openapi.from_asgi("/openapi.json", build_app(engine, options))
    engine.close()


NOT_CHECKED = [positive_data_acceptance]
"""A schema cannot tell that a prompt is too long for the context, or that an adapter is not in the pool."""
BODIES = ("/v1/chat/completions", "/v1/completions", "/v1/route")
OPERATIONS = [
    *(("POST", path) for path in (*BODIES, "/admin/reload")),
    *(("GET", path) for path in ("/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics")),
]


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*one, "positive") for one in OPERATIONS] + [("POST", path, "negative") for path in BODIES],
)
def test_no_request_fails_the_server(method: str, path: str, mode: str, api: Any) -> None:
    key = "admin" if path.startswith("/admin") else "key"
    operation = api[path][method]

    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def check(case: Any) -> None:
        case.call_and_validate(headers={"authorization": f"Bearer {key}"}, excluded_checks=NOT_CHECKED)

    check()


def test_every_operation_is_tried(api: Any) -> None:
    assert {(one.ok().method.upper(), one.ok().path) for one in api.get_all_operations()} == set(OPERATIONS)
