"""Evaluation as the released DLP-LoRA code measures it: teacher-forced, so no answer is generated.

One forward pass reads the prompt *and* the right answer. The most likely token at every answer position, given the right tokens before it,
is the prediction. Predicted and right tokens are decoded and compared as strings: BLEU over characters, ROUGE with stemming. A method that
would go wrong at the first token still gets credit for all later ones. These numbers are kept separate from the leaderboard.

Source: MeCuping/DLP-LoRA@d68fd38, ``src/Get_data.py`` (layout of inputs and targets), ``src/Process.py`` and ``src/Evaluation.py``.
Deviations: adapters here are trained with the usual shift, so the layout that repeats the last prompt token is measured in addition
(``repeated_…``) and not alone; the method routes, each prompt separately; all test questions are used once, in order, and not drawn with
replacement; batches are used. The repository has no function that computes an accuracy; ``exact`` (equal strings) is our reading.
Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dlplora.atomic import write_atomically
from dlplora.config import config_hash
from dlplora.data.encoding import encode_pairs
from dlplora.evaluation.reuse import known_cell
from dlplora.evaluation.runner import Run, blank_record, open_model
from dlplora.reporting.protocols import ROOM, record_path
from dlplora.reporting.schema import Record, TaskResult, read_record, to_json
from dlplora.reporting.statistics import mean_stderr
from dlplora.reporting.store import RESULTS
from dlplora.types import PromptBatch

if TYPE_CHECKING:
    from dlplora.inference.fused_model import FusedCausalLM
    from dlplora.tasks.types import Item

METRICS = ("exact", "char_bleu", "rouge1", "rougeL", "self_bleu", "self_rouge")
REPEATED = ("exact", "char_bleu")
"""Also measured in the layout with the repeated token, under ``repeated_<name>``."""


def released_layout(prompt: Sequence[int], answer: Sequence[int], *, repeat_last: bool) -> tuple[list[int], list[int]]:
    """Model input and targets of one row.

    ::

        prompt q0 q1 q2, answer a0 a1
        repeat_last   input q0 q1 q2 q2 a0    targets q2 a0 a1    as the released code has it, in training too
        otherwise     input q0 q1 q2 a0       targets a0 a1       the usual shift, in which adapters are trained here

    Args:
        prompt: At least one token.
        answer: Answer tokens and the end token.
        repeat_last: As above. An adapter trained with the usual shift never predicts the repeated token.

    Returns:
        Input ids, and one target for each of the last ``len(targets)`` positions.
    """
    again = [prompt[-1]] if repeat_last else []
    return [*prompt, *again, *answer[:-1]], [*again, *answer]


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def character_bleu(label: str, predicted: str) -> float:
    """NLTK's sentence BLEU of two *strings*: up to 4-grams of characters, not smoothed, so a right answer of one letter scores 0."""
    from nltk.translate.bleu_score import sentence_bleu

    if not predicted:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it warns of every string with fewer than four characters
        return float(sentence_bleu([label], predicted))


def released_metrics(predicted: Sequence[int], targets: Sequence[int], tokenizer: Any) -> dict[str, float]:
    """The released code's numbers of one row, 0 to 1.

    ``self_bleu`` is the clipped unigram precision of token ids, ``self_rouge`` the share of predicted ids that occur anywhere among
    the targets; the names are the authors'.

    Args:
        predicted, targets: Token ids of equal length.
        tokenizer: Decodes both, special tokens included.
    """
    label, text = (tokenizer.decode(list(ids), skip_special_tokens=False) for ids in (targets, predicted))
    rouge = _rouge().score(label, text)
    shared = Counter(predicted) & Counter(targets)
    known = set(targets)
    return {
        "exact": float(text == label),
        "char_bleu": character_bleu(label, text),
        "rouge1": rouge["rouge1"].fmeasure,
        "rougeL": rouge["rougeL"].fmeasure,
        "self_bleu": sum(shared.values()) / len(predicted),
        "self_rouge": sum(token in known for token in predicted) / len(predicted),
    }


