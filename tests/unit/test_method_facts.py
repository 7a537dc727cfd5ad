"""What tables say about methods beyond their records: the counts of old records, checked against the shipped adapters."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

from dlplora.reporting.columns import GATED, rows_of
from dlplora.reporting.methods import merged_experts, method_facts, trained_parameters, without_clones
from dlplora.reporting.store import load_all
from dlplora.reporting.tables import caption, main_table
from tests.unit.test_records import make_record

ROOT = Path(__file__).resolve().parents[2]


def numbers_in(adapter: Path) -> int:
    """Numbers of a safetensors file, from its header alone."""
    with adapter.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def test_parameters_of_multi_task_adapters_are_those_of_the_shipped_files() -> None:
    records = {record.method_name: record for record in load_all(ROOT / "results", "nano")[0]}
    assert trained_parameters(records["multitask_r208"]) == 425_984
    for name in ("multitask", "multitask_r64", "multitask_r208"):
        assert records[name].trained_parameters == 0  # the record does not move
        shipped = ROOT / "dlplora" / "assets" / "nano" / name / "adapter_model.safetensors"
        assert trained_parameters(records[name]) == numbers_in(shipped)
    assert trained_parameters(records["base"]) == 0
    assert trained_parameters(records["dlp"]) == records["dlp"].trained_parameters


def test_a_count_that_nobody_knows_is_an_empty_cell() -> None:
    assert trained_parameters(make_record(trained_parameters=0, training_tokens=5, backbone={"sha256": "unknown"})) is None
    assert trained_parameters(make_record(trained_parameters=7, training_tokens=5)) == 7  # counted by the runner
    assert trained_parameters(make_record()) is None


def test_static_merges_show_how_many_experts_were_merged() -> None:
    merge = make_record(method_name="ties", method={"method": "ties", "params": {}}, routing={"mean_experts_kept": 1.0})
    average = make_record(method_name="avg_delta", method={"method": "avg_delta", "params": {}}, routing={"mean_experts_kept": 26.0})
    kept = {name: cells["routing.mean_experts_kept"][0] for name, cells in rows_of([merge, average, make_record()]).summaries.items()}
    assert kept == {"avg_delta": 26, "ties": 26, "dlp": 1.25}
    assert rows_of([merge]).summaries["ties"]["routing.mean_experts_kept"] == (None, None)  # nothing tells the size of the pool
    told = make_record(method_name="ties", method={"method": "ties"}, routing={"mean_experts_kept": 1.0, "num_merged": 5})
    assert merged_experts([told, average]) == {"h": 5}


def test_router_accuracy_of_gates_is_marked() -> None:
    gates = make_record(method_name="mole", routing={"router_accuracy": 0.117, "num_gated_prompts": 60})
    router = make_record(method_name="dlp", routing={"router_accuracy": 1.0, "num_gated_prompts": 0})
    table = main_table([gates, router])
    assert f"| 11.7 {GATED} |" in table
    assert "| 100.0 |" in table


def test_clones_leave_only_where_their_original_is() -> None:
    assert without_clones(["dlp", "dlp_code", "base"]) == ["dlp", "base"]
    assert without_clones(["dlp_code", "base"]) == ["dlp_code", "base"]
    originals = set(method_facts().clone_of.values())
    assert not originals & set(method_facts().clone_of)  # no clone of a clone


@pytest.mark.parametrize("name", ["multitask", "ties", "avg_factor", "svd"])
def test_new_records_count_what_methods_bring_along(name: str, tiny_llama_folder: Path, uniform_pool: Path) -> None:
    from dlplora.inference.fused_model import FusedCausalLM

    method = FusedCausalLM.from_pretrained(tiny_llama_folder, pool=uniform_pool, method=name, multitask=uniform_pool / "alpha").method
    if name == "multitask":
        assert method.num_trained_parameters == numbers_in(uniform_pool / "alpha" / "adapter_model.safetensors")
        assert "num_merged" not in method.reported
    else:
        assert method.num_trained_parameters == 0
        assert method.reported["num_merged"] == 3


def test_the_cost_of_searched_weights_is_said() -> None:
    costs = {"in": (130, 5), "in_twin": (130, 5), "out": (125, 5)}
    records = [
        make_record(method_name=name, routing={"search_budget": budget, "search_examples": examples, "searched_tasks": 26})
        for name, (budget, examples) in costs.items()
    ]
    text = caption([make_record(), *records])
    assert "training tokens; `in`, `in_twin`: 130 evaluations of 5 examples; `out`: 125 evaluations of 5 examples." in text
    assert "evaluations of" not in caption([make_record()])


def test_a_table_says_that_it_mixes_pools() -> None:
    one, other = make_record(pool_hash="a" * 64), make_record(pool_hash="b" * 64, method_name="ties")
    assert "Seed 0 mixes pools of different experts; compare methods of one pool only (aaaaaaaa: dlp; bbbbbbbb: ties)." in caption(
        [one, other]
    )
    assert "mixes pools" not in caption([one, make_record(method_name="ties", pool_hash="a" * 64)])
    assert "mixes pools" not in caption([one, make_record(seed=1, pool_hash="b" * 64)])  # every seed has experts of its own
    assert "mixes pools" not in caption([one, make_record(method_name="base", pool_hash="b" * 64)])


def test_a_table_says_that_it_mixes_settings() -> None:
    one, other = (
        make_record(method_name=name, protocol={"suite": "toy", "dtype": dtype})
        for name, dtype in (("dlp", "float32"), ("base", "float16"))
    )
    said = "The table mixes values of dtype; compare methods of one value only (float16: base; float32: dlp)."
    assert said in caption([one, other])
    assert "mixes" not in caption([one, make_record(method_name="base", protocol={"suite": "toy", "seeds": [1], "dtype": "float32"})])
