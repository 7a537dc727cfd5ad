"""Several questions of different tasks in one prompt, answered in turn: ``python -m benchmarks.several_skills train``, ``run``, ``report``.

``train`` makes experts and a router over the suite ``skills_several``: a training row asks one to three questions of the expert's own task.
``run`` asks composed prompts with questions of different tasks, and scores every answer by its position. It writes its record after
every row and continues after an interruption; ``report`` writes the table into ``docs/several_skills.md``.

The questions have no labels, there is no cue between two answers, and the router is not told where a question ends. Rows with ``told`` are
references.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.docs_table import with_table
from dlplora.adapters.pool import load_pool
from dlplora.atomic import write_atomically
from dlplora.documents import read_json
from dlplora.errors import ConfigError, DLPLoRAError
from dlplora.evaluation.identity import backbone_identity, folder_hash
from dlplora.inference.backbones import resolve_backbone
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.inference.loading import backbones_kept
from dlplora.provenance import provenance
from dlplora.reporting import markdown
from dlplora.reporting.store import RESULTS
from dlplora.reproduce import artifacts
from dlplora.reproduce.recipe import Setting
from dlplora.reproduce.training import train
from dlplora.tasks.several import TASKS, Composed, answers_in, composed
from dlplora.tasks.types import TASK_SEPARATOR
from dlplora.types import PromptBatch

SIZES = (1, 2, 3)
TOKENS_AN_ANSWER = 16
"""Room for each answer; the longest right one has 14 tokens."""
PAGE = Path("docs/several_skills.md")
NAME = "several_skills"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        method: Preset.
        title: Description in the table.
        params: Overrides of the preset.
        told: What the method gets besides the prompt: nothing, the task of the first question, the tasks of all in order, or what the
            router's decision for each single question.
    """

    method: str
    title: str
    params: dict[str, Any] = field(default_factory=dict)
    told: Literal["nothing", "first", "all", "routed"] = "nothing"


_BY_SENTENCE = {"segments": True}
_RECOMPUTED = {"segments": True, "kv_policy": "recompute"}
ROWS = {
    "base": Row("base", "no adapter"),
    "dlp_prompt": Row("dlp", "routed once for the whole answer", {"reroute": "prompt"}),
    "dlp_top1_prompt": Row("dlp_top1", "the router's best expert for the whole answer", {"reroute": "prompt"}),
    "dlp": Row("dlp", "routed again at sentence ends (the paper's rule)"),
    "dlp_recompute": Row("dlp", "the same, prefix read again", {"kv_policy": "recompute"}),
    "arrow_out": Row("arrow_out", "by token, no training"),
    "spectr": Row("spectr", "by token, no training"),
    "oracle_first": Row("oracle", "control: the first question's expert throughout", told="first"),
    "oracle_sentence": Row("oracle", "the right expert for each sentence", _BY_SENTENCE, "all"),
    "oracle_sentence_recompute": Row("oracle", "the same, prefix read again", _RECOMPUTED, "all"),
    "routed_by_question": Row("oracle", "router given question i for sentence i, prefix read again", _RECOMPUTED, "routed"),
}


def setting_of(arguments: argparse.Namespace) -> Setting:
    """What experts and router are trained over."""
    identity = backbone_identity(arguments.backbone, None)
    return Setting(
        backbone=str(resolve_backbone(arguments.backbone)),
        base_model_name=identity["name"],
        suite="skills_several",
        tasks=None if arguments.tasks is None else tuple(arguments.tasks.split(",")),
        configs={"pool": "several_experts", "router": "several_router"},
        processes=arguments.processes,
    )


def ready(role: str, arguments: argparse.Namespace) -> Path | None:
    """The folder of a trained artifact, if its recipe has not changed."""
    found = artifacts.locate(role, arguments.runs, fresh=True, setting=setting_of(arguments))
    return found.folder if found.ready else None


def trained(arguments: argparse.Namespace) -> None:
    """Train what is missing."""
    for role in ("pool", "router"):
        print(ready(role, arguments) or train(role, arguments.runs, setting=setting_of(arguments)))


