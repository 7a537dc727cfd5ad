"""Whether methods detect prompts that no expert knows: ``python -m benchmarks.out_of_scope run``, then ``report``.

In scope are the test prompts of the tasks that pool and router know. Out of scope, *near*: test prompts of tasks of the same suite that
were removed from the pool and from the training rows of routers and classifiers. *Far*: test prompts of another suite. ``run`` writes its
record after every method and continues after an interruption; ``report`` writes tables into ``docs/out_of_scope.md`` and
``results/tables``.

No answer is generated; a choice is right if it is the prompt's own expert.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.docs_table import with_table
from benchmarks.unseen_task import subject
from dlplora.atomic import write_atomically
from dlplora.cli.model_options import parse_parameter
from dlplora.errors import ConfigError, DLPLoRAError
from dlplora.evaluation.identity import folder_hash
from dlplora.evaluation.protocol import Protocol, load_protocol
from dlplora.evaluation.scope_metrics import detection, risk_coverage
from dlplora.evaluation.scope_threshold import prompts_of
from dlplora.inference.backbones import nano_asset, resolve_backbone
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods.registry import build_method, load_method_spec
from dlplora.modules.scope import choose_threshold
from dlplora.provenance import provenance
from dlplora.reporting import markdown
from dlplora.reporting.store import RESULTS
from dlplora.reproduce.recipe import Setting
from dlplora.reproduce.training import assemble_pool, train
from dlplora.tasks.registry import get_suite
from dlplora.types import PromptBatch

METHODS = ("dlp", "lorauter", "retriever_mixture", "ariadne", "knn_minilm", "logreg", "tfidf_linear", "logo_norm")
HELD_OUT = {"nano": ("bridge_colors", "logical_order_last", "translate_lunese", "pick_tool", "news_summary", "object_counting")}
"""Four with a sibling that stays in the pool, two without."""
FAR = {"nano": "skills"}
"""Suite of the far prompts; ``nano`` for any other suite."""
PAGE = Path("docs/out_of_scope.md")
KEEP = 0.95
ROWS = 64


class Track:
    """Prompts, pool and router of one suite.

    Args:
        arguments: Of the command line.

    Raises:
        ConfigError: If a held-out task does not exist, or nothing is out of scope.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.protocol, setting, pool = _subject(arguments)
        self.suite, self.limit, self.folder = setting.chosen(), arguments.limit, arguments.runs / arguments.suite
        self.held_out = tuple(arguments.held_out.split(",")) if arguments.held_out else HELD_OUT.get(arguments.suite, ())
        for name in self.held_out:
            self.suite.task(name)
        self.known = tuple(name for name in self.suite.names if name not in self.held_out)
        far = get_suite(arguments.far or FAR.get(arguments.suite, "nano"), arguments.data_root)
        self.far = far.name
        self.prompts = {
            "validation": prompts_of(self.suite, self.known, "validation", self.limit),
            "in_scope": prompts_of(self.suite, self.known, "test", self.limit),
            "near": prompts_of(self.suite, self.held_out, "test", self.limit),
            "far": prompts_of(far, [name for name in far.names if name not in self.suite.names], "test", self.limit),
        }
        self.labels = [name for name in self.known for _ in self.suite.task(name).items("test", self.limit)]
        if not (self.prompts["near"] or self.prompts["far"]):
            raise ConfigError("nothing is out of scope: name tasks with --held-out, or another suite with --far.")
        self.pool, self._router, self._setting = self._smaller(pool), arguments.router, setting

    def _smaller(self, pool: Path) -> Path:
        if not self.held_out:
            return pool
        folder = self.folder / "pool"
        if not folder.is_dir():
            assemble_pool(dict.fromkeys(self.known, pool), folder, self.known)
        return folder

    def router(self) -> Path:
        """A router over the known tasks: the given one if nothing is held out, otherwise one that is trained once."""
        if self._router is not None and not self.held_out:
            return Path(self._router)
        if not self.held_out and self._setting.shipped:
            return nano_asset("router")
        folder = self.folder / "router"
        return folder if (folder / "recipe.json").is_file() else train("router", self.folder, setting=_over(self._setting, self.known))

    def facts(self) -> dict[str, Any]:
        """What the figures depend on."""
        return {
            "suite": self.suite.name,
            "known": list(self.known),
            "near": list(self.held_out),
            "far": self.far,
            "prompts_a_task": self.limit,
            "prompts": {name: len(texts) for name, texts in self.prompts.items()},
            "router_sha256": folder_hash(self.router(), ("scope.json",)),
        }

    def figures(self, method: str) -> dict[str, Any]:
        """Score -> figures of a method; empty if it has no score."""
        scores, weights = self._read(method)
        right = torch.tensor([row[self.known.index(task)] == row.max() for row, task in zip(weights, self.labels, strict=True)])
        return {name: _figures({part: values[name] for part, values in scores.items()}, right) for name in scores["in_scope"]}

    def _read(self, method: str) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
        """Part -> score -> values, and the routing weights of the in-scope prompts."""
        name, _, options = method.partition(":")
        params = dict(map(parse_parameter, options.split(":"))) if options else {}
        needs = build_method(load_method_spec(name, params)).artifact_roles
        fused = FusedCausalLM.from_pretrained(
            self.protocol.backbone,
            pool=self.pool,
            method=name,
            method_params=params,
            artifacts={"router": self.router()} if "router" in needs else {},
            dtype=self.protocol.dtype,
            few_shot=lambda task, num: self.suite.task(task).items("train", num),
        )
        try:
            found = {part: _scores(fused, texts) for part, texts in self.prompts.items()}
            weights = [fused.request_router.per_expert(_routed(fused, batch)) for batch in _batches(fused, self.prompts["in_scope"])]
        finally:
            fused.close()
        return found, torch.cat(weights).cpu()


