"""Facts about methods that records lack: groups, duplicates, and counts missing in old records. See ``methods.yaml``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from dlplora.documents import parse_yaml
from dlplora.errors import RecordError
from dlplora.reporting.schema import Record
from dlplora.reporting.tuning import tuned_name

MERGE = "merge"
"""Key of the group of methods that merge the whole pool once."""
DATA_OF_NEED = {"inputs": "inputs", "labels": "inputs", "few_shot": "labels", "all_tasks_adapter": "labels", "trained": "labels"}
"""What a class needs (``Metadata.needs``) -> what it sees: its ``labels`` are the tasks of prompts, not answers."""
NOT_STATED = "not stated"


@dataclass(frozen=True, kw_only=True)
class MethodGroup:
    """Methods that are shown together."""

    key: str
    title: str
    classes: tuple[str, ...] = ()
    data: str = ""
    """What its methods saw of the tasks beyond the experts."""


OTHER = MethodGroup(key="other", title="Other methods")
"""Group of methods that are not in ``methods.yaml``, for example those of other packages."""


@dataclass(frozen=True, kw_only=True)
class MethodFacts:
    """The content of ``methods.yaml``."""

    groups: tuple[MethodGroup, ...]
    data: Mapping[str, str]
    """Class -> what it saw of the tasks, where that differs from its group."""
    clone_of: Mapping[str, str]
    """Preset -> the preset that it hardly differs from."""
    adapter_parameters: Mapping[str, Mapping[str, int]]
    """Checksum of the base model -> preset -> parameters of the adapter that the method trains."""


@cache
def method_facts() -> MethodFacts:
    """The shipped facts."""
    file = resources.files("dlplora.reporting") / "methods.yaml"
    raw = parse_yaml(file.read_text("utf-8"), "methods.yaml", error=RecordError)
    groups = tuple(MethodGroup(**{**one, "classes": tuple(one["classes"])}) for one in raw["groups"])
    return MethodFacts(groups=groups, data=raw["data"], clone_of=raw["clone_of"], adapter_parameters=raw["adapter_parameters"])


def group_of(record: Record) -> MethodGroup:
    """The group of a record's method."""
    name = record.method.get("method")
    return next((group for group in method_facts().groups if name in group.classes), OTHER)


def data_seen(record: Record) -> str:
    """What a record's method saw of the tasks beyond the experts: none, inputs, labels, task name.

    A method that ``methods.yaml`` does not have is judged by what its class says it needs; records made before this was kept do not tell.
    """
    name, needs = str(record.method.get("method")), record.method.get("needs")
    group = group_of(record)
    if group is not OTHER or name in method_facts().data:
        return method_facts().data.get(name, group.data)
    if not isinstance(needs, list):
        return NOT_STATED
    seen = {DATA_OF_NEED[need] for need in needs if need in DATA_OF_NEED}
    parts = ["labels"] if "labels" in seen else sorted(seen)
    return ", ".join([*parts, *(["task name"] if "task_id" in needs else [])]) or "none"


def without_clones(methods: Iterable[str]) -> list[str]:
    """The methods without those that have their original among them, and without defaults whose tuned row is there."""
    present = list(methods)
    return [name for name in present if method_facts().clone_of.get(name) not in present and tuned_name(name) not in present]


def trained_parameters(record: Record) -> int | None:
    """Parameters that a method trains beyond the experts; None if unknown.

    A record that names training tokens and no parameters was written before adapters of a method's own were counted.
    """
    counted = record.trained_parameters
    if counted == 0 and record.training_tokens:
        return method_facts().adapter_parameters.get(str(record.backbone.get("sha256")), {}).get(record.method_name)
    return counted


def merged_experts(records: Sequence[Record]) -> dict[str, float]:
    """Pool -> number of its experts, as far as the records tell.

    ``num_merged`` is written by methods that merge a pool; in older records the average over all experts (``avg_delta``) tells it.
    """
    found: dict[str, float] = {}
    for record in records:
        kept = record.routing.get("mean_experts_kept")
        merged = record.routing.get("num_merged")
        if merged is not None:
            found[record.pool_hash] = float(merged)
        elif record.method.get("method") == "avg_delta" and kept:
            found.setdefault(record.pool_hash, float(kept))
    return found


def experts_kept(record: Record, pools: Mapping[str, float]) -> float | None:
    """Experts that answer a prompt, mean over prompts; for static merges the number of experts merged, None if unknown.

    Args:
        record: Of any method.
        pools: Of ``merged_experts``.
    """
    if group_of(record).key == MERGE:
        return pools.get(record.pool_hash)
    return record.routing.get("mean_experts_kept")