class Track:
    """Prompts, pool and router.

    Raises:
        ConfigError: If pool or router are not trained.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        folders = {role: ready(role, arguments) for role in ("pool", "router")}
        missing = [role for role, folder in folders.items() if folder is None]
        if missing:
            raise ConfigError(f"no trained {missing[0]} in {arguments.runs}; run `python -m benchmarks.several_skills train` first.")
        self.pool, self.router = Path(str(folders["pool"])), Path(str(folders["router"]))
        self.backbone, self.dtype = arguments.backbone, arguments.dtype
        self.tasks = TASKS if arguments.tasks is None else tuple(arguments.tasks.split(","))
        self.prompts = {n: composed(self.tasks, n, arguments.num) for n in SIZES}

    def facts(self) -> dict[str, Any]:
        """What a record's figures depend on, besides the methods."""
        return {
            "backbone": backbone_identity(self.backbone, None),
            "dtype": self.dtype,
            "pool": load_pool(self.pool).checksum(),
            "router": folder_hash(self.router),
            "tasks": list(self.tasks),
            "prompts": {str(n): len(prompts) for n, prompts in self.prompts.items()},
        }

    def model(self, method: str, params: dict[str, Any]) -> FusedCausalLM:
        """The base model under a method; close it before the next."""
        given = {"pool": self.pool, "router": self.router, "dtype": self.dtype, "device": "cpu"}
        return FusedCausalLM.from_pretrained(self.backbone, method=method, method_params=params, **given)

    def routed(self) -> dict[int, list[str]]:
        """For every prompt, the router's best expert of each question read by itself."""
        fused = self.model("dlp_top1", {})
        try:
            return {n: [self._best(fused, one) for one in prompts] for n, prompts in self.prompts.items()}
        finally:
            fused.close()

    def _best(self, fused: FusedCausalLM, one: Composed) -> str:
        state = fused.route(PromptBatch.from_texts([part.question for part in one.parts], fused.tokenizer))
        assert state is not None
        return TASK_SEPARATOR.join(fused.bank.names[index] for index in state.per_row().argmax(dim=-1).tolist())

    def scores(self, row: Row, batch_size: int) -> dict[str, Any]:
        """Number of questions -> what is right, position by position."""
        told = self.routed() if row.told == "routed" else None
        fused = self.model(row.method, row.params)
        try:
            return {
                str(n): self._score(fused, prompts, _names(row, prompts) if told is None else told[n], batch_size)
                for n, prompts in self.prompts.items()
            }
        finally:
            fused.close()

    def _score(self, fused: FusedCausalLM, prompts: Sequence[Composed], names: Sequence[str | None], batch_size: int) -> dict[str, Any]:
        right: list[list[int]] = []
        routing: list[list[dict[str, float]]] = []
        example = ""
        for start in range(0, len(prompts), batch_size):
            batch, told = prompts[start : start + batch_size], names[start : start + batch_size]
            texts, entries = answer(fused, batch, told)
            example = example or texts[0]
            for row, (one, text) in enumerate(zip(batch, texts, strict=True)):
                given = answers_in(text, len(one.parts))
                right.append([int(found == part.answer) for found, part in zip(given, one.parts, strict=True)])
                routing.append([entry["weights"] for entry in entries if entry["row"] == row][: len(one.parts)])
        return {"right": right, "example": example, **_routing_facts(prompts, routing)}


def answer(fused: FusedCausalLM, batch: Sequence[Composed], told: Sequence[str | None]) -> tuple[list[str], list[dict[str, Any]]]:
    """Greedy answers to a batch of prompts, and the routing trace."""
    prompts = PromptBatch.from_texts([one.prompt for one in batch], fused.tokenizer, task_names=told)
    room = TOKENS_AN_ANSWER * max(len(one.parts) for one in batch)
    trace: list[dict[str, Any]] = []
    tokens = fused.generate(prompts=prompts, max_new_tokens=room, do_sample=False, trace=trace)
    return fused.tokenizer.batch_decode(tokens[:, prompts.input_ids.shape[1] :], skip_special_tokens=True), trace


def _names(row: Row, prompts: Sequence[Composed]) -> list[str | None]:
    if row.told == "nothing":
        return [None] * len(prompts)
    return [one.parts[0].task if row.told == "first" else one.tasks for one in prompts]


def _routing_facts(prompts: Sequence[Composed], routing: Sequence[Sequence[dict[str, float]]]) -> dict[str, Any]:
    """By sentence, over the answers that have weights of their own: how many experts are kept, and whether the largest weight is right."""
    kept: list[list[int]] = [[] for _ in prompts[0].parts]
    best: list[list[int]] = [[] for _ in prompts[0].parts]
    for one, rows in zip(prompts, routing, strict=True):
        for position, weights in enumerate(rows):
            kept[position].append(len(weights))
            best[position].append(int(bool(weights) and max(weights, key=weights.__getitem__) == one.parts[position].task))
    return {"kept": [_mean(row) for row in kept], "router_right": [_mean(row) for row in best], "routed": [len(row) for row in kept]}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def run(arguments: argparse.Namespace) -> None:
    """Evaluate the rows that the record lacks.

    Raises:
        ConfigError: For an unknown row, or a record of other experts, prompts or weights.
    """
    chosen = arguments.rows.split(",")
    for name in chosen:
        if name not in ROWS:
            raise ConfigError(f"unknown row '{name}'. Known: {', '.join(ROWS)}.")
    if arguments.num < 1 or arguments.batch_size < 1:
        raise ConfigError(f"--num and --batch-size must be at least 1, got {arguments.num} and {arguments.batch_size}.")
    track, path = Track(arguments), record_path(arguments)
    facts = track.facts()
    record = read_json(path) if path.is_file() else {**facts, "scores": {}}
    other = [key for key, value in facts.items() if record.get(key) != value]
    if other:
        raise ConfigError(f"{path} is of another {other[0]}; move it away, or name another folder with --out.")
    with backbones_kept():
        for name in chosen:
            if name in record["scores"]:
                continue
            record["scores"][name] = track.scores(ROWS[name], arguments.batch_size)
            record["provenance"] = provenance()
            write_atomically(path, json.dumps(record, sort_keys=True) + "\n")
            shown = {n: [round(100 * value, 1) for value in by_position(found["right"])] for n, found in record["scores"][name].items()}
            print(name, shown, file=sys.stderr, flush=True)


