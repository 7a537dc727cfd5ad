"""The order in which systems are timed, and their times.

The system that is timed right after a pause (garbage collection, start of a round) runs with cold caches. Orders are therefore random,
from a seed stored in the record, and come in pairs of an order and its reverse, so that all systems have the same mean position. After the
garbage collection between two rounds, one generation runs untimed, so that every timed run follows another system.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteriaList

from dlplora.bench.setup import BenchSystem, Workload
from dlplora.bench.timing import time_call, time_generation


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What one system took, round by round, s."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    router_s: list[float] = field(default_factory=list)
    """Empty where nothing is routed ahead."""
    positions: list[int] = field(default_factory=list)
    """The system's place in the order of each round, from 0."""


def round_orders(num_systems: int, num_rounds: int, seed: int | str) -> list[list[int]]:
    """The systems' indices in timing order, one list per round; every second round is the reverse of the one before.

    Args:
        num_systems: How many take turns.
        num_rounds: An even number.
        seed: Equal seeds give equal orders, on every machine.
    """
    assert num_rounds % 2 == 0, "the configuration refuses odd numbers"
    draw = random.Random(seed)
    orders: list[list[int]] = []
    for _ in range(num_rounds // 2):
        forth = list(range(num_systems))
        draw.shuffle(forth)
        orders += [forth, forth[::-1]]
    return orders


def take_turns(
    systems: Sequence[BenchSystem],
    workload: Workload,
    orders: Sequence[Sequence[int]],
    device: torch.device,
    before_round: Callable[[int], object],
    once: Callable[[BenchSystem, Workload], tuple[float, float]] | None = None,
) -> list[Samples]:
    """Time every system once per round, in the order of that round.

    Args:
        systems: Warmed up.
        workload: What they all generate.
        orders: Of ``round_orders``.
        device: Where they run.
        before_round: Told the number of the round that begins, from 0.
        once: One generation -> (TTFT, TPOT), s; None is ``time_once``.
    """
    timed = once or time_once
    samples = [Samples() for _ in systems]
    for number, order in enumerate(orders):
        before_round(number)
        gc.collect()
        if order:
            timed(systems[order[-1]], workload)  # not recorded; the last one, so that the first follows another system like the rest
        for position, index in enumerate(order):
            first, rest = timed(systems[index], workload)
            samples[index].ttft_s.append(first)
            samples[index].tpot_s.append(rest)
            samples[index].positions.append(position)
            route = systems[index].route
            if route is not None:
                samples[index].router_s.append(time_call(lambda route=route: route(workload), device))  # type: ignore[misc]
    return samples


def time_once(system: BenchSystem, workload: Workload) -> tuple[float, float]:
    """(TTFT, TPOT) of one generation, s."""
    prompts = workload.prompts
    options: Mapping[str, Any] = {"cache_implementation": "static"} if system.entry.compiled else {}

    def generate(stopping_criteria: StoppingCriteriaList) -> torch.Tensor:
        return system.generate(workload, stopping_criteria=stopping_criteria, **options)

    return time_generation(generate, prompts.input_ids.shape[1] + workload.new_tokens, prompts.input_ids.device)