def _subject(arguments: argparse.Namespace) -> tuple[Protocol, Setting, Path]:
    """Protocol, setting and pool: of nano or a profile, or of a protocol on a named base model.

    Raises:
        ConfigError: If the pool is not named, or tasks are held out without the recipes of a profile.
    """
    if arguments.backbone is None:
        return subject(arguments.suite, arguments.data_root, arguments.pool)
    if arguments.pool is None:
        raise ConfigError("--pool is missing: the folder with the experts of all tasks.")
    if arguments.held_out:
        raise ConfigError("--held-out trains a router by the recipe of a profile; leave out --backbone.")
    given = {"backbone": resolve_backbone(arguments.backbone), **({"data_root": arguments.data_root} if arguments.data_root else {})}
    protocol = load_protocol(arguments.suite, given)
    return protocol, Setting(backbone=protocol.backbone, suite=protocol.suite, data_root=protocol.data_root), arguments.pool


def _over(setting: Setting, known: tuple[str, ...]) -> Setting:
    """The setting over the known tasks; the embedded one stays the embedded one, so that its recipes hold."""
    told = {"router": [f"--data.init_args.tasks={','.join(known)}"]} if setting.shipped else {}
    return dataclasses.replace(setting, tasks=None if setting.shipped else known, options={**setting.options, **told})


def _batches(fused: FusedCausalLM, texts: Sequence[str]) -> list[PromptBatch]:
    return [
        PromptBatch.from_texts(texts[start : start + ROWS], fused.tokenizer, device=fused.device) for start in range(0, len(texts), ROWS)
    ]


@torch.no_grad()
def _routed(fused: FusedCausalLM, batch: PromptBatch) -> Tensor:
    weights = fused.request_router.route(batch)
    if weights is None:
        raise ConfigError(f"method '{fused.method.name}' has no weights of a prompt.")
    return weights


@torch.no_grad()
def _scores(fused: FusedCausalLM, texts: Sequence[str]) -> dict[str, Tensor]:
    parts = [fused.method.scope_scores(batch) for batch in _batches(fused, texts)]
    return {name: torch.cat([part[name].double().cpu() for part in parts]) for name in (parts[0] if parts else {})}


def _figures(scores: Mapping[str, Tensor], right: Tensor) -> dict[str, Any]:
    """Figures of one score; what of the far and near prompts is kept at the threshold that validation prompts give."""
    threshold = choose_threshold("energy", scores["validation"], keep=KEEP).threshold
    outside = {part: scores[part] for part in ("near", "far") if part in scores and len(scores[part])}
    every = torch.cat(list(outside.values()))
    kept = {part: float((values >= threshold).double().mean()) for part, values in {"in_scope": scores["in_scope"], **outside}.items()}
    mixed = torch.cat([right, torch.zeros(len(every), dtype=torch.bool)])
    found = {
        **{part: detection(scores["in_scope"], values) for part, values in outside.items()},
        "threshold": threshold,
        "kept": kept,
        "in_scope_only": risk_coverage(scores["in_scope"], right),
        "mixed": risk_coverage(torch.cat([scores["in_scope"], every]), mixed),
    }
    return _rounded(found)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return round(value, 6) if isinstance(value, float) else value


