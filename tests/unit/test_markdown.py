"""The one Markdown-table writer, by hand and against a CommonMark renderer where one is installed."""

from __future__ import annotations

import pytest

from dlplora.reporting.markdown import code, plain, table

HOSTILE = ("a|b", "`x`", "<img src=x onerror=alert(1)>", "<!--<script>", "two\nlines", "a``b|`")


def test_a_table_by_hand() -> None:
    text = table(["name", "value", "note"], [["`a`", "1", "x"], ["`b`", "", "y|z"]], left=(0, 2))
    assert text == "| name | value | note |\n|---|---:|---|\n| `a` | 1 | x |\n| `b` |  | y\\|z |"
    assert table(["a", "b"], []) == "| a | b |\n|---|---:|"
    assert table(["a|b"], [["c\\|d"]]) == "| a\\|b |\n|---|\n| c\\|d |"  # escaped once
    with pytest.raises(ValueError, match="1 cells"):
        table(["a", "b"], [["c"]])


def test_text_in_code_and_plain_text_by_hand() -> None:
    assert code("dlp") == "`dlp`"
    assert code("a`b") == "``a`b``"
    assert code("`a`") == "`` `a` ``"
    assert plain("a < b, < 0.5") == "a < b, < 0.5"
    assert plain("<img>") == "&lt;img>"


def test_hostile_text_renders_as_itself() -> None:
    renderer = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
    page = (
        renderer.MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(table(["text", "code"], [[plain(text), code(text)] for text in HOSTILE], left=2))
    )
    assert page.count("<tr>") == len(HOSTILE) + 1
    assert page.count("<td>") == 2 * len(HOSTILE)
    assert "<img" not in page
    assert "<script" not in page
    for text in HOSTILE:
        shown = text.replace("\n", " ").replace("<", "&lt;").replace(">", "&gt;")
        assert f"<code>{shown}</code>" in page, text
