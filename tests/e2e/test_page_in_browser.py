"""The page in a real headless Chromium: sort, filter, drill-down, keyboard, narrow screen, dark mode, and nothing on the console.

Needs the package ``playwright`` and a Chromium of the system (``apt-get install chromium``); skipped where either is absent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'")
from playwright.sync_api import expect

from dlplora.cli.report import _test_items
from dlplora.reporting import html, store
from dlplora.reporting.columns import COLUMNS
from dlplora.reporting.groups import group
from tests.unit.test_page import HOSTILE, hostile_results

RESULTS = Path(__file__).resolve().parents[2] / "results"
MCQ, ROUTER = 2, 6
"""Places of two columns among those that are shown at first."""
METHODS = {"base", "oracle", "dlp", "avg_delta", "mole", "lorauter"}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [record for record in store.load_all(RESULTS, "nano")[0] if record.method_name in METHODS]
    reader = store.OutcomeReader(RESULTS)
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(html.page(group(records, reader), reader, _test_items), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All methods of nano, without questions and figures."""
    reader = store.OutcomeReader(RESULTS)
    path = tmp_path_factory.mktemp("whole") / "index.html"
    path.write_text(html.page(group(store.load_all(RESULTS, "nano")[0], reader), lambda record: None, lambda suite, task: ()), "utf-8")
    return path


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
    return [row.locator("td").nth(number).inner_text() for row in page.locator("#table tbody tr:not(.group)").all()]


def sorted_by(page: Any, number: int, direction: str) -> None:
    """Wait until the table says so, and has been drawn again."""
    page.wait_for_selector(f"#table thead th:nth-child({number + 1})[aria-sort={direction}]")
    page.wait_for_timeout(150)


def numbers(cells: list[str]) -> list[float]:
    return [float(found[0]) for cell in cells if (found := re.match(r"-?[\d.]+", cell))]


def test_sorting_by_mouse_and_by_keyboard(opened: Any) -> None:
    assert len(column(opened, 0)) == len(METHODS)
    opened.get_by_role("columnheader", name="MCQ accuracy").click()
    sorted_by(opened, MCQ, "descending")
    assert opened.locator("#table tr.group").count() == 0  # a ranking has no groups
    values = numbers(column(opened, MCQ))
    assert values == sorted(values, reverse=True)
    opened.get_by_role("columnheader", name="MCQ accuracy").click()
    sorted_by(opened, MCQ, "ascending")
    assert numbers(column(opened, MCQ)) == sorted(values)
    opened.get_by_role("columnheader", name="router accuracy").get_by_role("button").focus()
    opened.keyboard.press("Enter")
    sorted_by(opened, ROUTER, "descending")
    cells = column(opened, ROUTER)
    known = [cell for cell in cells if cell]
    assert numbers(known) == sorted(numbers(known), reverse=True)
    assert cells[len(known) :] == [""] * (len(cells) - len(known))  # what was not measured comes last ...
    opened.keyboard.press("Enter")
    sorted_by(opened, ROUTER, "ascending")
    assert column(opened, ROUTER)[len(known) :] == [""] * (len(cells) - len(known))  # ... either way


def test_groups_and_columns(opened: Any) -> None:
    titles = opened.locator("#table tr.group").all_inner_texts()
    assert titles == ["References", "DLP-LoRA and variants", "Static merges", "Retrieval by prompt", "Trained gates"]
    assert column(opened, 0) == ["base", "oracle", "dlp", "avg_delta", "lorauter", "mole"]
    opened.select_option("#kind", "merge")
    assert column(opened, 0) == ["avg_delta"]
    opened.select_option("#kind", "")
    titles = opened.locator("#table thead th").all_inner_texts()
    assert not [title for title in titles if title.startswith("BLEU")]
    opened.click("#chooser summary")
    opened.get_by_role("checkbox", name="BLEU").check()
    opened.get_by_role("checkbox", name="exact match %").uncheck()
    titles = opened.locator("#table thead th").all_inner_texts()
    assert [title for title in titles if title.startswith("BLEU")]
    assert not [title for title in titles if title.startswith("exact")]
    opened.get_by_role("columnheader", name="MCQ accuracy").click()
    sorted_by(opened, MCQ, "descending")
    opened.get_by_role("checkbox", name="ROUGE-1 %").check()
    sorted_by(opened, MCQ, "descending")  # another column keeps the order


def test_all_columns_fit_a_window_of_1280_pixels(browser: Any, whole_page: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(whole_page.as_uri())
    page.wait_for_selector("#table tbody td")
    page.click("#chooser summary")
    for box in page.locator("#columns input").all():
        box.check()
    assert page.locator("#table thead th").count() == 1 + len(COLUMNS)
    box = page.locator("#holder").locator("..")
    assert box.evaluate("(node) => node.scrollWidth <= node.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.close()


def test_nothing_in_a_name_runs(browser: Any, tmp_path: Path) -> None:
    hostile_results(tmp_path)
    reader = store.OutcomeReader(tmp_path)
    item = SimpleNamespace(prompt=f"</script>{HOSTILE}", answer=HOSTILE, choices=(HOSTILE, "no"))
    others = {"other": (tmp_path / "figures" / "other.svg").read_text()}
    path = tmp_path / "index.html"
    path.write_text(html.page(group(store.load_all(tmp_path)[0], reader), reader, lambda suite, task: [item], others=others))
    page = browser.new_page()
    happened: list[str] = []
    page.on("dialog", lambda dialog: (happened.append(dialog.message), dialog.dismiss()))
    page.on("console", lambda message: happened.append(message.text))
    page.on("pageerror", lambda error: happened.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector("#question td")
    for place in ("#task", "#q-task"):
        page.select_option(place, HOSTILE)
    expect(page.locator("#question pre")).to_contain_text("onerror")
    page.wait_for_timeout(300)
    assert page.locator("#table thead th").all_inner_texts()[1].startswith(HOSTILE)
    assert "<!--<script>" in column(page, 0)
    assert page.locator("img").count() == page.locator("figure img").count()
    assert happened == []
    # what a fault of ours would let in is stopped by the policy
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(1)><svg onload=alert(1)></svg>')")
    page.wait_for_timeout(300)
    assert not [message for message in happened if message == "1"]
    assert any("Content Security Policy" in message for message in happened)
    page.close()


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
    expect(opened.locator("#question pre")).to_contain_text("Zargi")
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
    expect(opened.locator("#question pre")).not_to_have_text(first)
    assert opened.input_value("#q-number") == "1"
    assert opened.locator("#q-number option").count() == 100
    opened.select_option("#q-which", "0")
    expect(opened.locator("#question td.right")).to_have_count(0)
    assert "wrong" in opened.inner_text("#question tbody")


def test_everything_is_reached_by_tab(opened: Any) -> None:
    seen = []
    for _ in range(40):
        opened.keyboard.press("Tab")
        seen.append(opened.evaluate("document.activeElement.id || document.activeElement.tagName"))
    for wanted in ("suite", "backbone", "method", "kind", "task", "q-task", "q-number", "q-which", "q-before", "q-next", "SUMMARY"):
        assert wanted in seen, wanted


def test_reported_numbers_are_marked_and_apart(opened: Any) -> None:
    assert "not measured here" in opened.inner_text("#h-reported")
    opened.get_by_text("Show the reported numbers").click()
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
