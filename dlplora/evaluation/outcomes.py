"""Convert lm-eval's logged samples to stored outcomes, with their standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dlplora.reporting.samples import METRICS, Outcome
from dlplora.reporting.statistics import bleu_statistics, bleu_stderr, mean_stderr

if TYPE_CHECKING:
    from dlplora.lm_eval.evaluate import HarnessResult

Routes = Mapping[tuple[str, int], Sequence[tuple[int, Mapping[str, float]]]]
"""lm-eval's task name and question index -> (characters generated so far, experts kept) of the prompt and every re-route."""


def outcomes_of(result: HarnessResult, prefix: str, routes: Routes) -> list[Outcome]:
    """One outcome a question; of a task with several filters, the first one counts.

    Args:
        result: Evaluated with ``log_samples``.
        prefix: What lm-eval's task names have before the suite's.
        routes: What routing did with each question.
    """
    found = []
    for name, samples in result.samples.items():
        first = samples[0]["filter"] if samples else None
        for sample in samples:
            if sample["filter"] == first:
                found.append(_outcome(name, name.removeprefix(prefix), sample, routes))
    return found


def _outcome(name: str, task: str, sample: Mapping[str, Any], routes: Routes) -> Outcome:
    question = int(sample["doc_id"])
    metrics = {metric: float(sample[metric]) for metric in METRICS if isinstance(sample.get(metric), (int, float))}
    outcome = Outcome(task=task, question=question, metrics=metrics, routing=routes.get((name, question)))
    responses = sample["filtered_resps"]
    if isinstance(responses[0], (tuple, list)):
        likelihoods = [float(response[0]) for response in responses]
        outcome.choice = likelihoods.index(max(likelihoods))
    else:
        outcome.answer = str(responses[0])
    pair = sample.get("bleu")
    if isinstance(pair, (tuple, list)):
        outcome.bleu = bleu_statistics(str(pair[1]), str(pair[0]))
    return outcome


def standard_errors(outcomes: Sequence[Outcome], resamples: int) -> dict[str, dict[str, float | None]]:
    """Standard error of every metric of every task over its questions; BLEU by bootstrap, means by their formula."""
    by_task: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_task.setdefault(outcome.task, []).append(outcome)
    errors: dict[str, dict[str, float | None]] = {}
    for task, rows in by_task.items():
        errors[task] = {metric: mean_stderr([row.metrics[metric] for row in rows]) for metric in rows[0].metrics}
        stats = [row.bleu for row in rows if row.bleu is not None]
        if stats:
            errors[task]["bleu"] = bleu_stderr(stats, resamples)
    return errors
