"""Bench records by hand: ratios, intervals, the cost of a re-route, targets, tables, figures; and what a reader refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dlplora.errors import RecordError
from dlplora.reporting.groups import latest
from dlplora.reporting.latency.figures import draw_latency
from dlplora.reporting.latency.join import latency_columns
from dlplora.reporting.latency.records import LatencyRecord, Measurement, paired_ratio, read_latency, reroute_cost, save_bench, summarize
from dlplora.reporting.latency.tables import markdown
from dlplora.reporting.latency.training import TrainingMode, TrainingRecord, newest_trainings
from dlplora.reporting.store import load_all
from dlplora.reporting.tables import build, caption, main_table
from tests.tools import speed_targets

ROOT = Path(__file__).resolve().parents[2]


def measured(contender: str, tpot: list[float], **changes: Any) -> Measurement:
    settings: dict[str, Any] = {
        "group": "main", "contender": contender, "experts": 26, "kept": None, "reroute_every": None, "compiled": False,
        "granularity": "", "backend": "", "backend_asked": "", "batch_size": 1, "prompt_tokens": 128, "new_tokens": 17, "warmup": 1,
        "ttft_s": [2 * value for value in tpot], "tpot_s": tpot, "router_s": [], "experts_kept": None, "sentence_reroutes": None,
        "resident_bytes": 1_000_000, "transient_bytes": None, "floor_s": 0.5,
    }  # fmt: skip
    return Measurement(**{**settings, **changes})


def recorded(*measurements: Measurement, **changes: Any) -> LatencyRecord:
    settings: dict[str, Any] = {
        "shape": "nano", "parameters": 1_197_184, "weights": "shipped", "adapters": {"main": "shipped, rank 8", "sweep": "random, rank 8"},
        "dtype": "float32", "device": "cpu", "bandwidth_bytes_per_s": 1e10, "measurements": list(measurements), "skipped": {},
        "warnings": [], "provenance": {"git": {"commit": "abcdef123", "dirty": False}}, "created": "2026-01-01T00:00:00+00:00",
        "seed": 0,
    }  # fmt: skip
    return LatencyRecord(**{**settings, **changes})


def whole() -> LatencyRecord:
    sweep = [
        measured(name, [value], group="sweep", experts=experts)
        for name, experts, value in (
            ("base", 0, 0.8),
            ("peft_single", 1, 1.0),
            ("dlp", 2, 1.0),
            ("dlp", 1000, 1.02),
            ("meteora_gate", 2, 1.3),
        )
    ]
    sweep.append(measured("meteora_gate", [9.0], group="sweep", experts=1000))
    large = [measured(name, [value], batch_size=32) for name, value in (("base", 1.0), ("peft_single", 2.0), ("dlp", 2.1))]
    long = [measured(name, [value], prompt_tokens=1024, ttft_s=[value]) for name, value in (("peft_single", 4.0), ("dlp", 4.1))]
    return recorded(
        measured("base", [0.8, 0.8, 0.8], experts=0),
        measured("peft_single", [1.0, 2.0, 1.0], experts=1),
        measured("dlp", [0.9, 2.0, 1.1], router_s=[0.1, 0.1, 0.1], backend_asked="auto"),
        measured("dlp", [1.0, 2.2, 1.2], reroute_every=8, backend_asked="auto"),
        measured("meteora_gate", [1.8, 3.0, 2.2], backend_asked="auto"),
        *sweep, *large, *long,
    )  # fmt: skip


def test_ratios_are_taken_within_rounds() -> None:
    ratio = paired_ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.0, 3.0)
    assert paired_ratio([3.0], [2.0]).low == 1.5
    assert paired_ratio([2.0, 8.0], [2.0, 2.0]).median == 2.5
    steady = paired_ratio([1.1] * 9, [1.0] * 9)
    assert steady.high - steady.low == pytest.approx(0.0, abs=1e-12)
    one_outlier = paired_ratio([1.0] * 8 + [50.0], [1.0] * 9)
    assert one_outlier.median == 1.0
    assert one_outlier.high == 1.0  # a median of nine does not follow one of them
    with pytest.raises(RecordError, match="same rounds, got 1 and 2"):
        paired_ratio([1.0], [1.0, 2.0])


def test_the_cost_of_a_reroute_by_hand() -> None:
    record = whole()
    forced = record.measurements[3]
    # 16 steps, two re-routes: 0.1 s more a step are 0.8 s a re-route, 0.889 steps of 0.9 s; then 1.6 / 2.0 = 0.8; then 0.8 / 1.1 = 0.727
    cost = reroute_cost(record, forced)
    assert cost is not None
    assert cost.median == pytest.approx(0.8)
    assert (cost.low, cost.high) == (pytest.approx(0.8 / 1.1), pytest.approx(0.8 / 0.9))
    assert reroute_cost(record, record.measurements[2]) is None
    assert reroute_cost(recorded(forced), forced) is None
    short = dataclasses.replace(forced, reroute_every=17)
    assert reroute_cost(recorded(record.measurements[2], short), short) is None


def test_a_summary_holds_medians_and_ratios() -> None:
    row = summarize(whole())[2]
    assert row["tpot_s"] == {"min": 0.9, "median": 1.1, "iqr": pytest.approx(0.55)}
    assert row["tpot_over_peft_single"]["median"] == 1.0
    assert row["tpot_over_base"]["median"] == pytest.approx(1.1 / 0.8)
    assert row["tpot_over_base"]["of_minima"] == pytest.approx(0.9 / 0.8)
    assert row["tpot_over_floor"] == 2.2
    assert row["router_s"]["median"] == 0.1


def test_targets_come_from_records_and_missing_ones_are_empty(tmp_path: Path) -> None:
    empty = list(speed_targets.rows(tmp_path))
    assert len(empty) == 19
    assert {measured for _, measured, _ in empty} == {""}
    save_bench(dataclasses.replace(whole(), created="2025-01-01T00:00:00+00:00", measurements=[]), tmp_path / "latency-old.json")
    save_bench(whole(), tmp_path / "latency-new.json")
    rows = {what: measured for what, measured, _ in speed_targets.rows(tmp_path)}
    assert rows["decode, dlp, 26 experts, batch 1 ÷ one LoRA (nano, CPU)"] == "1.00 [0.90, 1.10]"
    assert rows["decode, dlp, batch 32, rows routed apart ÷ one LoRA (nano, CPU)"] == "1.05 [1.05, 1.05]"
    assert rows["prefill, dlp, 1024 tokens ÷ one LoRA (nano, CPU)"].startswith("1.02")
    assert rows["decode, dlp, 1000 experts ÷ 2 experts (nano, CPU)"].startswith("1.02")
    assert rows["one re-route, router included, in decode steps (nano, CPU)"].startswith("0.80")
    assert rows["token-level methods ÷ dlp, decode (nano, CPU)"] == "meteora_gate 2.00"
    assert rows["decode, dlp, 26 experts, batch 1 ÷ one LoRA (qwen2-0.5b, CPU)"] == ""


def test_the_target_of_evaluations(tmp_path: Path) -> None:
    rows = {"dlp": {"to_stock": 0.21, "to_stock_without_report": 0.4}, "ties": {"to_stock": 0.1, "to_stock_without_report": 0.6}}
    path = tmp_path / "evaluation_speed.json"
    path.write_text(json.dumps({"limit": None, "methods": rows}))
    assert speed_targets.evaluation_speed(tmp_path) == "0.10–0.21 over 2 methods; 0.40–0.60 against stock without its report"
    path.write_text(json.dumps({"limit": 8, "methods": rows}))
    assert speed_targets.evaluation_speed(tmp_path) == ""


def test_the_floor_of_a_gpu_counts_compiled_steps(tmp_path: Path) -> None:
    compiled = measured("dlp", [0.6, 0.7, 0.8], compiled=True, backend_asked="auto")
    record = recorded(measured("dlp", [2.0], backend_asked="auto"), compiled, shape="llama3-8b", device="cuda:0")
    save_bench(record, tmp_path / "latency-gpu.json")
    rows = {what: measured for what, measured, _ in speed_targets.rows(tmp_path)}
    assert rows["decode, dlp, batch 1, compiled ÷ bandwidth floor (llama3-8b, GPU)"] == "1.40"


def test_the_table_says_what_was_measured_and_what_was_not() -> None:
    text = markdown(dataclasses.replace(whole(), warnings=["busy"], skipped={"main: x": "no"}))
    assert "Warning: busy." in text
    assert text.endswith("Not measured:\n* main: x: no")
    assert "| `dlp, re-routed every 8` | 26 |" in text
    assert "| `base` |  |  | 1600.00 (0.00) | 800.00 (0.00) |" in text
    assert "main: batch 32, prompt 128, 17 new tokens, 1 rounds, adapters shipped, rank 8, floor 500.000 ms per step" in text


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    path = save_bench(whole(), tmp_path / "latency-a.json")
    assert read_latency(path) == whole()
    with pytest.raises(RecordError, match="not results"):
        save_bench(recorded(measured("base", [float("nan")])), tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"schema_version": 99}, "version 1, got 'latency', 99"),
        ({"kind": "other"}, "expected kind 'latency'"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"measurements": [{"contender": "x"}]}, r"measurements\[0\]: missing required key"),
        ({"measurements": 3}, r"'measurements' must be list\[Measurement\], got 3"),
    ],
)
def test_damaged_records_are_refused(change: dict[str, Any], part: str, tmp_path: Path) -> None:
    path = save_bench(whole(), tmp_path / "latency-a.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RecordError, match=part):
        read_latency(path)


def test_prefill_of_a_fixed_order_is_left_out(tmp_path: Path) -> None:
    """Records without a seed: whoever came after the garbage collection had the worse first token."""
    rows = [measured("peft_single", [1.0]), measured("dlp", [2.0])]
    for seed, prefill in ((None, None), (0, 2.0)):
        record = recorded(*rows, seed=seed)
        save_bench(record, tmp_path / str(seed) / "latency-a.json")
        joined = latency_columns(tmp_path / str(seed), "nano")
        assert joined is not None
        assert joined.ratios["dlp"] == (prefill, 2.0)
        (cells,) = (line.split("|") for line in markdown(record).splitlines() if line.startswith("| `dlp`"))
        assert cells[6].strip() == ("" if prefill is None else "2.00")
        assert ("fixed order" in joined.source, "fixed order" in markdown(record)) == (seed is None, seed is None)


@pytest.mark.parametrize("times", [[0.0], [-1.0], [], [1.0, 2.0]])
def test_times_must_be_times(times: list[float], tmp_path: Path) -> None:
    path = save_bench(recorded(measured("base", [1.0])), tmp_path / "latency-a.json")
    raw = json.loads(path.read_text())
    raw["measurements"][0]["tpot_s"] = times
    path.write_text(json.dumps(raw))
    with pytest.raises(RecordError, match="base: "):
        read_latency(path)


def test_quality_tables_join_the_ratios_of_one_process_by_method(tmp_path: Path) -> None:
    records = [record for record in latest(load_all(ROOT / "results", "nano")[0]) if record.seed == 0]
    assert latency_columns(tmp_path / "bench", "nano") is None
    assert "Prefill and decode: not measured." in caption(records)
    rows = {line.split("`")[1]: line for line in main_table(records).splitlines() if line.startswith("| `")}
    assert rows["dlp"].endswith("|  |  |")  # what a run measured of itself stands in no table
    save_bench(whole(), tmp_path / "bench" / "latency-a.json")
    joined = latency_columns(tmp_path / "bench", "nano")
    assert joined is not None
    assert joined.ratios["dlp"] == (1.0, 1.0)
    assert latency_columns(tmp_path / "bench", "paper_local") is None
    forced = [{"reroute_every": 8}, {"kept": 4}, {"compiled": True}, {"backend_asked": "triton"}, {"batch_size": 8}, {"group": "sweep"}]
    others = [measured("dlp", [9.0], **changes) for changes in forced]
    single = [measured("peft_single", [1.0], **changes) for changes in ({}, {"compiled": True}, {"batch_size": 8}, {"group": "sweep"})]
    save_bench(recorded(*single, *others, measured("dlp", [3.0])), tmp_path / "other" / "latency-a.json")
    plain = latency_columns(tmp_path / "other", "nano")
    assert plain is not None
    assert plain.ratios == {"peft_single": (1.0, 1.0), "dlp": (3.0, 3.0)}  # measurements of something special do not count
    assert "folded into" not in plain.source
    folded = [measured("ties", [9.0]), measured("ties", [2.0], backend_asked="merged"), measured("dlp", [3.0])]
    save_bench(recorded(single[0], *folded, measured("dlp", [1.5], backend_asked="merged")), tmp_path / "merged" / "latency-a.json")
    served = latency_columns(tmp_path / "merged", "nano")
    assert served is not None
    assert served.ratios == {"peft_single": (1.0, 1.0), "ties": (2.0, 2.0), "dlp": (3.0, 3.0)}  # a static merge, as it would be served
    assert "Static merges are folded" in served.source
    text = caption(records, joined)
    assert "17 new tokens, float32, methods interleaved in one process, median of 3 paired ratios" in text
    assert "joined by method name from the newest record of shape `nano`" in text
    rows = {line.split("`")[1]: line for line in main_table(records, None, joined).splitlines() if line.startswith("| `")}
    assert rows["dlp"].endswith("| 1.00 | 1.00 |")
    assert rows["ties"].endswith("|  |  |")  # not in that process: an empty cell rather than another clock


def test_tables_of_speed_are_built_and_checked(tmp_path: Path) -> None:
    records = load_all(ROOT / "results", "nano")[0][:0]
    assert [path.name for path in build(records, "nano", tmp_path, None)] == ["nano.md", "reported.md"]
    save_bench(whole(), tmp_path / "bench" / "latency-a.json")
    assert [path.name for path in build(records, "nano", tmp_path, None, check=True)] == ["speed.md"]
    build(records, "nano", tmp_path, None)
    text = (tmp_path / "tables" / "speed.md").read_text()
    assert text.startswith("# Speed\n")
    assert "## Latency of `nano`" in text
    assert "## Training" not in text
    assert build(records, "nano", tmp_path, None, check=True) == []


def test_figures_are_drawn_where_there_is_something_to_show(tmp_path: Path) -> None:
    assert draw_latency(tmp_path / "none", tmp_path) == []
    save_bench(whole(), tmp_path / "latency-a.json")
    save_bench(recorded(measured("base", [1.0]), shape="tiny"), tmp_path / "latency-b.json")
    names = [path.name for path in draw_latency(tmp_path, tmp_path / "figures")]
    expected = [f"latency_nano_cpu_{name}.{kind}" for name in ("tpot_experts", "tpot_batch", "step") for kind in ("svg", "png")]
    assert names == expected
    text = (tmp_path / "figures" / "latency_nano_cpu_tpot_experts.svg").read_text()
    assert "meteora_gate" in text
    assert "1000" in text


def test_speedups_of_training(tmp_path: Path) -> None:
    modes = {
        name: TrainingMode(train_s=times, peak_memory_bytes=[1], validation_loss=0.5, padding=0.0)
        for name, times in (("peft_one_by_one", [4.0, 9.0, 4.0]), ("sequential", [2.0, 3.0, 1.0]))
    }
    record = TrainingRecord(
        backbone="nano", tasks=["a"], settings={}, tokens=10, device="cpu", default_mode="sequential", modes=modes, warnings=[],
        provenance={}, created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    assert record.speedups() == {"sequential": 3.0}
    save_bench(record, tmp_path / "training-a.json")
    assert newest_trainings(tmp_path) == {("cpu", "nano", "float32"): record}
    rows = {what: measured for what, measured, _ in speed_targets.rows(tmp_path)}
    assert rows["training a pool: speed ÷ PEFT one by one (cpu)"] == "sequential 3.00"


@pytest.mark.slow
def test_the_gpu_script_runs_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "DLPLORA_GPU_SMOKE": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("| target | measured | wanted |")
    assert "did not finish" not in done.stderr
    record = read_latency(next(tmp_path.glob("latency-tiny-*.json")))
    assert {one.contender for one in record.measurements} == {"base", "peft_single", "dlp", "meteora_gate"}
    training = newest_trainings(tmp_path)["cpu", "nano", "float32"]
    assert training is not None
    losses = {name: mode.validation_loss for name, mode in training.modes.items()}
    assert losses["joint"] == pytest.approx(losses["peft_one_by_one"], abs=1e-3)
