"""Records of speed measurements: raw samples, ratios with intervals, and files. No deep-learning package is imported.

A latency record holds every system of one process under every workload, round by round. Ratios are taken within a round, so that other load
on the machine affects both sides. In the files a system is called ``contender``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dlplora.atomic import write_atomically
from dlplora.config import build
from dlplora.documents import read_json
from dlplora.errors import RecordError

BENCH_VERSION = 1
FOLDER = Path("results/bench")
SINGLE, BASE = "peft_single", "base"
"""The two references: PEFT with one unmerged adapter in the same dtype, and the bare base model."""
Quantity = Literal["ttft_s", "tpot_s", "router_s"]


FIXED_ORDER = "the systems took turns in a fixed order, which distorts ratios of the time to the first token"
"""Of records without a seed, which the order is drawn from."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One system under one workload."""

    group: str
    """Measurements of one group were taken in turns; only they are compared."""
    contender: str
    """Name of a preset, or ``base``, ``peft_single``, ``peft_mixed``, ``peft_xlora``, ``peft_arrow``, ``released_loop``."""
    experts: int
    """Adapters in the pool it was built with; 0 for the bare base model."""
    kept: int | None
    """Experts forced per row; None leaves it to the method."""
    reroute_every: int | None
    """Tokens after which every row was re-routed, sentence ends aside; None for sentence ends only."""
    compiled: bool
    """Whether ``generate`` compiled the decoding step (static cache)."""
    granularity: str
    backend: str
    """Kernel backends in use; empty where none of ours is."""
    backend_asked: str
    """The requested backend: ``auto`` or a name; empty likewise."""
    batch_size: int
    """Rows, all different."""
    prompt_tokens: int
    new_tokens: int
    warmup: int
    """Rounds before the first sample."""
    ttft_s: list[float]
    """Time to the first token, routing included, s; one sample per round."""
    tpot_s: list[float]
    """Mean time of a token after the first, s; one sample per round."""
    router_s: list[float]
    """Routing a batch of prompts alone, s (part of ``ttft_s``); empty where nothing is routed ahead."""
    experts_kept: float | None
    """Experts with a routing weight, mean over rows; None where gates decide token by token."""
    sentence_reroutes: int | None
    """Re-routes of single rows at sentence ends of the generated text, which the times contain; None for what does not re-route."""
    resident_bytes: int
    """Parameters and buffers, the base model's included."""
    transient_bytes: int | None
    """Memory one generation needed on top of that; a lower bound on a CPU."""
    floor_s: float
    """Time in which the memory moves what a decode step of the bare base model must read."""
    positions: list[int] = field(default_factory=list)
    """The place in the order of each round, from 0; empty in records made before orders were random."""
    device_s: float | None = None
    """Time of a GPU's kernels per token after the first, from the profiler, s; None on other devices and in older records."""

    @property
    def workload(self) -> tuple[str, int, int, int, bool]:
        """What two measurements must share to be compared: group, batch, prompt, new tokens, compilation."""
        return self.group, self.batch_size, self.prompt_tokens, self.new_tokens, self.compiled


@dataclass(frozen=True, kw_only=True)
class LatencyRecord:
    """Everything measured in one process, or in processes that took turns; what a group compares is from one process."""

    shape: str
    parameters: int
    weights: str
    """``random`` or ``shipped``: where the base model's numbers came from; latency does not depend on them."""
    adapters: dict[str, str]
    """Group -> the same for its pool, with rank and targets."""
    dtype: str
    device: str
    bandwidth_bytes_per_s: float
    measurements: list[Measurement]
    skipped: dict[str, str]
    """Requested measurement that was not possible -> reason."""
    warnings: list[str]
    """What disturbed the measurement, as far as known."""
    provenance: dict[str, Any]
    created: str
    kind: str = "latency"
    schema_version: int = BENCH_VERSION
    seed: int | None = None
    """Seed of the timing order; None in records made before it was random."""
    summary: list[dict[str, Any]] = field(default_factory=list)
    """Minima, medians and ratios for readers of the file; the package does not read them."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A paired ratio: median over the rounds, and a 95 % interval of it."""

    median: float
    low: float
    high: float