@dataclasses.dataclass(frozen=True)
class Row:
    """One question ready for the pass; ``prompt`` is what is routed on."""

    prompt: tuple[int, ...]
    text: str
    task: str
    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def rows_of(items: Sequence[Item], tokenizer: Any, max_length: int, *, repeat_last: bool) -> tuple[list[Row], int]:
    """Rows in one of the two layouts, and how many prompts lost their beginning because they did not fit."""
    pairs = encode_pairs(tokenizer, [item.prompt for item in items], [f" {item.answer}" for item in items])
    rows, num_cut = [], 0
    for item, (prompt, answer) in zip(items, pairs, strict=True):
        ended = [*answer, tokenizer.eos_token_id]
        room = max(1, max_length - len(ended) - 1)
        num_cut += len(prompt) > room
        inputs, targets = released_layout(prompt[-room:], ended, repeat_last=repeat_last)
        rows.append(Row(tuple(prompt[-room:]), item.prompt, item.task, tuple(inputs), tuple(targets)))
    return rows, num_cut


@torch.no_grad()
def predictions(fused: FusedCausalLM, rows: Sequence[Row]) -> list[list[int]]:
    """The most likely token at every target position of a batch, each row routed on its own prompt."""
    prompts = PromptBatch.from_ids(
        [row.prompt for row in rows],
        fused.tokenizer,
        device=fused.device,
        task_names=[row.task for row in rows],
        texts=[row.text for row in rows],
    )
    batch = PromptBatch.from_ids([row.inputs for row in rows], fused.tokenizer, device=fused.device, texts=[row.text for row in rows])
    state = fused.route(prompts)
    with nullcontext() if state is None else fused.routing(state):
        logits: Tensor = fused(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits  # (B, T, V)
    chosen = logits.argmax(dim=-1).tolist()
    return [ids[len(row.inputs) - len(row.targets) : len(row.inputs)] for ids, row in zip(chosen, rows, strict=True)]


def _batches(rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].inputs))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def evaluate_released(run: Run, fused: FusedCausalLM) -> tuple[dict[str, TaskResult], int]:
    """Every task of a run, and the number of prompts that did not fit."""
    results: dict[str, TaskResult] = {}
    num_cut = 0
    max_length = min(fused.max_length, run.protocol.max_length or fused.max_length)
    for name in run.task_names:
        task = run.suite.task(name)
        items = task.items("test", run.suite.num_test(task))[: run.limit]
        values: dict[str, list[float]] = {}
        for repeat_last in (False, True):
            rows, cut = rows_of(items, fused.tokenizer, max_length, repeat_last=repeat_last)
            num_cut += 0 if repeat_last else cut
            for members in _batches(rows, run.protocol.batch_size):
                for index, predicted in zip(members, predictions(fused, [rows[i] for i in members]), strict=True):
                    found = released_metrics(predicted, rows[index].targets, fused.tokenizer)
                    kept = {f"repeated_{metric}": found[metric] for metric in REPEATED} if repeat_last else found
                    for metric, value in kept.items():
                        values.setdefault(metric, []).append(value)
        results[name] = TaskResult(
            kind=task.kind,
            version=str(task.version),
            num=len(items),
            metrics={metric: sum(numbers) / len(numbers) for metric, numbers in values.items()},
            stderr={metric: mean_stderr(numbers) for metric, numbers in values.items()},
        )
    return results, num_cut


def released_cell(run: Run) -> str:
    """Hash of everything the numbers depend on."""
    return config_hash({**run.description(), "evaluation": "released_code"})


def execute_released(run: Run, root: Path = RESULTS, *, force: bool = False) -> tuple[Path, Record]:
    """Evaluate and write a record outside the leaderboard; a finished equal run is reused.

    Args:
        run: As for ``runner.execute``.
        root: Results folder.
        force: Evaluate again even if there is a record.
    """
    started = time.perf_counter()
    blank = dataclasses.replace(blank_record(run), protocol_name="released_code", cell=released_cell(run))
    path = record_path(blank, root)
    known = known_cell(blank.cell, run.seed, run.suite.name, run.spec.name, type(run.method), root, (ROOM, f"scratch/{ROOM}")).path
    if known is not None and not force:
        return known, read_record(known)
    with open_model(run) as lm:
        results, num_cut = evaluate_released(run, lm.fused)
        record = dataclasses.replace(
            blank,
            tasks=results,
            routing={"truncated": num_cut},
            backend=lm.fused.backends_used(),
            backbone={**blank.backbone, "fingerprint": lm.fused.fingerprint()},
            timings_s={"evaluate": round(time.perf_counter() - started, 3)},
        )
    write_atomically(path, to_json(record))
    return path, record
