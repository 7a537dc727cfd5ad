"""What a benchmark knows of its machine: contention and bandwidth."""

from __future__ import annotations

import pytest
import torch

from dlplora.bench.hardware import ContentionMonitor, measure_bandwidth

CPU = torch.device("cpu")


def test_a_busy_machine_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (64.0, 1.0, 1.0))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    times = iter([(0.0, 100.0, 10.0), (10.0, 134.0, 16.0)])  # 34 s of work in 10 s of four cores, 6 of them ours
    monkeypatch.setattr(ContentionMonitor, "_times", lambda self: next(times))
    watch = ContentionMonitor(CPU)
    assert watch.warnings() == [
        "load average 64.0 on 4 cores at the start",
        "other processes used 70 % of 4 cores during the measurement",
    ]


def test_a_quiet_machine_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.5, 1.0, 1.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    times = iter([(0.0, 100.0, 10.0), (10.0, 120.0, 29.5)])
    monkeypatch.setattr(ContentionMonitor, "_times", lambda self: next(times))
    assert ContentionMonitor(CPU).warnings() == []


def test_bandwidth_counts_reading_and_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.5, 0.25, 1.0])
    monkeypatch.setattr("dlplora.bench.hardware.time_call", lambda call, device: next(times))
    assert measure_bandwidth(CPU, nbytes=1000, repeats=3) == 2 * 1000 / 0.25