def paired_ratio(ours: Sequence[float], reference: Sequence[float], *, resamples: int = 2000) -> Ratio:
    """Ratio within each round; the interval is a percentile bootstrap of the median over rounds, the range for fewer than three.

    Args:
        ours, reference: Samples of the same rounds, in order.
        resamples: Draws of the bootstrap; its seed is fixed.

    Raises:
        RecordError: If the rounds differ in number, or there are none.
    """
    if len(ours) != len(reference) or not ours:
        raise RecordError(f"a paired ratio needs samples of the same rounds, got {len(ours)} and {len(reference)}.")
    ratios = np.asarray(ours, dtype=np.float64) / np.asarray(reference, dtype=np.float64)
    low, high = float(ratios.min()), float(ratios.max())
    if len(ratios) >= 3:
        draws = np.random.default_rng(0).integers(len(ratios), size=(resamples, len(ratios)))
        low, high = (float(value) for value in np.quantile(np.median(ratios[draws], axis=1), (0.025, 0.975)))
    return Ratio(median=float(np.median(ratios)), low=low, high=high)


def reference_of(record: LatencyRecord, one: Measurement, name: str) -> Measurement | None:
    """The measurement of a reference under the same workload."""
    found = (other for other in record.measurements if other.contender == name and other.workload == one.workload)
    return next(found, None)


def ratio_to(record: LatencyRecord, one: Measurement, name: str, quantity: Quantity) -> Ratio | None:
    """A system's time over a reference's; None if the reference was not measured."""
    other = reference_of(record, one, name)
    return None if other is None else paired_ratio(getattr(one, quantity), getattr(other, quantity))


def ratio_of_minima(record: LatencyRecord, one: Measurement, name: str, quantity: Quantity) -> float | None:
    """A system's fastest round over a reference's, on which other processes weigh least; None if the reference was not measured."""
    other = reference_of(record, one, name)
    return None if other is None else min(getattr(one, quantity)) / min(getattr(other, quantity))


def plain_of(record: LatencyRecord, forced: Measurement) -> Measurement | None:
    """The same system without forced re-routing."""
    key = ("contender", "experts", "kept", "backend_asked", "workload")
    wanted = [getattr(forced, name) for name in key]
    plain = (other for other in record.measurements if other.reroute_every is None)
    return next((other for other in plain if [getattr(other, name) for name in key] == wanted), None)


def reroutes_in(new_tokens: int, every: int) -> int:
    """Forced re-routes that fall between the first token and the last: after every ``every``-th token but the last one.

    >>> reroutes_in(17, 8), reroutes_in(16, 8)
    (2, 1)
    """
    return (new_tokens - 1) // every


def reroute_cost(record: LatencyRecord, forced: Measurement) -> Ratio | None:
    """What one re-route of the whole batch costs, router included, in decode steps of the same system.

    The extra time of the forced run over all steps, divided by the re-routes in it and by a step of the plain run, round by round.
    None if the plain run is missing or nothing was re-routed.
    """
    plain = plain_of(record, forced)
    count = 0 if forced.reroute_every is None else reroutes_in(forced.new_tokens, forced.reroute_every)
    if plain is None or count == 0:
        return None
    steps = forced.new_tokens - 1
    extra = [(a - b) * steps / count for a, b in zip(forced.tpot_s, plain.tpot_s, strict=True)]
    return paired_ratio(extra, plain.tpot_s)


def summarize(record: LatencyRecord) -> list[dict[str, Any]]:
    """Minima, medians, quartile distances and ratios of every measurement; ``of_minima`` is the ratio of the fastest rounds."""
    rows = []
    for one in record.measurements:
        row: dict[str, Any] = {
            key: getattr(one, key)
            for key in ("group", "contender", "experts", "kept", "reroute_every", "compiled", "backend", "batch_size", "prompt_tokens")
        }
        quantity: Quantity
        for quantity in ("ttft_s", "tpot_s", "router_s"):
            samples = getattr(one, quantity)
            row[quantity] = {"min": min(samples), "median": statistics.median(samples), "iqr": iqr(samples)} if samples else None
        for name in (SINGLE, BASE):
            for quantity in ("ttft_s", "tpot_s"):
                ratio = ratio_to(record, one, name, quantity)
                row[f"{quantity[:-2]}_over_{name}"] = (
                    None if ratio is None else {**dataclasses.asdict(ratio), "of_minima": ratio_of_minima(record, one, name, quantity)}
                )
        cost = reroute_cost(record, one)
        row["reroute_in_steps"] = None if cost is None else dataclasses.asdict(cost)
        row["tpot_over_floor"] = statistics.median(one.tpot_s) / one.floor_s
        rows.append(row)
    return rows


