"""Metrics of one generated answer, for the lm-eval YAML files of every suite."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def text_metrics(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Exact match and ROUGE F-measures of one answer (0 to 1); BLEU is computed over the corpus (0 to 100)."""
    prediction, reference = results[0].strip(), doc["answer"]
    scores = _rouge().score(reference, prediction)
    metrics: dict[str, Any] = {"exact_match": float(prediction == reference), "bleu": (reference, prediction)}
    return metrics | {name: scores[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")}


def item_row(item: Any) -> dict[str, Any]:
    """A suite's item as the row that lm-eval's templates read."""
    row: dict[str, Any] = {"task": item.task, "question": item.prompt, "answer": item.answer, "phrasing": item.phrasing}
    if item.choices is not None:
        row |= {"choices": list(item.choices), "gold": item.gold}
    return row
