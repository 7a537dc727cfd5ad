"""The guarded subset of the nano suite: ``dlplora report check`` runs it again and compares it with the golden file.

All observations use the embedded artifacts, so they depend on the code only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dlplora.errors import MethodError, nearest
from dlplora.evaluation.outcomes import outcomes_of
from dlplora.evaluation.protocol import load_protocol
from dlplora.evaluation.runner import Run, evaluate_run, open_model, prepare
from dlplora.reporting.comparison import MAIN_METRIC
from dlplora.types import PromptBatch

if TYPE_CHECKING:
    from dlplora.lm_eval.model import DLPLoRALM

LIMIT = 8
"""Questions per task."""
PROBES = 6
"""Logits kept of every probed prompt, at fixed positions of the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """One guarded run."""

    name: str
    preset: str
    params: Mapping[str, Any] = field(default_factory=dict)


GUARDS = (
    Guard(name="base", preset="base"),
    Guard(name="oracle", preset="oracle"),
    Guard(name="dlp", preset="dlp"),
    # The nano router is so confident that presets keep one expert; here the nucleus holds several.
    Guard(name="dlp_wide", preset="dlp", params={"selector": "nucleus", "top_p": 0.9999, "renormalize": "sum"}),
    Guard(name="ties", preset="ties"),
    Guard(name="avg_factor", preset="avg_factor"),
    Guard(name="arrow_out", preset="arrow_out"),
    Guard(name="meteora_gate", preset="meteora_gate"),
    Guard(name="xlora", preset="xlora"),
)


def chosen(names: Sequence[str] | None) -> tuple[Guard, ...]:
    """The named guards, None for all.

    Raises:
        MethodError: If one is unknown.
    """
    by_name = {guard.name: guard for guard in GUARDS}
    for name in names or ():
        if name not in by_name:
            raise MethodError(f"'{name}' is not guarded.{nearest(name, by_name)} Guarded: {', '.join(by_name)}.")
    return tuple(GUARDS if names is None else (by_name[name] for name in names))


def observe(guard: Guard) -> dict[str, Any]:
    """Run one guard and return what the golden file keeps of it."""
    run = prepare(load_protocol("nano"), "nano", guard.preset, 0, method_params=guard.params, limit=LIMIT)
    with open_model(run) as lm:
        outcomes = outcomes_of(evaluate_run(run, lm), run.prefix, lm.statistics.routes)
        return {
            "logits": _probe(run, lm),
            "routing": {
                f"{one.task}/{one.question}": None if one.routing is None else [[at, kept] for at, kept in one.routing] for one in outcomes
            },
            "right": {
                task.name: "".join(str(int(one.metrics[MAIN_METRIC[task.kind]])) for one in outcomes if one.task == task.name)
                for task in run.suite.tasks
            },
        }


@torch.no_grad()
def _probe(run: Run, lm: DLPLoRALM) -> dict[str, list[float]]:
    """Logits after the first test prompt of every task, all prompts in one batch of unequal lengths."""
    fused = lm.fused
    names = list(run.suite.names)
    texts = [run.suite.task(name).items("test", 1)[0].prompt for name in names]
    prompts = PromptBatch.from_texts(texts, fused.tokenizer, device=fused.device, task_names=names)
    state = fused.route(prompts)
    with nullcontext() if state is None else fused.routing(state):
        logits = fused(input_ids=prompts.input_ids, attention_mask=prompts.attention_mask).logits
    last = prompts.attention_mask.sum(dim=1) - 1
    rows = logits[torch.arange(len(names)), last]
    columns = torch.linspace(0, rows.shape[1] - 1, PROBES).long()
    return {name: [round(value, 5) for value in row] for name, row in zip(names, rows[:, columns].tolist(), strict=True)}
