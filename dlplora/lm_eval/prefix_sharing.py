"""Two ways to read scored text, and the log-likelihoods in their logits. Shapes: B rows, T tokens, V vocabulary.

The full path reads context and option together, once per option::

    c c c c x y        one row per option
    c c c c z

The shared path reads each context once and keeps its keys and values. Its last position scores the first token of every option;
only options with more tokens are read, after a copy of their question's keys and values::

    . c c c c          one row per question, padded on the left
              x        one row per option of two tokens or more

Both give the same numbers up to rounding (about 1e-6 in float32), for routing weights and for gates, because the model is causal.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dlplora.errors import ConfigError, NotFiniteError
from dlplora.inference.finite import NOT_FINITE
from dlplora.inference.positions import length_dependence
from dlplora.lm_eval.requests import Prompt, ScoringRequest, pad_rows
from dlplora.modules.routing_state import RoutingState

if TYPE_CHECKING:
    from dlplora.inference.fused_model import FusedCausalLM

Unit = ScoringRequest
Question = list[Unit]
"""Options that differ in what is read after one context of one prompt; at least one."""


@dataclass(frozen=True)
class Readings:
    """Logits of one batch, and where the tokens of each unit are scored.

    Args:
        units: What was read.
        logits: (N, V).
        places: Of every unit, the rows of ``logits`` that score its tokens, in order.
    """

    units: list[Unit]
    logits: Tensor
    places: list[list[int]]


def why_not(model: Any) -> str | None:
    """Why the keys and values of a model cannot be shared between options, or None if they can."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    accepted = inspect.signature(model.forward).parameters
    missing = [name for name in ("past_key_values", "attention_mask", "position_ids") if name not in accepted]
    if missing:
        return f"{type(model).__name__} takes no {', '.join(missing)}"
    if getattr(model, "_is_stateful", False):
        return f"{type(model).__name__} keeps a state that cannot be copied row by row"
    dependence = length_dependence(model)
    if dependence is not None:
        return dependence
    others = sorted({type(layer).__name__ for layer in DynamicCache(config=model.config).layers if type(layer) is not DynamicLayer})
    return f"{type(model).__name__} caches in {', '.join(others)}, which cannot be shared" if others else None


def decide_sharing(wanted: str, fused: FusedCausalLM) -> tuple[bool, str]:
    """Whether the options of a question share the reading of their context, and the same in the words of the record.

    Args:
        wanted: ``auto``, ``always`` or ``never``.
        fused: The model.

    Raises:
        ConfigError: If it must share and cannot.
    """
    obstacle = why_not(fused.model)
    if obstacle is None and wanted != "never":
        obstacle = why_not_in_a_trial(fused)
    if wanted == "always" and obstacle:
        raise ConfigError(f"share_prefix=always: {obstacle}. Leave it out, or use share_prefix=never.")
    shares = wanted != "never" and obstacle is None
    return shares, "shared" if shares else f"read for every option: {obstacle or 'share_prefix=never'}"


TRIAL = (((1, 2, 3), (4, 5, 6)), ((1, 2, 3), (5, 4, 7)), ((3, 5, 1, 7, 6), (2, 1, 4)))
"""Contexts of different lengths and options of several tokens."""
TRIAL_TOLERANCE = 0.05
"""Tolerance, relative to the spread of the logits: rounding in 16 bits is below it; wrong positions and missing keys are not."""


@torch.no_grad()
def why_not_in_a_trial(fused: FusedCausalLM) -> str | None:
    """Read a few tokens both ways; the reason not to share if the numbers differ."""
    size = int(fused.model.config.get_text_config().vocab_size)
    pairs = [tuple(tuple(token % size for token in part) for part in pair) for pair in TRIAL]
    units = [ScoringRequest(context, continuation, Prompt(context, None)) for context, continuation in pairs]
    state = RoutingState(torch.zeros(fused.bank.num_experts), "dense")
    scorer = Scorer(fused.model, lambda _: fused.slot.bind(state), lambda *_: nullcontext(), 0, fused.device, fused.max_length)
    shared, full = read_questions(scorer, questions_of(units)), score_full(scorer, units)
    here = {id(unit): shared.logits[places].float() for unit, places in zip(shared.units, shared.places, strict=True)}
    there = {id(unit): full.logits[places].float() for unit, places in zip(full.units, full.places, strict=True)}
    spread = max(float(rows.max() - rows.min()) for rows in there.values())
    if all(float((here[key] - rows).abs().max()) <= TRIAL_TOLERANCE * spread for key, rows in there.items()):
        return None
    return f"{type(fused.model).__name__} gives other numbers after a shared context"


def questions_of(units: Iterable[Unit]) -> list[Question]:
    """Units grouped by prompt and context, longest contexts first."""
    found: dict[Any, Question] = {}
    for unit in units:
        found.setdefault((unit.prompt.key, unit.context), []).append(unit)
    return sorted(found.values(), key=lambda question: question[0].context_sort_key)


