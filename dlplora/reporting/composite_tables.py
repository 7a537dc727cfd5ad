"""Tables and the figure of composite-n, from records: ``results/tables/composite.md``, ``composite_n.svg`` and ``.png``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlplora.atomic import write_atomically
from dlplora.documents import read_json
from dlplora.errors import RecordError
from dlplora.reporting.drawing import PALETTE, pyplot, write_figures
from dlplora.reporting.groups import latest
from dlplora.reporting.markdown import code, table
from dlplora.reporting.schema import Record
from dlplora.reporting.store import is_publishable, load_all

SUITE = "nano_composite"
MAIN, ABLATION = "nano_composite", "nano_composite_ablation"
MAIN_ORDER = ("base", "avg_delta", "dlp_threshold", "dlp", "dlp_composite", "oracle_segment", "arrow_out", "meteora_gate", "meteora_full")
ROLES = {
    "base": "no adapter",
    "avg_delta": "never routed",
    "dlp_threshold": "routed once a prompt",
    "dlp": "every sentence, `tail`, stale",
    "dlp_composite": "every sentence, `segment`, recompute",
    "oracle_segment": "told the tasks, recompute",
    "arrow_out": "every token, untrained",
    "meteora_gate": "every token, trained gates",
    "meteora_full": "every token, trained gates and adapters",
}


def _cell(record: Record, task: str, metric: str = "exact_match") -> str:
    row = record.tasks.get(task)
    if row is None or metric not in row.metrics:
        return ""
    error = row.stderr.get(metric)
    return f"{100 * row.metrics[metric]:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def main_table(records: Sequence[Record], metric: str) -> str:
    """Every method against reading and n, one metric in percent with its standard error."""
    by_name = {record.method_name: record for record in records}
    tasks = [task for task in (records[0].suite_tasks if records else ()) if any(task in record.tasks for record in records)]
    rows = [
        [code(name), ROLES.get(name, ""), *(_cell(by_name[name], task, metric) for task in tasks)]
        for name in [*MAIN_ORDER, *sorted(set(by_name) - set(MAIN_ORDER))]
        if name in by_name
    ]
    return table(["method", "routed", *(task.replace("_", " ") for task in tasks)], rows, left=2)


def ablation_table(records: Sequence[Record]) -> str:
    """View, routing of the prompt and cache policy against each other; exact match in percent."""
    tasks = [task for task in (records[0].suite_tasks if records else ()) if any(task in record.tasks for record in records)]
    rows = []
    for record in sorted(records, key=_ablation_key):
        params: dict[str, Any] = record.method["params"]
        told = record.method["method"] == "oracle"
        view = "told the task" if told else f"`{params.get('view')}`"
        settings = [view, f"`{params.get('prompt_routing', 'whole')}`", f"`{params.get('kv_policy', 'stale')}`"]
        rows.append([*settings, *(_cell(record, task) for task in tasks), *(_cell(record, task, "answered") for task in tasks)])
    names = [task.replace("_", " ") for task in tasks]
    return table(["view", "prompt routing", "cached keys and values", *names, *(f"answered, {name}" for name in names)], rows, left=3)


def _ablation_key(record: Record) -> tuple[int, ...]:
    params = record.method["params"]
    views, routings = ("tail", "window", "whole", "segment"), ("whole", "question", "sentence")
    policies = ("stale", "prompt_frozen", "recompute")
    return (
        len(views) if record.method["method"] == "oracle" else views.index(params["view"]),
        policies.index(params.get("kv_policy", "stale")),
        routings.index(params.get("prompt_routing", "whole")),
    )


def page(records: Sequence[Record]) -> str:
    """The content of ``results/tables/composite.md``."""
    main = [record for record in records if record.protocol_name == MAIN]
    ablation = [record for record in records if record.protocol_name == ABLATION]
    if not main or not ablation:
        raise RecordError(
            f"no records of suite '{SUITE}' under both '{MAIN}' and '{ABLATION}'; run `python -m benchmarks.composite_tracks run`."
        )
    parts = [
        "# Composite-n on `nano`",
        "Exact match of generated answers in percent, mean over composites with its standard error; a question without an answer counts as "
        "wrong. "
        f"Seed {main[0].seed}, {main[0].tasks['concat_3'].num} composites of each `concat` and `serial` size, the same questions in every "
        "form. `serial 5` and `serial 10` do not fit into the context of the base model and are refused. Definitions of the rows: "
        "[docs/composite.md](../../docs/composite.md).",
        main_table(main, "exact_match"),
        "## Questions that got any answer, %",
        main_table(main, "answered"),
        "## Settings of sentence-level routing",
        "`dlp` with the threshold of its preset, re-routed at every sentence end.",
        ablation_table(ablation),
    ]
    return "\n\n".join(parts) + "\n"


def curves(records: Sequence[Record]) -> Any:
    """Exact match against n, one panel per reading."""
    plt = pyplot()
    by_name = {record.method_name: record for record in records}
    shown = [name for name in MAIN_ORDER if name in by_name]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True)
    styles = {"oracle_segment": "--", "base": ":"}
    for axis, reading in zip(axes, ("mixture", "concat"), strict=True):
        for name, color in zip(shown, (*PALETTE, "#a0522d"), strict=False):
            tasks = by_name[name].tasks
            sizes = sorted(int(task.split("_")[1]) for task in tasks if task.startswith(f"{reading}_"))
            values = [100 * tasks[f"{reading}_{n}"].metrics["exact_match"] for n in sizes]
            errors = [100 * (tasks[f"{reading}_{n}"].stderr.get("exact_match") or 0.0) for n in sizes]
            axis.errorbar(sizes, values, yerr=errors, color=color, ls=styles.get(name, "-"), marker="o", ms=3.5, lw=1.5, label=name)
        axis.set_xscale("log")
        axis.set_xticks([3, 5, 10], ["3", "5", "10"])
        axis.minorticks_off()
        axis.set_xlabel("questions in a composite (n)")
        axis.set_title(reading, fontsize=10)
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("exact match, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 0.8, 1))
    return figure


def write(root: Path) -> list[Path]:
    """Write table and figure from the records under ``root``.

    Raises:
        RecordError: If a record is damaged, or there are none.
    """
    records, problems = load_all(root, SUITE)
    if problems:
        raise RecordError(problems[0])
    chosen = latest([record for record in records if is_publishable(record)])
    target = root / "tables" / "composite.md"
    write_atomically(target, page(chosen))
    drawn = {"n": curves([record for record in chosen if record.protocol_name == MAIN])}
    return [target, *write_figures(drawn, root / "figures", "composite")]


def write_kv_policy(record: Path, target: Path) -> Path:
    """The table of one ``kv_policy`` benchmark from its JSON file.

    Raises:
        RecordError: If the file is missing or damaged.
    """
    try:
        result = read_json(record, error=RecordError)
        rows = [
            [f"`{setting}`", f"`{facts['view']}`", f"`{policy}`", str(facts["num_compared"]), *_policy_cells(values)]
            for setting, facts in result["settings"].items()
            for policy, values in facts["policies"].items()
        ]
    except (RecordError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{record}: cannot be read as a kv_policy benchmark ({error}); run `python -m benchmarks.kv_policy run`."
        ) from error
    header = ["prompts", "view", "policy", "re-routes compared", "max \\|Δ logit\\|", "mean of max \\|Δ logit\\|", "mean \\|Δ logit\\|"]
    header += ["same next token %", "exact match %", "time ÷ stale"]
    text = (
        "# Cached keys and values after a re-route, on `nano`\n\nLogits at the first token after a row's first re-route that changed its "
        "weights, against `stale`. Time: one batch of fixed length, policies interleaved in one process, median; "
        f"{result['provenance']['hardware']['cpu']}, {result['threads']} thread(s). Definitions: "
        "[docs/dev/kv_policy.md](../../docs/dev/kv_policy.md).\n\n" + table(header, rows, left=3) + "\n"
    )
    write_atomically(target, text)
    return target


def _policy_cells(values: dict[str, Any]) -> list[str]:
    def number(key: str, scale: float = 1.0, digits: int = 3) -> str:
        return "" if values[key] is None else f"{scale * values[key]:.{digits}f}"

    logits = [number(key) for key in ("max_abs_logit_change", "mean_max_abs_logit_change", "mean_abs_logit_change")]
    return [*logits, number("same_next_token", 100, 1), number("exact_match", 100, 1), number("time_ratio", 1, 2)]
