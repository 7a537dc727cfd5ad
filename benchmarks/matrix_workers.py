"""Workers that are killed repeatedly, compared with one undisturbed worker: ``python -m benchmarks.matrix_workers``.

Both work on the same profiles. Every few seconds a worker is killed (SIGKILL), frozen until its lease has run out (SIGSTOP, SIGCONT), or
asked to stop (SIGTERM), and another one is started. In the end every cell must be done once, and all records and artifacts must have the
numbers of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from dlplora.matrix.board import Board
from dlplora.matrix.plan import Plan, read_plan
from dlplora.reporting.schema import read_record

Processes = list[subprocess.Popen[bytes]]


def main() -> int:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profiles", nargs="?", default="nano", help="as for `dlplora matrix plan` (default: nano)")
    parser.add_argument("--options", default="--methods base,avg_delta,oracle,dlp,ties --limit 3", help="further options of the plan")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--every", type=float, default=6.0, metavar="S", help="mean time between two disturbances (default: 6)")
    parser.add_argument("--lease", type=float, default=6.0, metavar="S")
    parser.add_argument("--limit-s", type=float, default=1200.0, help="give up after this number of seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder")
    options = parser.parse_args()
    alone, disturbed = (_plan(options, options.folder / name) for name in ("alone", "disturbed"))
    start = time.monotonic()
    if _worker(alone.path).wait():
        print("error: the undisturbed worker failed", file=sys.stderr)
        return 2
    between = time.monotonic()
    counts = _disturb(disturbed, options)
    told = {
        "cells": len(disturbed.cells), "alone_s": round(between - start, 1), "disturbed_s": round(time.monotonic() - between, 1),
        "workers": options.workers, **counts, **_compare(alone, disturbed),
    }  # fmt: skip
    print(json.dumps(told, indent=1))
    return 0 if told["equal"] and told["done"] == told["cells"] else 1


def _plan(options: argparse.Namespace, folder: Path) -> Plan:
    path = folder / "plan.jsonl"
    told = ["--lease", str(options.lease), "--max-deaths", "1000", "--out", str(path), *options.options.split()]
    subprocess.run([sys.executable, "-m", "dlplora.cli.main", "matrix", "plan", options.profiles, *told], check=True, stdout=sys.stderr)
    return read_plan(path)


def _worker(path: Path) -> subprocess.Popen[bytes]:
    log = (path.parent / "workers.log").open("ab")
    command = [sys.executable, "-m", "dlplora.cli.main", "matrix", "work", str(path)]
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _disturb(plan: Plan, options: argparse.Namespace) -> dict[str, int]:
    """Keep the number of workers constant, replacing them, until every cell is done."""
    draw = random.Random(options.seed)
    running: Processes = [_worker(plan.path) for _ in range(options.workers)]
    stopped: list[tuple[float, subprocess.Popen[bytes]]] = []
    counts: Counter[str] = Counter()
    until = time.monotonic() + options.limit_s
    try:
        while not _all_done(plan) and time.monotonic() < until:
            time.sleep(draw.expovariate(1 / options.every))
            victim = draw.choice(running)
            if victim.poll() is None:
                kind = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
                victim.send_signal(kind)
                counts[kind.name.lower()] += 1
                if kind == signal.SIGSTOP:
                    stopped.append((time.monotonic() + 2 * options.lease, victim))
            running.remove(victim)
            running.append(_worker(plan.path))
            for due, one in [pair for pair in stopped if pair[0] < time.monotonic()]:
                one.send_signal(signal.SIGCONT)
                running.append(one)
                stopped.remove((due, one))
    finally:
        for _, one in stopped:
            one.send_signal(signal.SIGCONT)
        for one in [*running, *(one for _, one in stopped)]:
            try:
                one.wait(120)
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()
    return dict(counts)


def _all_done(plan: Plan) -> bool:
    done = plan.folder / "done"
    return done.is_dir() and len(list(done.iterdir())) == len(plan.cells)


def _compare(alone: Plan, disturbed: Plan) -> dict[str, Any]:
    board = Board(disturbed.folder, 1)
    states = board.states([cell.id for cell in disturbed.cells])
    here, there = _numbers(alone), _numbers(disturbed)
    return {
        "done": sum(state.kind == "done" for state in states.values()),
        "attempts": sum(state.attempt + 1 for state in states.values()),
        "records": len(there),
        "left_over": len(list((disturbed.folder / "ready").iterdir())),
        "equal": here == there and bool(here),
    }


def _numbers(plan: Plan) -> dict[str, Any]:
    """Everything in the records that two equal runs share, by file name."""
    found: dict[str, Any] = {}
    for path in plan.results.rglob("*.json"):
        record = read_record(path)
        assert path.name not in found, f"two records of one cell: {path}"
        found[path.name] = (record.tasks, record.pool_hash, record.artifact_hashes, record.routing, record.cell)
    return found


if __name__ == "__main__":
    sys.exit(main())
