"""Runs that share a matrix give what they give alone, and load and build once."""

from __future__ import annotations

from typing import Any

from dlplora.evaluation import cache as shared
from dlplora.evaluation.cache import eval_cache
from dlplora.evaluation.outcomes import outcomes_of
from dlplora.evaluation.protocol import load_protocol
from dlplora.evaluation.runner import evaluate_run, open_model, prepare
from dlplora.inference import loading

TASKS = ["object_counting", "news_summary", "pick_tool"]


def outcomes(method: str, cache: Any = None) -> tuple[list[Any], dict[str, Any], Any]:
    run = prepare(load_protocol("nano", {"tasks": TASKS}), "nano", method, 0, limit=3)
    with open_model(run, cache) as lm:
        found = outcomes_of(evaluate_run(run, lm, cache), run.prefix, lm.statistics.routes)
        return found, lm.routing_statistics(), lm.fused.model


def test_methods_of_a_matrix_score_as_they_do_alone(monkeypatch: Any) -> None:
    alone = {method: outcomes(method) for method in ("dlp", "arrow_out")}
    read, built = [], []
    monkeypatch.setattr(loading, "read_backbone", lambda *a, original=loading.read_backbone, **k: read.append(a) or original(*a, **k))
    monkeypatch.setattr(shared, "load_tasks", lambda *a, original=shared.load_tasks: built.append(a) or original(*a))
    with eval_cache() as cache:
        for method in ("dlp", "arrow_out", "dlp"):
            found, routing, model = outcomes(method, cache)
            assert found == alone[method][0]
            assert routing == alone[method][1]
            assert not any(type(module).__name__ == "FusedLinear" for module in model.modules()), "the next run must find it unpatched"
    assert len(read) == 1
    assert len(built) == 1
    loading.load_backbone(None)
    assert len(read) == 2, "nothing is kept behind the block"
