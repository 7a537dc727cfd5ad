"""``dlplora bench latency``: time many systems, interleaved in one process, and write one record.

Within a group all systems generate the same number of tokens from the same prompts, in rounds ordered by ``rounds``. Warm-up rounds come
first. Memory is measured in a separate, untimed round.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dlplora.adapters.pool import load_pool
from dlplora.bench.hardware import ContentionMonitor, measure_bandwidth, require_memory, resident_bytes, step_bytes, transient_bytes
from dlplora.bench.model_shapes import LORA, load_shape, needed_bytes, random_bank
from dlplora.bench.rounds import device_seconds, round_orders, take_turns, time_once
from dlplora.bench.settings import EXPERTS, BenchConfig, Group
from dlplora.bench.setup import BenchSetup, BenchSystem, Entry, Workload
from dlplora.bench.systems import POOL_FREE, build_system, facts, make_workload
from dlplora.bench.turns import Turns
from dlplora.errors import ConfigError, DLPLoRAError, one_line
from dlplora.inference.loading import method_asset, resolve_dtype
from dlplora.inference.shapes import find_shape
from dlplora.modules.lora_bank import AdapterBank
from dlplora.provenance import provenance
from dlplora.reporting.latency.records import LatencyRecord, Measurement, summarize

log = logging.getLogger(__name__)
Progress = Callable[[str], None]
POOL_TEXT = f"rank {LORA.rank}, alpha {LORA.lora_alpha}, {' and '.join(LORA.target_modules)}"


def run_bench(
    config: BenchConfig,
    progress: Progress = log.info,
    after_group: Callable[[LatencyRecord], object] | None = None,
    turns: Turns | None = None,
) -> LatencyRecord:
    """Measure everything.

    Args:
        config: What to measure.
        progress: Told what happens next.
        after_group: Receives the record so far after every group, so that an interrupted run keeps its results.
        turns: How it takes turns with other processes on the device; None: there are none.

    Raises:
        ConfigError: If dtype or device do not exist here, or the weights do not fit into memory.
    """
    device = config.torch_device
    config = _with_pool_sizes(config)
    entries = {name: group.entries() for name, group in config.groups.items()}
    _check_memory(config, max(entry.experts for listed in entries.values() for entry in listed), device)
    if any(entry.compiled for listed in entries.values() for entry in listed):
        _allow_compilation(device)
    turns = turns or Turns()
    model, tokenizer = load_shape(config.shape, config.dtype, device)
    record = LatencyRecord(
        shape=config.shape,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights=_weights(config.shape),
        adapters={},
        dtype=config.dtype,
        device=str(device),
        bandwidth_bytes_per_s=0.0,
        measurements=[],
        skipped={},
        warnings=[],
        provenance=provenance(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed=config.seed,
    )
    with torch.no_grad():
        for name, group in config.groups.items():
            with tempfile.TemporaryDirectory() as folder:
                setup = build_setup(config, model, tokenizer, max(entry.experts for entry in entries[name]), Path(folder))
                source = "random" if setup.asset is None else "shipped" if config.runs is None else "trained"
                record.adapters[name] = f"{source}, {POOL_TEXT if config.runs is None else f'rank {setup.bank.rank}'}"
                session = _Session(name, group, setup, config.seed, record.skipped, progress, turns)
                systems = session.prepare(entries[name])
                with turns.timing():
                    watch = ContentionMonitor(device, others_wait=turns.shared)
                    if not record.bandwidth_bytes_per_s:
                        record = replace(record, bandwidth_bytes_per_s=measure_bandwidth(device))
                    record.measurements.extend(session.measure(systems, record.bandwidth_bytes_per_s))
                    record.warnings.extend(text for text in watch.warnings() if text not in record.warnings)
            record.summary[:] = summarize(record)
            if after_group is not None:
                after_group(record)
    return record


def _with_pool_sizes(config: BenchConfig) -> BenchConfig:
    """The configuration with a pool size in every group that leaves it open.

    Raises:
        ConfigError: If a group wants another size than ``runs`` has adapters for.
    """
    number = EXPERTS if config.runs is None else len(load_pool(method_asset("pool", "", runs=Path(config.runs))).names)
    groups = {name: group if group.experts else replace(group, experts=(number,)) for name, group in config.groups.items()}
    for name, group in groups.items() if config.runs is not None else ():
        others = {entry.experts for entry in group.entries() if entry.system not in POOL_FREE} - {number}
        if others:
            raise ConfigError(f"group '{name}': the pool of {config.runs} has {number} adapters, --experts asks for {min(others)}.")
    return replace(config, groups=groups)


def _check_memory(config: BenchConfig, experts: int, device: torch.device) -> None:
    backbone, pool = needed_bytes(config.shape, resolve_dtype(config.dtype, device), experts)
    advice = "Use a smaller shape, fewer experts (--experts), or --dtype bfloat16."
    require_memory({f"base model {config.shape} in {config.dtype}": backbone, f"{experts} experts": pool}, device, advice)


def _allow_compilation(device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError("--compile needs a GPU: on other devices generate() compiles nothing.")
    # One limit counts the models of all systems, and beyond it torch silently falls back to eager.
    torch._dynamo.config.recompile_limit = 256  # type: ignore[attr-defined]


def _weights(shape: str) -> str:
    """Where a shape's weights are from, in one word."""
    sizes = find_shape(shape)
    return "shipped" if sizes is None else "random" if sizes.pretrained is None else "pretrained"


