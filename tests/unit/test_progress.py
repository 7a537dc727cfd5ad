"""Progress in a pipe, on a terminal, and its arithmetic."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from dlplora import progress as module
from dlplora.progress import Progress, duration

COUNT = """
import sys, time
from dlplora.progress import Progress
with Progress("fit", 40, interval_s=0.3) as progress:
    for _ in range(4):
        time.sleep(0.1)
        progress.update(5)
    time.sleep(float(sys.argv[1]))
    progress.update(20)
"""


def test_a_pipe_gets_flushed_lines_also_while_a_step_hangs() -> None:
    """Every line must be readable before the process goes on, the start at once, and the later ones without any step."""
    process = subprocess.Popen([sys.executable, "-c", COUNT, "1.5"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    first = process.stderr.readline()
    assert process.poll() is None
    assert first == "fit: started, 40 steps\n"
    begun = time.monotonic()
    lines = [process.stderr.readline() for _ in range(4)]
    assert process.poll() is None  # nothing was held back until the end
    assert time.monotonic() - begun < 1.9
    rest = process.stderr.read().splitlines()
    assert process.wait() == 0
    shown = re.compile(r"fit: (5|10|15|20)/40 steps, [\d.]+ steps/s, \d+:\d\d left\n")
    assert all(shown.fullmatch(line) for line in lines), lines
    assert lines[-1].startswith("fit: 20/40 steps")
    assert re.fullmatch(r"fit: 40 steps in 0:0\d", rest[-1])


def test_the_reader_may_go_away() -> None:
    process = subprocess.Popen([sys.executable, "-c", COUNT, "0.5"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()
    process.stderr.close()
    assert process.wait() == 0


def test_a_terminal_gets_one_line_that_is_drawn_again() -> None:
    parent, child = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", COUNT, "0.5"], stderr=child)
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:  # the terminal is closed once the process has ended
            break
        if not part:
            break
        shown += part
    os.close(parent)
    assert process.wait() == 0
    frames = shown.decode().split("\r\x1b[K")
    bars = [frame for frame in frames if frame.startswith("[")]
    assert any(frame.startswith("[##########..........] fit: 20/40 steps") for frame in bars)
    assert all("\n" not in frame for frame in bars)
    assert re.fullmatch(r"fit: 40 steps in 0:0\d\r?\n", frames[-1])


def test_rate_and_time_left_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 of 100 steps, 10 of them by an earlier run, in 4 s: 5 a second, and 70 more take 14 s."""
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    progress = Progress("fit", 100, done=10, stream=io.StringIO())
    now = 104.0
    assert progress.line() == "fit: 0:04 so far"
    progress.update(20)
    progress.note = "train_loss 0.5000"
    assert progress.line() == "fit: 30/100 steps, 5 steps/s, 0:14 left, train_loss 0.5000"


def test_phases_count_for_themselves() -> None:
    stream = io.StringIO()
    with Progress("dlp", unit="request", brief=True, stream=stream) as progress:
        with progress.phase(total=8, desc="loglikelihood", disable=False) as part:
            part.update(4)
            assert progress.line().startswith("dlp, loglikelihood: 4/8 requests, ")
        assert progress.line() == "dlp: 0:00 so far"
    assert stream.getvalue() == ""


def test_an_error_is_left_to_its_message() -> None:
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), Progress("fit", 2, stream=stream):
        raise ZeroDivisionError
    assert stream.getvalue() == "fit: started, 2 steps\n"


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 3599.4, 3725)] == ["0:00", "1:00", "59:59", "1:02:05"]