def merge_latency(parts: Sequence[LatencyRecord]) -> LatencyRecord:
    """One record of the groups that several processes timed one after the other on one device.

    Args:
        parts: At least one, in the order of the groups.

    Raises:
        RecordError: If they are of different base models, devices, seeds or code.
    """
    first, *others = [_origin(one) for one in parts]
    for one in others:
        for name, value in one.items():
            if value != first[name]:
                raise RecordError(f"records of different {name} cannot be merged: {first[name]} and {value}.")
    merged = dataclasses.replace(
        parts[0],
        bandwidth_bytes_per_s=statistics.median(one.bandwidth_bytes_per_s for one in parts),
        adapters={name: text for one in parts for name, text in one.adapters.items()},
        measurements=[measurement for one in parts for measurement in one.measurements],
        skipped={name: text for one in parts for name, text in one.skipped.items()},
        warnings=list(dict.fromkeys(text for one in parts for text in one.warnings)),
        created=min(one.created for one in parts),
    )
    return dataclasses.replace(merged, summary=summarize(merged))


def _origin(record: LatencyRecord) -> dict[str, Any]:
    """What records of one run have in common. The memory of a virtual machine may grow while it runs."""
    facts, hardware = record.provenance, record.provenance["hardware"]
    own = {name: getattr(record, name) for name in ("shape", "dtype", "device", "seed", "weights")}
    return {**own, "code": facts["git"], "versions": facts["versions"], "processor": hardware["cpu"], "GPU": hardware["gpu"]}


def iqr(samples: Sequence[float]) -> float:
    """Distance between the quartiles; 0 for a single sample."""
    if len(samples) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return upper - lower


def save_bench(record: Any, path: Path) -> Path:
    """Write a record of this or another kind as JSON, atomically.

    Raises:
        RecordError: If a number is not finite.
    """
    try:
        text = json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise RecordError(f"{path}: {error}; NaN and infinities are not results.") from error
    write_atomically(path, text + "\n")
    return path


def read_latency(path: Path) -> LatencyRecord:
    """Read one latency record strictly.

    Raises:
        RecordError: Naming the file and the field that does not fit.
    """
    raw = read_json(path, error=RecordError)
    if (raw.get("kind"), raw.get("schema_version")) != ("latency", BENCH_VERSION):
        found = f"{raw.get('kind')!r}, {raw.get('schema_version')!r}"
        raise RecordError(f"{path}: expected kind 'latency' in version {BENCH_VERSION}, got {found}.")
    record = build(LatencyRecord, raw, str(path), error=RecordError)
    for one in record.measurements:
        times = [*one.ttft_s, *one.tpot_s, *one.router_s, one.floor_s]
        if not all(isinstance(value, float) and math.isfinite(value) and value > 0 for value in times):
            raise RecordError(f"{path}: {one.contender}: times must be positive numbers of seconds.")
        if len(one.ttft_s) != len(one.tpot_s) or not one.ttft_s:
            raise RecordError(
                f"{path}: {one.contender}: {len(one.ttft_s)} first and {len(one.tpot_s)} later samples; expected one of each per round."
            )
    return record


def latency_records(folder: Path = FOLDER) -> list[LatencyRecord]:
    """Every latency record of a folder, oldest first.

    Raises:
        RecordError: If one is damaged.
    """
    paths = sorted(folder.glob("latency-*.json"))
    return sorted((read_latency(path) for path in paths), key=lambda record: record.created)


def newest(records: Iterable[LatencyRecord], shape: str, device_type: str | None = None) -> LatencyRecord | None:
    """The newest record of a shape, on one kind of device if named."""
    found = [one for one in records if one.shape == shape and (device_type is None or one.device.split(":")[0] == device_type)]
    return max(found, key=lambda one: one.created, default=None)
