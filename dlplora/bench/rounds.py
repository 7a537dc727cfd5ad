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
from dlplora.bench.timing import DeviceClock, time_call, time_generation


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What one system took, round by round, s."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    router_s: list[float] = field(default_factory=list)
    """Empty where nothing is routed ahead."""
    positions: list[int] = field(default_factory=list)
    """The system's place in the order of each round, from 0."""

    def add(self, position: int, times: tuple[float, float], router_s: float | None) -> None:
        """One round: place in the order, (TTFT, TPOT), and routing, s."""
        self.positions.append(position)
        self.ttft_s.append(times[0])
        self.tpot_s.append(times[1])
        if router_s is not None:
            self.router_s.append(router_s)


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
    dropped: Callable[[int, Exception], object] | None = None,
) -> list[Samples]:
    """Time every system once per round, in the order of that round.

    Args:
        systems: Warmed up.
        workload: What they all generate.
        orders: Of ``round_orders``.
        device: Where they run.
        before_round: Told the number of the round that begins, from 0.
        once: One generation -> (TTFT, TPOT), s; None is ``time_once``.
        dropped: Told the index of a system that failed, and its error; the others go on without it. None raises the error.
    """
    timed = once or time_once
    samples = [Samples() for _ in systems]
    failed: set[int] = set()
    for number, order in enumerate(orders):
        before_round(number)
        gc.collect()
        able = [index for index in order if index not in failed]
        for place, index in enumerate([*able[-1:], *able]):  # first the last one, off the record, so that every other one follows another
            if index in failed:
                continue
            try:
                times = timed(systems[index], workload)
                if place:
                    samples[index].add(place - 1, times, _router_s(systems[index], workload, device))
            except Exception as error:  # a compiler, or the memory
                if dropped is None:
                    raise
                failed.add(index)
                dropped(index, error)
    return samples


def _router_s(system: BenchSystem, workload: Workload, device: torch.device) -> float | None:
    route = system.route
    return None if route is None else time_call(lambda: route(workload), device)


def time_once(system: BenchSystem, workload: Workload) -> tuple[float, float]:
    """(TTFT, TPOT) of one generation, s."""
    prompts = workload.prompts
    return time_generation(_generation(system, workload), prompts.input_ids.shape[1] + workload.new_tokens, prompts.input_ids.device)


def device_seconds(system: BenchSystem, workload: Workload) -> float | None:
    """Kernel time of a token after the first, s; None where there is no GPU to ask."""
    if workload.prompts.input_ids.device.type != "cuda":
        return None
    clock = DeviceClock(workload.new_tokens)
    _generation(system, workload)(stopping_criteria=StoppingCriteriaList([clock]))
    return clock.seconds or None


def _generation(system: BenchSystem, workload: Workload) -> Callable[..., torch.Tensor]:
    options: Mapping[str, Any] = {"cache_implementation": "static"} if system.entry.compiled else {}
    return lambda stopping_criteria: system.generate(workload, stopping_criteria=stopping_criteria, **options)
