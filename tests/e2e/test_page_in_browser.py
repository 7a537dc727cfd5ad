"""The page in a real headless Chromium: sort, filter, drill-down, keyboard, narrow screen, dark mode, and nothing on the console.

Needs the package ``playwright`` and a Chromium of the system (``apt-get install chromium``); skipped where either is absent.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dlplora.cli.report import _test_items
from dlplora.reporting import html, store
from dlplora.reporting.groups import group

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'")
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
RESULTS = Path(__file__).resolve().parents[2] / "results"
METHODS = {"base", "oracle", "dlp", "avg_delta", "mole", "lorauter"}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [record for record in store.load_all(RESULTS, "nano")[0] if record.method_name in METHODS]
    reader = store.OutcomeReader(RESULTS)
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(html.page(group(records, reader), reader, _test_items), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def opened(browser: Any, page_file: Path, said: list[str], request: pytest.FixtureRequest) -> Iterator[Any]:
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **getattr(request, "param", {})})
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: said.append(asked.url) if not asked.url.startswith(("file:", "data:", "blob:")) else None)
    page.goto(page_file.as_uri())
    page.wait_for_selector("#question td")
    yield page
    context.close()
    assert said == []  # no message, no error, nothing fetched


def column(page: Any, number: int) -> list[str]:
    return [row.locator("td").nth(number).inner_text() for row in page.locator("#table tbody tr").all()]


def sorted_by(page: Any, number: int, direction: str) -> None:
    """Wait until the table says so, and has been drawn again."""
    page.wait_for_selector(f"#table thead th:nth-child({number + 1})[aria-sort={direction}]")
    page.wait_for_timeout(150)


def numbers(cells: list[str]) -> list[float]:
    return [float(found[0]) for cell in cells if (found := re.match(r"-?[\d.]+", cell))]


def test_sorting_by_mouse_and_by_keyboard(opened: Any) -> None:
    assert len(column(opened, 0)) == len(METHODS)
    opened.get_by_role("columnheader", name="MCQ accuracy").click()
    sorted_by(opened, 1, "descending")
    values = numbers(column(opened, 1))
    assert values == sorted(values, reverse=True)
    opened.get_by_role("columnheader", name="MCQ accuracy").click()
    sorted_by(opened, 1, "ascending")
    assert numbers(column(opened, 1)) == sorted(values)
    opened.get_by_role("columnheader", name="router accuracy").get_by_role("button").focus()
    opened.keyboard.press("Enter")
    sorted_by(opened, 7, "descending")
    cells = column(opened, 7)
    known = [cell for cell in cells if cell]
    assert numbers(known) == sorted(numbers(known), reverse=True)
    assert cells[len(known) :] == [""] * (len(cells) - len(known))  # what was not measured comes last ...
    opened.keyboard.press("Enter")
    sorted_by(opened, 7, "ascending")
    assert column(opened, 7)[len(known) :] == [""] * (len(cells) - len(known))  # ... either way


def test_filtering(opened: Any) -> None:
    opened.fill("#method", "l")
    assert set(column(opened, 0)) == {name for name in METHODS if "l" in name}
    assert opened.inner_text("#count") == f"{len([name for name in METHODS if 'l' in name])} of {len(METHODS)} rows"
    opened.fill("#method", "nobody")
    assert opened.inner_text("#table tbody") == "No method matches."
    opened.fill("#method", "")
    opened.select_option("#task", "gate_colors")
    assert opened.locator("#table thead th").all_inner_texts()[1].startswith("gate colors %")
    assert len(column(opened, 0)) == len(METHODS)
    best = opened.locator("#table tbody b").all_inner_texts()
    assert set(best) == {f"{max(numbers(column(opened, 1))):.1f}"}


def test_a_question_with_every_methods_answer_and_route(opened: Any) -> None:
    opened.select_option("#q-task", "translate_zargi")
    opened.wait_for_function("document.querySelector('#question pre').textContent.includes('Zargi')")
    rows = {row.locator("td").nth(0).inner_text(): row for row in opened.locator("#question tbody tr").all()}
    assert set(rows) == METHODS
    assert "translate_zargi 1.00" in rows["dlp"].inner_text()
    assert "no expert" in rows["base"].inner_text()
    assert "token by token" in rows["mole"].inner_text()
    assert "and 21 more" in rows["avg_delta"].inner_text()
    colour = "getComputedStyle(document.querySelector('#question .said')).borderBottomColor"
    assert opened.evaluate(colour).startswith("rgb")
    first = opened.inner_text("#question pre")
    opened.click("#q-next")
    opened.wait_for_function("(before) => document.querySelector('#question pre').textContent.trim() !== before.trim()", arg=first)
    assert opened.input_value("#q-number") == "1"
    assert opened.locator("#q-number option").count() == 100
    opened.select_option("#q-which", "0")
    opened.wait_for_function("!document.querySelector('#question td.right')")
    assert "wrong" in opened.inner_text("#question tbody")


def test_everything_is_reached_by_tab(opened: Any) -> None:
    seen = []
    for _ in range(40):
        opened.keyboard.press("Tab")
        seen.append(opened.evaluate("document.activeElement.id || document.activeElement.tagName"))
    for wanted in ("suite", "backbone", "method", "task", "q-task", "q-number", "q-which", "q-before", "q-next", "SUMMARY"):
        assert wanted in seen, wanted


def test_reported_numbers_are_marked_and_apart(opened: Any) -> None:
    assert "not measured here" in opened.inner_text("#h-reported")
    opened.click("summary")
    assert opened.locator("#reported tbody tr").count() > 20
    assert "second-hand" in opened.inner_text("#reported")
    assert "92.34" not in opened.inner_text("#table")


@pytest.mark.parametrize("opened", [{"viewport": {"width": 360, "height": 740}}], indirect=True)
def test_a_narrow_screen_scrolls_tables_not_the_page(opened: Any) -> None:
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    box = opened.locator("#holder").locator("..")
    assert box.evaluate("(node) => node.scrollWidth > node.clientWidth")


@pytest.mark.parametrize("opened", [{"color_scheme": "dark"}], indirect=True)
def test_dark_mode_is_dark(opened: Any) -> None:
    ground, ink = (
        [int(value) for value in re.findall(r"\d+", opened.evaluate(f"getComputedStyle(document.body).{name}"))[:3]]
        for name in ("backgroundColor", "color")
    )
    assert max(ground) < 60
    assert min(ink) > 180
