"""How many experts to keep and how to weight them: ``python -m benchmarks.selection``.

On some questions per task of the nano suite: the bound of nucleus and threshold (``p``), the weighting of the kept experts, a router with
errors, and pools of 2 to 26 experts. Writes ``results/sweeps/nano_selection.json``; finished points are not run again, so an interrupted
run continues.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlplora.evaluation.outcomes import outcomes_of
from dlplora.evaluation.protocol import load_protocol
from dlplora.evaluation.runner import evaluate_run, prepare
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.loading import nano_asset
from dlplora.lm_eval.model import DLPLoRALM
from dlplora.methods.dlp import DLP
from dlplora.modules.router import MiniMLPRouter
from dlplora.provenance import provenance
from dlplora.reporting.comparison import MAIN_METRIC
from dlplora.reporting.statistics import mean_stderr
from dlplora.reporting.store import RESULTS
from dlplora.reporting.sweeps import Point, SweepFile, read_sweep, sweep_path, write_sweep
from dlplora.tasks.nano import nano_suite

LIMIT = 40
"""Questions per task."""
P_VALUES = (0.3, 0.5, 0.6, 0.8, 0.95, 1.0)
FLIP_RATES = (0.0, 0.05, 0.1, 0.2, 0.3)
NUM_EXPERTS = (2, 4, 8, 16)
ORDERS = 3
"""Random orders of the experts; a pool of E experts holds the first E of an order."""
UNSURE = 0.55
"""What a router that errs without conviction gives the wrong expert; the right one keeps the rest of its probability."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One point to run."""

    sweep: str
    series: str
    x: float
    method: str = "dlp"
    params: Mapping[str, Any] = field(default_factory=dict)
    flip_rate: float = 0.0
    conviction: float = 1.0
    """Share of both experts' probability that a wrong one gets, the right one keeps the rest."""
    experts: tuple[str, ...] = ()
    """Names of the pool's experts; empty: all. Their tasks are the ones asked."""
    order: int = 0

    @property
    def key(self) -> tuple[str, str, float, int]:
        """What tells this point from the others."""
        return self.sweep, self.series, self.x, self.order

    def settings(self) -> dict[str, Any]:
        """As written to the file."""
        found: dict[str, Any] = {"method": self.method, "params": dict(self.params)}
        if self.flip_rate:
            found |= {"flip_rate": self.flip_rate, "conviction": self.conviction}
        if self.experts:
            found |= {"experts": list(self.experts), "order": self.order}
        return found


def cases() -> Iterator[Case]:
    """Every point of the sweeps."""
    unsure: dict[str, Any] = {"flip_rate": 0.3, "conviction": UNSURE}
    for selector, how in (("nucleus", "softmax"), ("nucleus", "sum"), ("threshold", "softmax")):
        for p in P_VALUES:
            params = {"selector": selector, "top_p" if selector == "nucleus" else "threshold": p, "renormalize": how}
            yield Case(sweep="p", series=f"{selector}, {how}", x=p, params=params)
            yield Case(sweep="p_unsure", series=f"{selector}, {how}", x=p, params=params, **unsure)
    for how in ("softmax", "sum", "logits", "uniform", "none"):
        for rate in (0.0, 0.3):
            params = {"selector": "nucleus", "top_p": 0.6, "renormalize": how}
            yield Case(sweep="weighting", series=how, x=rate, params=params, flip_rate=rate, conviction=UNSURE)
    for preset in ("dlp", "dlp_code", "dlp_top1"):
        for conviction, name in ((1.0, "flips"), (UNSURE, "flips_unsure")):
            for rate in FLIP_RATES:
                yield Case(sweep=name, series=preset, x=rate, method=preset, flip_rate=rate, conviction=conviction)
    yield from _pools()


def _pools() -> Iterator[Case]:
    names = np.array(nano_suite().names)
    for order in range(ORDERS):
        shuffled = names[np.random.default_rng(order).permutation(len(names))]
        for num in NUM_EXPERTS:
            for method in ("oracle", "dlp", "avg_delta", "arrow_out"):
                params = {"top_k": min(3, num)} if method == "arrow_out" else {}  # its preset keeps three
                experts = tuple(map(str, shuffled[:num]))
                yield Case(sweep="experts", series=method, x=num, method=method, params=params, experts=experts, order=order)
    for method in ("oracle", "dlp", "avg_delta", "arrow_out"):
        yield Case(sweep="experts", series=method, x=len(names), method=method)


