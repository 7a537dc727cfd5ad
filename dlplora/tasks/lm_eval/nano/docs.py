"""Documents and metrics of the nano tasks, as lm-eval reads them (``!function docs.…``)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import datasets

from dlplora.tasks.suite import Item, get_suite


def _row(item: Item) -> dict[str, Any]:
    row: dict[str, Any] = {"task": item.task, "question": item.prompt, "answer": item.answer, "phrasing": item.phrasing}
    if item.choices is not None:
        row |= {"choices": list(item.choices), "gold": item.gold}
    return row


def nano_dataset(task: str, num_test: int = 100, num_train: int = 100, data_seed: int = 0, **_: Any) -> datasets.DatasetDict:
    """Train rows (few-shot examples) and test rows of one nano task.

    Args:
        task: Task name in the suite.
        num_test: Test items.
        num_train: Rows of the train split, used for few-shot prompts only.
        data_seed: Seed of both.
    """
    source = get_suite("nano").task(task)
    return datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([_row(item) for item in source.items("train", num_train, data_seed)]),
            "test": datasets.Dataset.from_list([_row(item) for item in source.items("test", num_test, data_seed)]),
        }
    )


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
