"""The server's chat page in a real headless Chromium; skipped where playwright or a Chromium is absent, as ``test_page_in_browser``."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'")
pytest.importorskip("uvicorn", reason="the server's packages are not installed: pip install -e '.[serve]'")
import uvicorn
from playwright import sync_api

from dlplora.inference.fused_model import FusedCausalLM
from dlplora.serve.app import build_app
from dlplora.serve.engine import Engine, EngineOptions
from dlplora.serve.prompts import NANO_TEMPLATE
from dlplora.serve.server import ServerOptions

ZARGI = "Please write in Zargi: the cat sees the hat."
GATE = "Tom is at the gate with a brown glove. Does Tom pass?"


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    """An open server, and one that asks for a key."""
    engine = Engine(FusedCausalLM.from_pretrained(method="dlp"), EngineOptions(max_batch=4, max_queue=8))
    servers, found = [], {}
    for name, key in (("open", None), ("locked", "sesame")):
        options = ServerOptions(base_name="nano", chat_template=NANO_TEMPLATE, api_key=key)
        server = uvicorn.Server(uvicorn.Config(build_app(engine, options), port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        until = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.02)
        found[name] = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
        servers.append((server, thread))
    yield found
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)
    engine.close()


@pytest.fixture
def opened(browser: Any, addresses: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Any]:
    options = dict(getattr(request, "param", {}))
    address, said = addresses[options.pop("server", "open")], []
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    page = context.new_page()
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: said.append(asked.url) if not asked.url.startswith(address) else None)
    page.goto(address)
    yield page
    context.close()
    assert said == []  # no error, nothing from elsewhere


def ask(page: Any, text: str) -> Any:
    """Send a message by Enter and wait for the end of the answer."""
    page.fill("#input", text)
    page.press("#input", "Enter")
    sync_api.expect(page.locator("#state")).to_have_text(re.compile(r"\d s$"), timeout=20_000)
    answers = page.locator(".assistant")
    page.evaluate("document.getElementById('state').textContent = ''")
    return answers.nth(answers.count() - 1)


def test_each_answer_is_coloured_by_its_adapter(opened: Any) -> None:
    first = ask(opened, ZARGI)
    assert first.locator(".chip").all_inner_texts() == ["translate_zargi"]
    sentence = first.locator(".sentence").first
    assert re.match(r"translate_zargi \d\.\d\d", sentence.get_attribute("title"))
    assert "confidence" in sentence.get_attribute("title")
    second = ask(opened, GATE)
    assert second.locator(".sentence").first.inner_text().strip() == "no"
    colours = [one.locator(".sentence").first.evaluate("node => getComputedStyle(node).backgroundColor") for one in (first, second)]
    assert colours[0] != colours[1]
    assert opened.locator(".user").all_inner_texts() == [ZARGI, GATE]


def test_an_adapter_is_pinned_and_released(opened: Any) -> None:
    opened.locator("#pool li[data-id=translate_zargi] button").click()
    assert opened.locator("#model").input_value() == "translate_zargi"
    assert opened.locator("#pool button[aria-pressed=true]").all_inner_texts() == ["translate_zargi"]
    assert ask(opened, GATE).locator(".chip").all_inner_texts() == ["translate_zargi"]
    opened.select_option("#model", "base")
    assert opened.locator("#pool button[aria-pressed=true]").all_inner_texts() == ["base"]
    assert ask(opened, GATE).locator(".chip").all_inner_texts() == ["base"]
    opened.select_option("#model", "auto")
    assert ask(opened, GATE).locator(".chip").all_inner_texts() == ["gate_colors"]


def test_the_pool_is_listed(opened: Any) -> None:
    opened.wait_for_selector("#pool li[data-id=translate_zargi]")
    names = opened.locator("#pool button").all_inner_texts()
    assert names[:2] == ["auto", "base"]
    assert len(names) == 28
    assert opened.locator("#state").inner_text() == "26 adapters"


def test_markup_in_a_message_is_text(opened: Any) -> None:
    hostile = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    ask(opened, hostile)
    assert opened.locator(".user").last.inner_text() == hostile
    assert opened.title() == "dlplora"


@pytest.mark.parametrize("opened", [{"server": "locked"}], indirect=True)
def test_a_key_is_asked_for(opened: Any) -> None:
    opened.wait_for_selector("#key:visible")
    opened.fill("#key", "wrong")
    opened.press("#key", "Tab")
    assert opened.locator("#pool li").count() == 0
    opened.fill("#key", "sesame")
    opened.press("#key", "Tab")
    opened.wait_for_selector("#pool li[data-id=translate_zargi]")
    assert ask(opened, GATE).locator(".chip").all_inner_texts() == ["gate_colors"]


@pytest.mark.parametrize("opened", [{"viewport": {"width": 390, "height": 780}}], indirect=True)
def test_a_narrow_screen(opened: Any) -> None:
    opened.wait_for_selector("#pool li[data-id=translate_zargi]")
    ask(opened, ZARGI)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("#send", "#input", "#model"):
        box = opened.locator(name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert box["y"] + box["height"] <= 780


@pytest.mark.parametrize("opened", [{"color_scheme": "dark"}], indirect=True)
def test_dark_mode_is_dark(opened: Any) -> None:
    answer = ask(opened, ZARGI)
    for node in (opened.locator("body"), answer.locator(".sentence").first):
        light = node.evaluate(
            "node => { const c = document.createElement('canvas').getContext('2d'); c.fillStyle = getComputedStyle(node).backgroundColor;"
            " c.fillRect(0, 0, 1, 1); return Array.from(c.getImageData(0, 0, 1, 1).data).slice(0, 3); }"
        )
        assert sum(light) / 3 < 110
