"""Cost of sharing a folder: 10,000 cells, 500 workers, no model: ``python -m benchmarks.matrix_board``.

The workers' own code looks for, claims and finishes cells on a real folder; only the work of the cells is simulated, by a clock that jumps
over it. Events of all workers are handled in the order of their times, so two workers can look before either claims. A look, claim or
finish takes the processor time measured here plus a delay for each file operation, as a file server would add it (``--delay-ms``; a listing
counts one operation per hundred names). Overhead is the time in which a worker neither works nor lacks work, as a share of the time it
works.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlplora.matrix.board import Board, Lease
from dlplora.matrix.plan import Cell
from dlplora.matrix.worker import by_rank, choose, ready_cells

NAMES_A_REPLY = 100
WAIT_S = 1.0
operations: Counter[str] = Counter()


def _count(event: str, arguments: tuple[Any, ...]) -> None:
    if event in {"open", "os.link", "os.rename", "os.remove"}:
        operations["files"] += 1
    elif event == "os.listdir":
        operations["files"] += 1
        operations["listings"] += 1


def cells_like_a_plan(num_cells: int, minutes: float) -> list[Cell]:
    """Pools of 26 experts, a router and five gates over each pool, and 40 evaluations over those."""
    cells: list[Cell] = []

    def add(kind: str, name: str, after: list[str], share: float) -> str:
        cells.append(
            Cell(id=f"{len(cells):012x}", kind=kind, profile="p", name=name, seed=0, after=after, minutes=minutes * share)  # type: ignore[arg-type]
        )
        return cells[-1].id

    while len(cells) < num_cells:
        pool = add("artifact", "pool", [add("experts", f"e{number}", [], 1.0) for number in range(26)], 0.1)
        gates = [add("artifact", f"gate{number}", [pool], 1.5) for number in range(6)]
        for number in range(40):
            add("evaluate", f"m{number}", [gates[number % 6]] if number % 2 else [pool], 1.0)
    return cells[:num_cells]


class _Simulation:
    def __init__(self, cells: list[Cell], folder: Path, options: argparse.Namespace) -> None:
        self.cells, self.order, self.options = cells, by_rank(cells), options
        self.ids = [cell.id for cell in cells]
        self.board = Board(folder, 120.0)
        self.draw = random.Random(options.seed)
        self.events: list[tuple[float, int, int, Callable[..., Any], tuple[Any, ...]]] = []
        self.number = 0
        self.worked = self.overhead = self.idle = self.end = 0.0
        self.lost_claims = self.looks = 0

    def at(self, when: float, worker: int, call: Callable[..., Any], *arguments: Any) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, worker, call, arguments))

    def cost(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What a call returns and how long it takes with the delay of a file server, s."""
        operations.clear()
        start = time.process_time()
        value = call()
        cpu = time.process_time() - start
        names = operations["listings"] * len(self.cells) / NAMES_A_REPLY
        return value, cpu + self.options.delay_ms / 1e3 * (operations["files"] + names)

    def look(self, when: float, worker: int, wait: float = WAIT_S) -> None:
        self.looks += 1

        def find() -> tuple[Any, Any]:
            states = self.board.states(self.ids)
            ready = ready_cells(self.order, states)
            return states, choose(ready, self.draw) if ready else None

        (states, cell), seconds = self.cost(find)
        if cell is not None:
            self.overhead += seconds
            self.at(when + seconds, worker, self.claim, cell, states[cell.id].attempt)
        elif any(state.kind in {"running", "free"} for state in states.values()):
            wait = min(1.5 * wait, self.board.lease_s / 4)
            self.idle += seconds + wait
            self.at(when + seconds + wait, worker, self.look, wait)

    def claim(self, when: float, worker: int, cell: Cell, attempt: int) -> None:
        lease, seconds = self.cost(lambda: self.board.claim(cell.id, attempt, str(worker)))
        self.overhead += seconds
        if lease is None:
            self.lost_claims += 1
            self.at(when + seconds, worker, self.look)
            return
        length = 60 * (cell.minutes or 1.0) * self.draw.lognormvariate(0.0, 0.5)
        self.worked += length
        self.at(when + seconds + length, worker, self.finish, lease)

    def finish(self, when: float, worker: int, lease: Lease) -> None:
        _, seconds = self.cost(lambda: lease.finish({"attempt": lease.attempt, "moves": []}))
        self.overhead += seconds
        self.end = max(self.end, when + seconds)
        self.at(when + seconds, worker, self.look)

    def run(self) -> dict[str, Any]:
        for worker in range(self.options.workers):
            self.at(self.draw.random() * self.options.start_s, worker, self.look)
        while self.events:
            when, _, worker, call, arguments = heapq.heappop(self.events)
            call(when, worker, *arguments)
        done, claims = (len(os.listdir(self.board.folder / name)) for name in ("done", "claims"))
        return {
            "cells": len(self.cells), "workers": self.options.workers, "done": done, "claims": claims,
            "claims_lost_to_others": self.lost_claims, "looks": self.looks, "hours": round(self.end / 3600, 2),
            "overhead_share": round(self.overhead / self.worked, 5), "idle_share": round(self.idle / self.worked, 4),
            "overhead_ms_a_cell": round(1e3 * self.overhead / len(self.cells), 1), "minutes_a_cell": self.options.minutes,
            "delay_ms": self.options.delay_ms,
        }  # fmt: skip


def main() -> int:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=5.0, help="mean length of a cell (default: 5)")
    parser.add_argument("--delay-ms", type=float, default=1.0, help="delay of a file operation (default: 1)")
    parser.add_argument("--start-s", type=float, default=10.0, help="time within which all workers start (default: 10)")
    parser.add_argument("--folder", metavar="DIR", help="where to put the shared folder (default: the system's for temporary files)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.addaudithook(_count)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        told = _Simulation(cells_like_a_plan(options.cells, options.minutes), Path(folder), options).run()
    print(json.dumps(told, indent=1))
    return 0 if told["done"] == told["cells"] == told["claims"] else 1


if __name__ == "__main__":
    sys.exit(main())
