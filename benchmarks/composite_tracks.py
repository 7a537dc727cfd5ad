"""Composite-n on nano: every row of ``results/tables/composite.md``. ``python -m benchmarks.composite_tracks run``, then ``report``.

``run`` evaluates what has no record yet, one record per row, and continues after an interruption; ``report`` writes table and figure from
records; ``trace`` shows which experts answer the questions of one composite. ``main`` rows use the protocol ``nano_composite``;
``ablation`` rows are files in ``configs/ablation/composite`` and use the protocol ``nano_composite_ablation``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlplora.config import configs_root
from dlplora.evaluation.protocol import load_protocol
from dlplora.evaluation.runner import Artifacts, Run, execute, finished, prepare
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.loading import nano_asset
from dlplora.lm_eval.answer_form import AnswerForm
from dlplora.reporting.store import RESULTS
from dlplora.tasks.composite import composite_row, composites, parse_answers
from dlplora.tasks.registry import get_suite
from dlplora.types import PromptBatch

MAIN = ("base", "dlp_threshold", "dlp", "dlp_composite", "oracle_segment", "avg_delta", "arrow_out", "meteora_gate", "meteora_full")
"""Without adapters; routed once per prompt; at sentence ends, two readings; with given tasks; never; by token, three ways."""


def planned(what: str) -> Iterator[Run]:
    """The runs of one protocol, resolved."""
    if what == "main":
        names, protocol_name = list(MAIN), "nano_composite"
    else:
        names = [str(path) for path in sorted((configs_root() / "ablation" / "composite").glob("*.yaml"))]
        protocol_name = "nano_composite_ablation"
    protocol = load_protocol(protocol_name)
    for name in names:
        shipped = nano_asset(f"trained/{name}")
        others = {"trained": shipped} if shipped.is_dir() else {}
        yield prepare(protocol, protocol_name, name, protocol.seeds[0], artifacts=Artifacts(others=others))


def run(what: str, root: Path) -> None:
    """Evaluate what has no record."""
    for one in planned(what):
        path = finished(one, root)
        if path is None:
            print(f"{one.spec.name} under {one.protocol_name} …", file=sys.stderr, flush=True)
            path, _ = execute(one, root)
        print(path)


def trace(method: str, reading: str, n: int, index: int) -> None:
    """Ask one composite and print every answer, the adapters used, and what the router read."""
    fused = FusedCausalLM.from_pretrained(method=method, device="cpu")
    composite = composites(get_suite("nano"), reading, n, index + 1)[index]
    row = composite_row(composite)
    prompts = PromptBatch.from_texts([composite.prompt], fused.tokenizer, task_names=[row["task"]])
    width = prompts.input_ids.shape[1]
    form = AnswerForm([composite.form], fused.tokenizer, width)
    entries: list[dict[str, Any]] = []
    tokens = fused.generate(prompts=prompts, max_new_tokens=18 * n, do_sample=False, trace=entries, logits_processor=[form])
    text = fused.tokenizer.decode(tokens[0, width:], skip_special_tokens=True)
    print(f"{method}, {reading} of {n}")
    for part, answer in zip(composite.parts, parse_answers(text, reading, composite.parts, True), strict=True):
        print(f"  {part.task}: {answer!r} (right: {part.answer!r})")
    for piece in entries[0].get("prompt_pieces", ()):
        print(f"  prompt piece {_short(piece['text'])}: {_experts(piece['weights'])}")
    for entry in entries:
        print(f"  from character {entry['at']}: {_experts(entry['weights'])}, read {_short(entry['view_text'])}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 64 else f"…{text[-63:]}")


def _experts(weights: dict[str, float]) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in sorted(weights.items(), key=lambda pair: -pair[1])) or "no expert"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["run", "report", "trace"])
    parser.add_argument("--rows", choices=["main", "ablation"], nargs="+", default=["main", "ablation"])
    parser.add_argument("--out", default=str(RESULTS), metavar="DIR")
    parser.add_argument("--method", default="dlp_composite", help="trace: preset or YAML file")
    parser.add_argument("--reading", default="concat", choices=["concat", "serial"], help="trace")
    parser.add_argument("--n", type=int, default=3, help="trace: questions")
    parser.add_argument("--index", type=int, default=0, help="trace: which composite")
    arguments = parser.parse_args()
    if arguments.action == "run":
        for what in arguments.rows:
            run(what, Path(arguments.out))
    elif arguments.action == "trace":
        trace(arguments.method, arguments.reading, arguments.n, arguments.index)
    else:
        from dlplora.reporting.composite_tables import write

        for path in write(Path(arguments.out)):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
