"""Predicted cost of a backend: launches, bytes and floating point operations, each times a constant measured on a device.

The constants are in ``cost_model.json`` next to this file, with the raw times they were fitted to and the machine;
``python -m benchmarks.kernels`` measures and fits them. For a device without constants ``predict`` returns None.

Shapes: B rows, T tokens, E experts, R rank, I inputs, O outputs, K experts per row at most.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CONSTANTS = Path(__file__).with_name("cost_model.json")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of one kind of adapted module, and how many of that kind a model has."""

    d_in: int
    d_out: int
    experts: int
    rank: int
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What routing weights will be used for.

    Args:
        layers: Adapted modules.
        device: Device type, ``cpu`` or ``cuda``.
        itemsize: Bytes of one number of the bank.
        prompt_tokens: Tokens of the prefill, a row.
        new_tokens: Decode steps expected after it.
        eager: Whether no graph is captured, so that unused room in the buffers is not read on a CPU.
    """

    layers: tuple[LayerShape, ...]
    device: str
    itemsize: int = 4
    prompt_tokens: int = 1
    new_tokens: int = 0
    eager: bool = False


@dataclass(frozen=True, slots=True)
class Terms:
    """Amounts of the three things that take time."""

    launches: float = 0.0
    nbytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Terms) -> Terms:
        return Terms(self.launches + other.launches, self.nbytes + other.nbytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Terms:
        return Terms(self.launches * times, self.nbytes * times, self.flops * times)


def _through(layer: LayerShape, inner: int, matrices: int, positions: int, launches: int, itemsize: int) -> Terms:
    """A LoRA of rank ``inner`` over ``positions`` tokens, with ``matrices`` sets of factors."""
    both = layer.d_in + layer.d_out
    nbytes = itemsize * (matrices * inner * both + positions * (both + 2 * inner))
    return Terms(launches, nbytes, 2.0 * positions * inner * both)


def step_terms(backend: str, layer: LayerShape, rows: int, weight_rows: int, tokens: int, width: int, itemsize: int) -> Terms:
    """One forward of one layer's delta, B = ``rows``, T = ``tokens``; the base layer is left out.

    Args:
        backend: ``dense``, ``folded``, ``merged`` or ``triton``.
        weight_rows: B, or 1 for weights that all rows share.
    """
    positions = rows * tokens
    kept = min(width, layer.experts) * layer.rank
    if backend == "dense":
        return _through(layer, layer.experts * layer.rank, 1, positions, 5, itemsize)
    if backend == "folded":
        return _through(layer, kept, weight_rows, positions, 3, itemsize)
    if backend == "triton":
        shared = min(layer.experts, weight_rows * min(width, layer.experts)) * layer.rank
        terms = _through(layer, kept, 1, positions, 3, itemsize)
        return Terms(terms.launches, terms.nbytes + itemsize * (shared - kept) * (layer.d_in + layer.d_out), terms.flops)
    assert backend == "merged", backend
    return Terms()


def write_terms(backend: str, layer: LayerShape, weight_rows: int, width: int, itemsize: int) -> Terms:
    """Writing the buffers of one layer."""
    both, kept = layer.d_in + layer.d_out, min(width, layer.experts) * layer.rank
    if backend == "folded":
        return Terms(12, 3.0 * itemsize * weight_rows * kept * both, float(weight_rows * kept * layer.d_out))
    if backend == "merged":
        weight = layer.d_in * layer.d_out
        return Terms(14, itemsize * (5.0 * weight + kept * both), 2.0 * kept * weight)
    return Terms(30 if backend == "triton" else 0)


def terms(backend: str, work: Work, rows: int, weight_rows: int, width: int) -> Terms:
    """Writing the buffers, the prefill and its decode steps, over all layers."""
    total = Terms()
    for layer in work.layers:
        size = (layer, rows, weight_rows)
        spent = write_terms(backend, layer, weight_rows, width, work.itemsize)
        spent = spent + step_terms(backend, *size, work.prompt_tokens, width, work.itemsize)
        spent = spent + step_terms(backend, *size, 1, width, work.itemsize) * work.new_tokens
        total = total + spent * layer.count
    return total


@cache
def constants(device: str) -> dict[str, dict[str, float]] | None:
    """Backend -> seconds per launch, byte and floating point operation, measured on a device type; None if it was not measured."""
    measured: dict[str, Any] = json.loads(CONSTANTS.read_text(encoding="utf-8"))["devices"]
    return measured[device]["constants"] if device in measured else None


def predict(backend: str, work: Work, rows: int, weight_rows: int, width: int) -> float | None:
    """Predicted seconds of writing the buffers, the prefill and the decode steps; None without constants for device and backend."""
    known = (constants(work.device) or {}).get(backend)
    if known is None:
        return None
    spent = terms(backend, work, rows, weight_rows, width)
    return known["launch_s"] * spent.launches + known["byte_s"] * spent.nbytes + known["flop_s"] * spent.flops
