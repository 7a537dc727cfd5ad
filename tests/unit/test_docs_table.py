"""Tables that benchmarks write into pages of the documentation, and that those pages show the committed records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import sentence_segmenters, wrapped_prompts
from benchmarks.docs_table import with_table
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.tasks.registry import get_suite

ROOT = Path(__file__).resolve().parents[2]


def test_only_the_text_between_the_markers_is_replaced() -> None:
    page = "a\n<!-- dlplora:x:begin -->\nold\n<!-- dlplora:x:end -->\nb\n"
    assert with_table(page, "x", "| new |") == "a\n<!-- dlplora:x:begin -->\n\n| new |\n\n<!-- dlplora:x:end -->\nb\n"
    for broken in ("a", "a <!-- dlplora:x:begin -->", "a <!-- dlplora:x:end -->"):
        with pytest.raises(SystemExit, match="has no"):
            with_table(broken, "x", "new")


@pytest.mark.parametrize("benchmark", [wrapped_prompts, sentence_segmenters], ids=["wrapped_prompts", "sentence_segmenters"])
def test_the_page_shows_the_record(benchmark: object) -> None:
    name = benchmark.__name__.rpartition(".")[2]  # type: ignore[attr-defined]
    record = json.loads((ROOT / "results" / "bench" / f"{name}.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "prompts_and_routing.md").read_text(encoding="utf-8")
    assert with_table(page, name, benchmark.table(record)) == page  # type: ignore[attr-defined]


def test_wrapped_prompts_compares_the_question_rule_with_a_router_that_reads_everything() -> None:
    fused = FusedCausalLM.from_pretrained(method="dlp")
    suite = get_suite("nano").select(("logical_order_first", "pick_tool"))
    wrap = wrapped_prompts.SETTINGS["system text, 200 words"]
    of_question = wrapped_prompts.scores(fused, suite, wrap, 6)["router_accuracy"]
    of_everything = wrapped_prompts.scores(fused, suite, wrap, 6, read_everything=True)["router_accuracy"]
    assert of_question == 1.0
    assert of_everything is not None
    assert of_everything < 1.0