def by_position(right: Sequence[Sequence[int]]) -> list[float]:
    """Share of right answers of each position, and of prompts in which all are right."""
    columns = [sum(row[i] for row in right) / len(right) for i in range(len(right[0]))]
    return [*columns, sum(all(row) for row in right) / len(right)]


def table(record: dict[str, Any]) -> str:
    """Percent; with one standard error if the share is over all prompts."""
    head = ["row", "", "one question", "2: first", "second", "both", "3: first", "second", "third", "all three"]
    rows = []
    for name in (name for name in ROWS if name in record["scores"]):
        found = record["scores"][name]
        cells = [f"{100 * by_position(found['1']['right'])[0]:.1f}"]
        for n in ("2", "3"):
            *shares, whole = by_position(found[n]["right"])
            error = 100 * math.sqrt(whole * (1 - whole) / len(found[n]["right"]))
            cells += [*(f"{100 * share:.1f}" for share in shares), f"{100 * whole:.1f} ± {error:.1f}"]
        rows.append([markdown.code(name), ROWS[name].title, *cells])
    return markdown.table(head, rows, left=2)


def shown(record: dict[str, Any]) -> str:
    """What the record covers, and its table."""
    count = " and ".join(sorted({str(number) for number in record["prompts"].values()}))
    tasks = ", ".join(markdown.code(name) for name in record["tasks"])
    return f"{count} prompts of each number of questions; tasks: {tasks}; base model {record['backbone']['name']}.\n\n{table(record)}"


def routing_table(record: dict[str, Any]) -> str:
    """What re-routing saw: experts kept, and how often the expert with the largest weight was the sentence's own."""
    rows = []
    for name in (name for name in ROWS if name in record["scores"] and ROWS[name].told in {"nothing", "routed"}):
        for n in ("2", "3"):
            found = record["scores"][name][n]
            for position, (kept, best, count) in enumerate(zip(found["kept"], found["router_right"], found["routed"], strict=True), 1):
                if count and kept:
                    rows.append([markdown.code(name), n, str(position), str(count), f"{kept:.2f}", f"{100 * best:.1f}"])
    return markdown.table(["row", "questions", "sentence", "routed", "experts kept", "own expert has the largest weight"], rows)


def task_table(record: dict[str, Any]) -> str:
    """Share of right answers of each task, over the prompts of two and three questions."""
    names = [name for name in ("dlp", "oracle_sentence", "oracle_sentence_recompute") if name in record["scores"]]
    right: dict[str, dict[str, list[int]]] = {task: {name: [] for name in names} for task in record["tasks"]}
    for n in SIZES[1:]:
        prompts = composed(record["tasks"], n, record["prompts"][str(n)])
        for name in names:
            for one, row in zip(prompts, record["scores"][name][str(n)]["right"], strict=True):
                for part, correct in zip(one.parts, row, strict=True):
                    right[part.task][name].append(correct)
    rows = [
        [task, str(len(found[names[0]])), *(f"{100 * sum(found[name]) / len(found[name]):.1f}" if found[name] else "" for name in names)]
        for task, found in right.items()
    ]
    return markdown.table(["task", "questions", *map(markdown.code, names)], rows)


def record_path(arguments: argparse.Namespace) -> Path:
    """Path of the record."""
    return Path(arguments.out) / "bench" / f"{NAME}.json"


def report(arguments: argparse.Namespace) -> None:
    """Write the tables into the page.

    Raises:
        ConfigError: If there is no record.
    """
    record = read_json(record_path(arguments))
    page = with_table(PAGE.read_text(encoding="utf-8"), NAME, shown(record))
    page = with_table(page, f"{NAME}-tasks", task_table(record))
    write_atomically(PAGE, with_table(page, f"{NAME}-routing", routing_table(record)))
    print(f"wrote {PAGE}")


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line; 2 for bad input."""
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__)
    parser.add_argument("action", choices=["train", "run", "report"])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tasks", metavar="TASK,TASK", help="some tasks of skills_several, at least three (default: all)")
    parser.add_argument("--rows", default=",".join(ROWS), help="rows to evaluate, separated by commas; the record keeps those it has")
    parser.add_argument("--num", type=int, default=100, help="prompts of each size (default: 100)")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--processes", type=int, help="processes that train experts (default: one per core, at most four)")
    parser.add_argument("--runs", type=Path, default=Path("runs/several"))
    parser.add_argument("--out", default=str(RESULTS), metavar="DIR")
    arguments = parser.parse_args(argv)
    try:
        {"train": trained, "run": run, "report": report}[arguments.action](arguments)
    except DLPLoRAError as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