def build_setup(config: BenchConfig, model: Any, tokenizer: Any, experts: int, folder: Path) -> BenchSetup:
    """The pool of ``runs``; without one the embedded pool on nano where it has the size asked for, otherwise a random one."""
    experts = max(1, experts)
    runs = None if config.runs is None else Path(config.runs)
    asset = None if runs is None and find_shape(config.shape) is not None else partial(method_asset, runs=runs)
    if asset is None or (runs is None and experts != len(load_pool(asset("pool", "")).names)):
        bank = random_bank(model, [f"expert_{index:04d}" for index in range(experts)], config.seed)
        return BenchSetup(model=model, tokenizer=tokenizer, bank=bank, folder=folder)
    bank = AdapterBank.from_pool(asset("pool", ""), dtype=model.dtype, device=model.device)
    return BenchSetup(model=model, tokenizer=tokenizer, bank=bank, folder=folder, asset=asset)


@dataclass
class _Session:
    """The measurement of one group."""

    name: str
    group: Group
    setup: BenchSetup
    seed: int
    skipped: dict[str, str]
    progress: Progress
    turns: Turns

    def prepare(self, entries: Sequence[Entry]) -> list[BenchSystem]:
        """Build the systems, and compile those that are to be timed compiled."""
        systems: list[BenchSystem] = []
        for entry in entries:
            if self.turns.late:
                self.skipped[f"{self.name}: {entry.label}"] = f"not prepared within {self.turns.prepare_seconds:.0f} s"
                continue
            self.progress(f"{self.name}: building {entry.label}")
            try:
                system = build_system(self.setup, entry)
            except Exception as error:  # noqa: BLE001  # one system that fails must not lose what the others measured
                self.skipped[f"{self.name}: {entry.label}"] = _reason(error)
                continue
            if entry.compiled and not system.compilable:
                self.skipped[f"{self.name}: {entry.label}"] = "its decoding step is not compiled"
                continue
            if entry.compiled and self.turns.shared:
                self._compile(system)
            systems.append(system)
        return systems

    def _compile(self, system: BenchSystem) -> None:
        """Run the first workload once; an error comes again, and is told, when the system is warmed up."""
        workload = self._workload(self.group.batch[0], self.group.prompt[0])
        with contextlib.suppress(Exception):
            time_once(system, workload)

    def _workload(self, batch_size: int, prompt_tokens: int) -> Workload:
        return make_workload(self.setup.tokenizer, self.setup.model.device, batch_size, prompt_tokens, self.group.new_tokens)

    def measure(self, systems: Sequence[BenchSystem], bandwidth: float) -> list[Measurement]:
        """Time the systems under every workload; ``bandwidth`` (bytes per second) gives the floor."""
        measured = []
        for batch_size in self.group.batch:
            for prompt_tokens in self.group.prompt:
                measured += self._rounds(systems, batch_size, prompt_tokens, bandwidth)
        return measured

    def _rounds(self, systems: Sequence[BenchSystem], batch_size: int, prompt_tokens: int, bandwidth: float) -> list[Measurement]:
        group, device = self.group, self.setup.model.device
        workload = self._workload(batch_size, prompt_tokens)
        able = [one for one in systems if one.max_batch is None or batch_size <= one.max_batch]
        for one in systems:
            if one not in able:
                self.skipped[f"{self.name}: {one.entry.label}, batch {batch_size}"] = f"serves at most {one.max_batch} row(s) at once"
        able, transient = self._warm(able, workload)
        told = f"batch {batch_size}, prompt {prompt_tokens}"
        orders = round_orders(len(able), group.repeats, f"{self.seed} {self.name} {batch_size} {prompt_tokens}")
        failed: dict[int, Exception] = {}

        def before(number: int) -> None:
            self.progress(f"{self.name}: {told}, round {number + 1}/{group.repeats}")

        samples = take_turns(able, workload, orders, device, before, time_once, failed.__setitem__)
        self.skipped.update({f"{self.name}: {able[index].entry.label}, {told}": _reason(error) for index, error in failed.items()})
        floor_s = step_bytes(self.setup.model, batch_size, prompt_tokens + group.new_tokens // 2) / bandwidth
        return [
            Measurement(
                **facts(one, workload),
                group=self.name, batch_size=batch_size, prompt_tokens=prompt_tokens, new_tokens=group.new_tokens, warmup=group.warmup,
                **vars(samples[index]),
                resident_bytes=resident_bytes(*one.modules), transient_bytes=transient[index], floor_s=floor_s,
                device_s=self._device_seconds(one, workload),
            )
            for index, one in enumerate(able) if index not in failed
        ]  # fmt: skip

    def _device_seconds(self, system: BenchSystem, workload: Workload) -> float | None:
        try:
            return device_seconds(system, workload)
        except Exception as error:  # noqa: BLE001  # a profiler may not be allowed to look
            self.progress(f"{self.name}: no kernel times of {system.entry.label}: {_reason(error)}")
            return None

    def _warm(self, systems: Sequence[BenchSystem], workload: Workload) -> tuple[list[BenchSystem], list[int | None]]:
        """Warm-up rounds, then one for the memory; a system that cannot serve the workload is dropped with its reason."""
        device = self.setup.model.device
        able: list[BenchSystem] = []
        transient: list[int | None] = []
        for one in systems:
            rows, width = workload.prompts.input_ids.shape
            try:
                for _ in range(self.group.warmup):
                    time_once(one, workload)
                transient.append(transient_bytes(lambda one=one: time_once(one, workload), device))  # type: ignore[misc]
                able.append(one)
            except Exception as error:  # noqa: BLE001  # compilers and kernels raise errors of every kind
                self.skipped[f"{self.name}: {one.entry.label}, batch {rows}, prompt {width}"] = _reason(error)
        return able, transient


def _reason(error: Exception) -> str:
    """Why a system was not measured, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"{str(error).splitlines()[0]} (lower --batch, --prompt or --experts)"
    text = one_line(error)
    return text if isinstance(error, DLPLoRAError) else f"{type(error).__name__}: {text[:300]}"