def run(arguments: argparse.Namespace) -> None:
    """Measure what the record lacks."""
    track, path = Track(arguments), record_path(arguments)
    facts = track.facts()
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"kind": "out_of_scope", **facts, "methods": {}}
    if any(record[key] != value for key, value in facts.items()):
        raise ConfigError(f"{path} belongs to other prompts or another router; remove it, or name another folder with --out.")
    for method in arguments.methods.split(","):
        if method in record["methods"]:
            continue
        record["methods"][method] = track.figures(method)
        record["provenance"] = provenance()
        write_atomically(path, json.dumps(record, indent=1, sort_keys=True) + "\n")
        print(method, record["methods"][method], file=sys.stderr, flush=True)


def table(record: dict[str, Any]) -> str:
    """Percent, AURC in thousandths; one row per method and score."""
    parts = [part for part in ("near", "far") if record["prompts"][part]]

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    rows = []
    for method in [name for name in METHODS if name in record["methods"]] + sorted(set(record["methods"]) - set(METHODS)):
        for score, found in record["methods"][method].items():
            cells = [percent(found.get(part, {}).get(key)) for part in parts for key in ("auroc", "fpr")]
            kept = [percent(found["kept"].get(part)) for part in ("in_scope", *parts)]
            accuracy = found["in_scope_only"]["accuracy"]
            aurcs = [f"{1000 * found[part]['aurc']:.1f}" for part in ("in_scope_only", "mixed")]
            rows.append([markdown.code(method), score, *cells, *kept, percent(accuracy["1"]), percent(accuracy["0.8"]), *aurcs])
    outside = [f"{part}: {what}" for part in parts for what in ("AUROC", "FPR95")]
    kept_heads = [f"kept: {part}" for part in ("in", *parts)]
    head = ["method", "score", *outside, *kept_heads, "right", "right, surest 80 %", "AURC", "AURC, all"]
    return markdown.table(head, rows, left=2)


def record_path(arguments: argparse.Namespace) -> Path:
    """Path of the record of a suite."""
    return Path(arguments.out) / "bench" / f"out_of_scope-{arguments.suite}.json"


def report(arguments: argparse.Namespace) -> None:
    """Write the table into the page and into a file of its own."""
    record = json.loads(record_path(arguments).read_text(encoding="utf-8"))
    name = f"out_of_scope-{arguments.suite}"
    write_atomically(PAGE, with_table(PAGE.read_text(encoding="utf-8"), name, table(record)))
    write_atomically(Path(arguments.out) / "tables" / f"{name}.md", f"{heading(record)}\n\n{table(record)}\n")
    print(f"wrote {PAGE}")


def heading(record: dict[str, Any]) -> str:
    """Title and what the columns are, for the file."""
    count = record["prompts"]
    return (
        f"# Out of scope: {record['suite']}\n\n"
        f"{count['in_scope']} in-scope prompts of {len(record['known'])} tasks; near: {count['near']} of "
        f"{', '.join(record['near']) or 'no task'}; far: {count['far']} of the suite {record['far']}. "
        "[docs/out_of_scope.md](../../docs/out_of_scope.md) explains the columns."
    )


def main() -> int:
    """Read the command line; 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("--suite", default="nano", help="nano, or a profile such as real26 or real26_skills")
    parser.add_argument("--backbone", help="another base model than the profile's, for instance smollm2-135m")
    parser.add_argument("--pool", type=Path, help="with the experts of all tasks; default for nano: the embedded one")
    parser.add_argument("--router", type=Path, help="router of all tasks, used if nothing is held out; otherwise one is trained")
    parser.add_argument("--held-out", metavar="TASK,TASK", help="tasks taken out of the pool (default: six of nano, none of others)")
    parser.add_argument("--far", metavar="SUITE", help="suite of the far prompts (default: skills for nano, nano for others)")
    parser.add_argument("--data-root")
    parser.add_argument("--methods", default=",".join(METHODS), help="presets, with other parameters as NAME:KEY=VALUE")
    parser.add_argument("--limit", type=int, default=100, help="prompts per task and split (default: 100)")
    parser.add_argument("--runs", type=Path, default=Path("runs/out_of_scope"))
    parser.add_argument("--out", default=str(RESULTS), metavar="DIR")
    arguments = parser.parse_args()
    try:
        {"run": run, "report": report}[arguments.action](arguments)
    except DLPLoRAError as error:
        print(f"out_of_scope: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