def batches_of(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Consecutive questions with at most ``size`` rows of contexts and at most ``size`` rows of options after them.

    A question with more options than that is a batch of its own.
    """
    batch: list[Question] = []
    rows = 0
    for question in questions:
        longer = sum(len(unit.continuation) > 1 for unit in question)
        if batch and (len(batch) == size or rows + longer > size):
            yield batch
            batch, rows = [], 0
        batch.append(question)
        rows += longer
    if batch:
        yield batch


@dataclass(frozen=True)
class Scorer:
    """What both ways need of a model.

    Args:
        model: A patched causal LM.
        bound: Binds the routing of these rows' prompts.
        watched: Watches the gates at the marked tokens of these rows.
        pad_id: Padding token.
        device: Of the model.
        max_length: Most tokens that are read of a unit.
    """

    model: Any
    bound: Callable[[Sequence[Prompt]], AbstractContextManager[Any]]
    watched: Callable[[Sequence[Prompt], Tensor], AbstractContextManager[Any]]
    pad_id: int
    device: torch.device
    max_length: int


def score_full(scorer: Scorer, batch: list[Unit]) -> Readings:
    """One forward pass with one row per unit."""
    windows = [unit.window(scorer.max_length) for unit in batch]
    ids, mask = pad_rows(windows, scorer.pad_id, "right", scorer.device)
    prompts = [unit.prompt for unit in batch]
    read = [len(window) - len(unit.continuation) + 1 for unit, window in zip(batch, windows, strict=True)]
    prompt_mask = mask * (torch.arange(mask.shape[1], device=scorer.device) < torch.tensor(read, device=scorer.device)[:, None])
    watched = scorer.watched(prompts, prompt_mask) if all(unit.reads_prompt for unit in batch) else nullcontext()
    with scorer.bound(prompts), watched:
        logits = scorer.model(input_ids=ids, attention_mask=mask).logits  # (B, T, V)
    here = [logits[row, start - 1 : len(window)] for row, (start, window) in enumerate(zip(read, windows, strict=True))]
    ends = torch.tensor([len(piece) for piece in here]).cumsum(0).tolist()
    return Readings(batch, torch.cat(here), [list(range(end - len(piece), end)) for end, piece in zip(ends, here, strict=True)])


def read_questions(scorer: Scorer, batch: Sequence[Question]) -> Readings:
    """Two forward passes at most: the contexts, then what follows the first token of longer options.

    The model must be one that ``why_not`` has nothing against.
    """
    from transformers import DynamicCache

    model, pad_id, device = scorer.model, scorer.pad_id, scorer.device
    prompts = [question[0].prompt for question in batch]
    ids, mask = pad_rows([question[0].context for question in batch], pad_id, "left", device)
    longer = [(row, unit) for row, question in enumerate(batch) for unit in question if len(unit.continuation) > 1]
    cache = DynamicCache(config=model.config) if longer else None
    options: dict[str, Any] = {"use_cache": cache is not None, "past_key_values": cache}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    with scorer.bound(prompts), scorer.watched(prompts, mask):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0), **options).logits
    pieces = [logits[:, -1]]
    starts: dict[int, int] = {}
    if longer:
        assert cache is not None
        rows = torch.tensor([row for row, _ in longer], device=device)
        later, later_mask = pad_rows([unit.continuation[:-1] for _, unit in longer], pad_id, "right", device)
        positions = mask.sum(dim=1)[rows, None] + torch.arange(later.shape[1], device=device)
        cache.batch_select_indices(rows)
        whole = torch.cat([mask[rows], later_mask], dim=1)
        with scorer.bound([unit.prompt for _, unit in longer]):
            behind = model(input_ids=later, attention_mask=whole, position_ids=positions, use_cache=True, past_key_values=cache).logits
        pieces.append(behind.flatten(0, 1))
        starts = {id(unit): len(batch) + place * later.shape[1] for place, (_, unit) in enumerate(longer)}
    units = [unit for question in batch for unit in question]
    first = {id(unit): row for row, question in enumerate(batch) for unit in question}
    places = [[first[id(unit)], *(starts.get(id(unit), 0) + index for index in range(len(unit.continuation) - 1))] for unit in units]
    return Readings(units, torch.cat(pieces), places)


def answers(logprobs: Tensor, places: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
    """Sum of the log-probabilities of each continuation, and whether each of its tokens is the most likely one.

    Args:
        logprobs: (N, V).
        places: Of every continuation, the row that scores each token.
        continuations: Tokens.

    Raises:
        NotFiniteError: If a log-probability is not a number: the model's logits are NaN or infinite.
    """
    rows = torch.tensor([row for one in places for row in one], dtype=torch.long, device=logprobs.device)
    tokens = torch.tensor([token for one in continuations for token in one], dtype=torch.long, device=logprobs.device)
    values = logprobs[rows, tokens].tolist()
    greedy = (logprobs.argmax(dim=-1)[rows] == tokens).tolist()
    found, start = [], 0
    for continuation in continuations:
        here = slice(start, start + len(continuation))
        if any(map(math.isnan, values[here])):
            raise NotFiniteError(NOT_FINITE)
        found.append((sum(values[here]), all(greedy[here])))
        start += len(continuation)
    return found
