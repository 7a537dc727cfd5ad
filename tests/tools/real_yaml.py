"""The lm-eval files of the real26 suite: python -m tests.tools.real_yaml writes them; a test compares them with what this would write."""

from __future__ import annotations

import sys
from typing import Any

from dlplora.tasks import lm_eval_dir
from dlplora.tasks.real import PREFIX, PUBLIC, SKILLS, source_of
from dlplora.tasks.skills import skills_candidates

FOLDER = lm_eval_dir() / "real26"
KINDS = {task.name: task.kind for task in skills_candidates()}
METRIC = {"mcq": "acc", "gen": "exact_match"}
MAX_NEW_TOKENS = 32
"""Of a generated task's answer."""


def kind_of(name: str) -> str:
    """``mcq`` or ``gen``."""
    source = source_of(name)
    return KINDS[name] if source is None else source.kind


def task_text(name: str) -> str:
    """The file of one task."""
    kind, source = kind_of(name), source_of(name)
    origin = "generated" if source is None else ", ".join(part for part in (source.hub_id, source.config) if part)
    lines = [f"# {origin}", f"include: _{kind}.yaml", f"task: {PREFIX}{name}", "dataset_kwargs:", f"  task: {name}"]
    if kind == "gen":
        length, several = (MAX_NEW_TOKENS, False) if source is None else (source.max_new_tokens, source.several_lines)
        stop = "[]" if several else '["\\n"]'
        lines += ["generation_kwargs:", "  do_sample: false", f"  max_gen_toks: {length}", f"  until: {stop}"]
    return "\n".join([*lines, "metadata:", "  version: 1.0", ""])


def group_text(group: str, members: list[str], metric: str | None = None) -> str:
    """The file of one group; its score is the mean over tasks where one metric fits all."""
    lines = [f"group: {group}", "task:", *(f"  - {member}" for member in members)]
    if metric is not None:
        lines += ["aggregate_metric_list:", f"  - metric: {metric}", "    aggregation: mean", "    weight_by_size: false"]
    return "\n".join([*lines, "metadata:", "  version: 1.0", ""])


def files() -> dict[str, str]:
    """File name -> text."""
    names = (*PUBLIC, *SKILLS)
    made: dict[str, Any] = {f"{name}.yaml": task_text(name) for name in names}
    for kind in ("mcq", "gen"):
        members = [PREFIX + name for name in names if kind_of(name) == kind]
        made[f"_group_{kind}.yaml"] = group_text(f"dlplora_real26_{kind}", members, METRIC[kind])
    made["_group.yaml"] = group_text("dlplora_real26", ["dlplora_real26_mcq", "dlplora_real26_gen"])
    for block, chosen in (("public", PUBLIC), ("skills", SKILLS)):
        made[f"_group_{block}.yaml"] = group_text(f"dlplora_real26_{block}", [PREFIX + name for name in chosen])
    return made


def main() -> int:
    """Write what is missing or changed, and remove the files of tasks that are no longer in the suite."""
    wanted = files()
    for path in FOLDER.glob("*.yaml"):
        if path.name not in {*wanted, "_mcq.yaml", "_gen.yaml"}:
            path.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