class ErringRouter(torch.nn.Module):
    """A router that trusts a wrong expert for a share of the prompts, always the same prompts and the same expert.

    Args:
        router: The trained one.
        rate: Share of prompts.
        conviction: Share of both experts' probability that the wrong one gets; 1 leaves the right one nothing.
    """

    def __init__(self, router: MiniMLPRouter, rate: float, conviction: float) -> None:
        super().__init__()
        self.router = router
        self.names, self.rate, self.conviction = router.names, rate, conviction

    def column_order(self, names: Sequence[str]) -> Tensor:
        """As the trained router's."""
        return self.router.column_order(names)

    def probabilities(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and their logarithms, (B, E) each; a row depends on its own real tokens alone."""
        probs, _ = self.router.probabilities(input_ids, attention_mask)
        probs = probs.clone()
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            draw = np.random.default_rng(zlib.crc32(ids[mask.bool()].cpu().numpy().tobytes()))
            if draw.random() < self.rate:
                best = int(probs[row].argmax())
                wrong = (best + int(draw.integers(1, len(self.names)))) % len(self.names)
                total = float(probs[row, best] + probs[row, wrong])
                probs[row, wrong], probs[row, best] = self.conviction * total, (1 - self.conviction) * total
        return probs, probs.clamp_min(1e-30).log()


def restricted_router(names: Sequence[str], embedding: torch.nn.Module, folder: Path) -> Path:
    """The embedded router with the classes of some experts only: its other output rows are left out, nothing is trained."""
    whole = MiniMLPRouter.load(nano_asset("router"), embedding)
    part = MiniMLPRouter(names, whole.config, embedding=embedding)
    state = whole.state_dict()
    rows = torch.tensor([whole.names.index(name) for name in names])
    last = f"mlp.{len(whole.mlp) - 1}"
    for key in (f"{last}.weight", f"{last}.bias"):
        state[key] = state[key][rows]
    part.load_state_dict(state)
    part.save(folder)
    return folder


def run_case(case: Case, limit: int, embedding: torch.nn.Module) -> Point:
    """Evaluate one point through lm-eval, as ``dlplora eval`` does."""
    protocol = load_protocol("nano", {"tasks": list(case.experts)} if case.experts else None)
    run = prepare(protocol, "nano", case.method, 0, method_params=case.params, limit=limit)
    with tempfile.TemporaryDirectory() as place:
        folders = dict(run.folders)
        if case.experts and "router" in folders:
            folders["router"] = restricted_router(case.experts, embedding, Path(place) / "router")
        fused = FusedCausalLM.from_pretrained(
            None,
            method=case.method,
            method_params=dict(case.params),
            artifacts={role: path for role, path in folders.items() if role != "pool"},
            names=case.experts or None,
            device="cpu",
        )
    method: Any = fused.method
    if case.flip_rate and isinstance(method, DLP) and method.router is not None:
        method.router = ErringRouter(method.router, case.flip_rate, case.conviction)  # type: ignore[assignment]
    lm = DLPLoRALM(fused=fused, batch_size=protocol.batch_size)
    try:
        outcomes = outcomes_of(evaluate_run(run, lm), run.prefix, lm.statistics.routes)
        routing = lm.routing_statistics()
    finally:
        lm.close()
    metrics: dict[str, float | None] = {key: routing[key] for key in ("mean_experts_kept", "router_accuracy", "mean_entropy_nats")}
    kinds = {task.name: task.kind for task in run.suite.tasks}
    for kind, name in (("mcq", "mcq_acc"), ("gen", "gen_exact_match"), (None, "right")):
        rows = [one.metrics[MAIN_METRIC[kinds[one.task]]] for one in outcomes if kind in (None, kinds[one.task])]
        metrics |= {name: float(np.mean(rows)) if rows else None, f"{name}_stderr": mean_stderr(rows)}
    rounded = {key: None if value is None else round(float(value), 5) for key, value in metrics.items()}
    return Point(
        sweep=case.sweep, series=case.series, x=case.x, num=len(outcomes), metrics=rounded, settings=case.settings() | {"order": case.order}
    )


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=LIMIT, help="questions per task")
    parser.add_argument("--out", default=str(RESULTS), help="results folder")
    arguments = parser.parse_args()
    root = Path(arguments.out)
    path = sweep_path("nano", "selection", root)
    points = list(read_sweep(path).points) if path.is_file() else []
    known = {(one.sweep, one.series, one.x, one.settings["order"]) for one in points}
    embedding = FusedCausalLM.from_pretrained(None, method="base", device="cpu").model.get_input_embeddings()
    for case in cases():
        if case.key in known:
            continue
        points.append(run_case(case, arguments.limit, embedding))
        print(f"{case.sweep}: {case.series}, {case.x:g}: {points[-1].metrics}", file=sys.stderr)
        write_sweep(SweepFile(name="selection", suite="nano", limit=arguments.limit, points=tuple(points), provenance=provenance()), root)


if __name__ == "__main__":
    main()
