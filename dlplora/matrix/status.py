"""The status of a plan, as text."""

from __future__ import annotations

import os
import statistics
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dlplora.errors import ConfigError
from dlplora.matrix.board import BEATS, CLAIMS, Board, State
from dlplora.matrix.plan import Cell, Plan
from dlplora.progress import duration


def lines(plan: Plan) -> Iterator[str]:
    """Cells done, running where, failed and why, and the time left. Reads only, but for one empty file that tells the folder's time."""
    if not (plan.folder / CLAIMS).is_dir():
        yield f"{len(plan.cells)} cells, none begun: dlplora matrix work {plan.path}"
        return
    board = Board(plan.folder, plan.header.request.lease_s)
    states = board.states([cell.id for cell in plan.cells])
    kinds = [state.kind for state in states.values()]
    blocked = _blocked(plan, states)
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("done", "running", "failed"))
    yield f"{len(plan.cells)} cells: {counts}, {len(blocked)} wait for a failed one, {kinds.count('free') - len(blocked)} to do"
    now = folder_time(plan.folder)
    for cell in plan.cells:
        state = states[cell.id]
        if state.kind == "running":
            yield f"  running: {cell.label}: {board.holder(cell.id, state.attempt)}{_silence(board, cell, state, now)}"
    for cell in plan.cells:
        state = states[cell.id]
        if state.kind == "failed":
            yield f"  failed: {cell.label}: {board.end_of(cell.id, state.attempt).get('reason', 'unknown')}"
    yield time_left(plan, states, _results(board, plan, states), blocked)


def _results(board: Board, plan: Plan, states: Mapping[str, State]) -> dict[str, dict[str, Any]]:
    found = {}
    for cell in plan.cells:
        if states[cell.id].kind == "done":
            try:
                found[cell.id] = board.result(cell.id)
            except ConfigError:
                continue  # the next worker says so
    return found


def _blocked(plan: Plan, states: Mapping[str, State]) -> set[str]:
    """Cells that need a failed one, themselves or through others."""
    bad = {cell for cell, state in states.items() if state.kind == "failed"}
    found: set[str] = set()
    for cell in plan.cells:
        if states[cell.id].kind == "free" and not bad.isdisjoint(cell.after):
            bad.add(cell.id)
            found.add(cell.id)
    return found


def folder_time(folder: Path) -> float | None:
    """The clock of the folder's own machine, as it stamps files, s; None if nothing can be written."""
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        probe.touch()
        stamp = probe.stat().st_mtime
        os.unlink(probe)
    except OSError:
        return None
    return stamp


def _silence(board: Board, cell: Cell, state: State, now: float | None) -> str:
    """How long the holder has been silent, where that is remarkable; by two stamps of one clock."""
    try:
        last = (board.folder / BEATS / f"{cell.id}.{state.attempt}").stat().st_mtime
    except FileNotFoundError:
        return ""
    silent = 0.0 if now is None else now - last
    return f" (silent for {duration(silent)}; taken over when a worker is idle)" if silent > board.lease_s else ""


def time_left(plan: Plan, states: Mapping[str, State], results: Mapping[str, Mapping[str, Any]], blocked: set[str]) -> str:
    """The work that is left, by the median of finished cells of a kind, else by the prediction."""
    took: dict[tuple[str, str], list[float]] = {}
    for cell in plan.cells:
        result = results.get(cell.id, {})
        if "seconds" in result and not result.get("reused"):
            took.setdefault((cell.profile, cell.kind), []).append(float(result["seconds"]))
    left, unknown = 0.0, 0
    for cell in plan.cells:
        if states[cell.id].kind not in {"free", "running"} or cell.id in blocked:
            continue
        if (cell.profile, cell.kind) in took:
            left += statistics.median(took[cell.profile, cell.kind])
        elif cell.minutes is not None:
            left += 60 * cell.minutes
        else:
            unknown += 1
    workers = max(1, sum(state.kind == "running" for state in states.values()))
    if unknown:
        return f"time left: unknown for {unknown} cells; the others {duration(left)} of one worker"
    return f"time left: {duration(left)} of one worker, about {duration(left / workers)} with {workers}"
