"""Time of one decode step by operator: ``python -m benchmarks.step_profile``.

Each system generates a short and a longer continuation under torch's profiler. The difference, divided by the number of tokens between
them, is one step without prefill. The profiler slows everything down, so its times are shares and not latencies; call counts are exact.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dlplora.bench.hardware import ContentionMonitor
from dlplora.bench.model_shapes import load_shape
from dlplora.bench.session import build_setup
from dlplora.bench.settings import BenchConfig, Group
from dlplora.bench.setup import BenchSystem, Entry
from dlplora.bench.systems import build_system, make_workload
from dlplora.cli.terminal import quiet_loading, split_names
from dlplora.errors import DLPLoRAError
from dlplora.provenance import provenance
from dlplora.reporting.latency.records import BENCH_VERSION, FOLDER, save_bench
from dlplora.reporting.markdown import table

SHORT, LONG = 2, 18
TOP = 6


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """One system."""

    calls: float
    """Operator calls per step, those of other operators included."""
    self_ms: float
    """Time in operators, each without the operators it calls, ms per step, slowed down by the profiler."""
    operators: dict[str, dict[str, float]]
    """Name -> ``calls`` and ``self_ms`` of the most expensive ones."""


@dataclass(frozen=True, kw_only=True)
class ProfileRecord:
    """All systems of one call."""

    shape: str
    dtype: str
    device: str
    batch_size: int
    prompt_tokens: int
    profiles: dict[str, StepProfile]
    warnings: list[str]
    provenance: dict[str, Any]
    created: str
    kind: str = "profile"
    schema_version: int = BENCH_VERSION


def _operators(system: BenchSystem, workload: Any) -> dict[str, tuple[int, float]]:
    """Operator -> calls and self time in ms of one generation."""
    activities = [ProfilerActivity.CPU]
    if workload.prompts.input_ids.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    system.generate(workload)
    with profile(activities=activities) as profiler:
        system.generate(workload)
    field = "self_device_time_total" if len(activities) > 1 else "self_cpu_time_total"
    return {event.key: (event.count, getattr(event, field) / 1e3) for event in profiler.key_averages()}


def step_of(short: dict[str, tuple[int, float]], long: dict[str, tuple[int, float]], steps: int) -> StepProfile:
    """One step, from two generations that differ by ``steps`` tokens."""
    rows = {}
    for name, (calls, self_ms) in long.items():
        before = short.get(name, (0, 0.0))
        rows[name] = {"calls": (calls - before[0]) / steps, "self_ms": (self_ms - before[1]) / steps}
    top = sorted(rows, key=lambda name: -rows[name]["self_ms"])[:TOP]
    return StepProfile(
        calls=sum(row["calls"] for row in rows.values()),
        self_ms=sum(row["self_ms"] for row in rows.values()),
        operators={name: rows[name] for name in top},
    )


def measure(options: argparse.Namespace) -> ProfileRecord:
    """Profile the systems one after another."""
    entries = Group(systems=tuple(split_names(options.systems)), batch=(options.batch,), prompt=(options.prompt,)).entries()
    config = BenchConfig(shape=options.shape, dtype=options.dtype, device=options.device, groups={"profile": Group()})
    device = config.torch_device
    watch = ContentionMonitor(device)
    model, tokenizer = load_shape(config.shape, config.dtype, device)
    profiles = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        setup = build_setup(config, model, tokenizer, max(entry.experts for entry in entries), Path(folder))
        for entry in entries:
            profiles[entry.system] = _profile(build_system(setup, entry), entry, options, tokenizer, device)
    return ProfileRecord(
        shape=config.shape, dtype=config.dtype, device=str(device), batch_size=options.batch, prompt_tokens=options.prompt,
        profiles=profiles,
        warnings=watch.warnings(), provenance=provenance(), created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _profile(system: BenchSystem, entry: Entry, options: argparse.Namespace, tokenizer: Any, device: torch.device) -> StepProfile:
    print(f"profiling {entry.label}", file=sys.stderr, flush=True)
    short, long = (_operators(system, make_workload(tokenizer, device, options.batch, options.prompt, number)) for number in (SHORT, LONG))
    return step_of(short, long, LONG - SHORT)


def markdown(record: ProfileRecord) -> str:
    """One row per system: calls, time, and the operators that take most of it."""
    rows = []
    for name, one in record.profiles.items():
        shares = [f"`{key}` {100 * row['self_ms'] / one.self_ms:.0f} % ({row['calls']:.0f})" for key, row in one.operators.items()]
        rows.append([f"`{name}`", f"{one.calls:.0f}", f"{one.self_ms:.2f}", ", ".join(shares)])
    header = ["system", "operator calls a step", "ms in operators", "most expensive: share (calls)"]
    return "\n".join([*(f"Warning: {warning}." for warning in record.warnings), table(header, rows, left=(0, 3))])


def main() -> int:
    """Profile, write the record, print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="nano")
    parser.add_argument("--systems", default="base,peft_single,released_loop,dlp,meteora_gate,xlora")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", metavar="DIR", help="folder of the record (default: results/bench, or results/scratch/bench if dirty)")
    options = parser.parse_args()
    quiet_loading(None)
    try:
        record = measure(options)
    except DLPLoRAError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    clean = record.provenance.get("git", {}).get("dirty") is not True
    folder = Path(options.out) if options.out else FOLDER if clean else Path("results/scratch/bench")
    path = save_bench(record, folder / f"profile-{record.shape}-{record.device.split(':')[0]}.json")
    print(f"wrote {path}", file=sys.stderr)
    print(markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
