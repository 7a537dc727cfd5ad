"""Claims, leases and files of attempts: what happens to workers that die, come back, meet, or find the folder full."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dlplora.errors import ConfigError
from dlplora.matrix.board import Board, Lease, LostError, State
from dlplora.matrix.staging import Staging


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    def asked() -> float:
        raise AssertionError("the time of day was asked for")

    monkeypatch.setattr(time, "time", asked)  # it may be set, and differs between machines
    return Clock()


@pytest.fixture
def board(tmp_path: Path, clock: Clock) -> Board:
    return Board(tmp_path / "shared", 60.0, clock)


def taken(board: Board, cell: str = "a", attempt: int = 0, worker: str = "one") -> Lease:
    lease = board.claim(cell, attempt, worker)
    assert lease is not None
    return lease


def state(board: Board, cell: str = "a", *, look_for_dead: bool = False) -> State:
    return board.states([cell], look_for_dead=look_for_dead)[cell]


def test_many_workers_get_every_cell_once(tmp_path: Path) -> None:
    boards = [Board(tmp_path / "shared", 60.0) for _ in range(8)]

    def greedy(number: int) -> list[str]:
        return [cell for cell in (f"c{n}" for n in range(40)) if boards[number].claim(cell, 0, str(number)) is not None]

    with ThreadPoolExecutor(8) as pool:
        got = [cell for cells in pool.map(greedy, range(8)) for cell in cells]
    assert sorted(got) == sorted(f"c{n}" for n in range(40))
    assert not list((tmp_path / "shared").rglob(".*.tmp"))


def test_a_cell_from_free_to_done(board: Board) -> None:
    assert state(board) == State("free", 0)
    lease = taken(board)
    assert state(board) == State("running", 0)
    assert board.holder("a", 0) == "one"
    lease.finish({"attempt": 0, "moves": []})
    assert state(board).kind == "done"
    assert board.claim("a", 1, "late") is None
    assert taken(board, "b").release() is None
    assert state(board, "b") == State("free", 1)
    taken(board, "b", 1).fail("a reason\nof two lines")
    assert state(board, "b") == State("failed", 1)
    assert board.end_of("b", 1)["reason"] == "a reason of two lines"


def test_a_silent_worker_is_replaced_and_a_counting_one_is_not(board: Board, clock: Clock, tmp_path: Path) -> None:
    watcher = Board(tmp_path / "shared", 60.0, clock)
    lease = taken(board)
    for _ in range(5):
        assert state(watcher, look_for_dead=True) == State("running", 0)
        clock.now += 59
        lease.beat()
    assert state(watcher, look_for_dead=True).kind == "running"
    clock.now += 61
    assert state(watcher).kind == "running"  # nobody looked for dead ones
    assert state(watcher, look_for_dead=True) == State("free", 1)
    late = Board(tmp_path / "shared", 60.0, clock)
    assert state(late, look_for_dead=True).kind == "running"  # it has to see a lease pass itself
    clock.now -= 10_000
    assert state(late, look_for_dead=True).kind == "running"


def test_who_was_taken_for_dead_cannot_finish(board: Board, tmp_path: Path) -> None:
    lost, successor = taken(board), taken(Board(tmp_path / "shared", 60.0), attempt=1, worker="two")
    with pytest.raises(LostError, match="taken over by two"):
        lost.beat()
    with pytest.raises(LostError):
        lost.finish({})
    successor.finish({"attempt": 1, "moves": []})
    assert board.result("a")["worker"] == "two"
    with pytest.raises(LostError):
        successor.finish({})


@pytest.mark.parametrize("content", [b"", b'{"worker": "on', b"\xff\x00"])
def test_a_claim_that_was_cut_off_runs_out(board: Board, clock: Clock, content: bytes) -> None:
    (board.folder / "claims" / "a.0").write_bytes(content)
    assert state(board, look_for_dead=True) == State("running", 0)
    assert board.holder("a", 0) == "an unknown worker"
    clock.now += 61
    assert state(board, look_for_dead=True) == State("free", 1)
    (board.folder / "ended" / "a.0").write_bytes(content)
    assert state(board) == State("free", 1)
    (board.folder / "done" / "a").write_bytes(content)
    with pytest.raises(ConfigError, match="damaged; remove it"):
        board.result("a")


def test_file_systems_without_links_and_answers_that_get_lost(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def none(source: Any, target: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", none)
    assert board.claim("a", 0, "one") is not None
    assert board.claim("a", 0, "two") is None

    def answered_late(source: Any, target: Any) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "the second try finds the first one's link")

    monkeypatch.setattr(os, "link", answered_late)
    assert board.claim("b", 0, "one") is not None


def test_a_full_disk_leaves_no_claim(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = taken(board, "b")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        board.claim("a", 0, "one")
    assert str(caught.value.filename).endswith("claims/a.0")
    assert state(board) == State("free", 0)
    lease.beat()  # in place: needs no room


def test_the_heartbeat_says_when_the_cell_is_lost(tmp_path: Path) -> None:
    board = Board(tmp_path / "shared", 0.12)
    lease = taken(board)
    told: list[str] = []
    with lease.kept_alive(lambda: told.append("lost")):
        until = time.monotonic() + 10
        while board.counter("a", 0) < b"0000000000000003" and time.monotonic() < until:
            time.sleep(0.01)
        assert not told
        taken(board, attempt=1, worker="two")
        while not told and time.monotonic() < until:
            time.sleep(0.01)
    assert told == ["lost"]
    assert lease.lost == "taken over by two"


@pytest.fixture
def staging(board: Board) -> Staging:
    return Staging(board)


def filled(staging: Staging, lease: Lease, text: str) -> Path:
    folder = staging.begin(lease)
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "weights" / "w").write_text(text)
    (folder / "record.json").write_text(text)
    return folder


def moves(staging: Staging) -> list[tuple[str, str]]:
    return [("weights", "places/weights"), ("record.json", str(staging.folder / "results" / "record.json"))]


def published(staging: Staging) -> list[str]:
    return [(staging.folder / path).read_text() for path in ("places/weights/w", "results/record.json")]


def test_files_go_to_their_places_once(staging: Staging, board: Board) -> None:
    lease = taken(board)
    filled(staging, lease, "first")
    staging.finish(lease, moves(staging), {"seconds": 1.0})
    assert published(staging) == ["first", "first"]
    assert not list((staging.folder / "ready").iterdir())
    staging.publish_all({"a"})
    assert published(staging) == ["first", "first"]


def test_an_artifact_of_another_recipe_is_replaced(staging: Staging, board: Board) -> None:
    def artifact(attempt: int, recipe: str, text: str) -> None:
        lease = taken(board, attempt=attempt)
        folder = filled(staging, lease, text)
        (folder / "weights" / "recipe.json").write_text(json.dumps({"recipe_hash": recipe}))
        staging.finish(lease, moves(staging)[:1], {"seconds": 1.0})

    place = staging.folder / "places/weights"
    artifact(0, "old", "first")
    board.reopen("a")
    artifact(1, "old", "second")
    assert (place / "w").read_text() == "first"  # of the same recipe: what others may be reading stays
    board.reopen("a")
    artifact(2, "new", "third")
    assert (place / "w").read_text() == "third"
    assert [path.name for path in place.parent.iterdir()] == ["weights"]


def test_a_process_that_stood_still_after_its_claim_has_no_cell(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    beat = Lease.beat

    def overtaken(lease: Lease) -> None:
        if lease.worker == "one":
            assert board.claim("a", 1, "two") is not None
        beat(lease)

    monkeypatch.setattr(Lease, "beat", overtaken)
    assert board.claim("a", 0, "one") is None


@pytest.mark.parametrize("when", ["before the note", "after the note"])
def test_a_death_at_the_very_end_is_made_up_for(staging: Staging, board: Board, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    lease = taken(board)
    filled(staging, lease, "first")

    def killed(*arguments: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(*((lease, "finish", killed) if when == "before the note" else (staging, "publish", killed)))
        with pytest.raises(SystemExit):
            staging.finish(lease, moves(staging), {})
    if when == "before the note":
        assert staging.adopted(taken(board, attempt=1, worker="two"))
        assert board.result("a") | {"worker": ""} == {"worker": "", "attempt": 0, "moves": [list(move) for move in moves(staging)]}
    else:
        staging.publish_all({"a"})
    assert published(staging) == ["first", "first"]
    assert not list((staging.folder / "ready").iterdir())


def test_a_successor_resumes_and_the_lost_worker_writes_nowhere(staging: Staging, board: Board) -> None:
    lost = taken(board)
    folder = filled(staging, lost, "half")
    successor = taken(board, attempt=1, worker="two")
    own = staging.begin(successor)
    assert (own / "record.json").read_text() == "half"
    assert not folder.exists()
    (own / "record.json").unlink()  # as everything here is written: beside it, then renamed
    filled(staging, successor, "whole")
    staging.finish(successor, moves(staging), {})
    folder.mkdir()
    (folder / "record.json").write_text("of the dead")
    with pytest.raises(LostError):
        staging.finish(lost, moves(staging), {})
    assert published(staging) == ["whole", "whole"]


def test_two_that_finish_at_once_leave_one_result(staging: Staging, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first worker is past its last check when the second one takes the cell and finishes it."""
    first = taken(board)
    filled(staging, first, "first")
    check: Callable[[], None] = first.check
    monkeypatch.setattr(first, "check", lambda: None)
    second = taken(board, attempt=1, worker="two")
    filled(staging, second, "second")
    staging.finish(second, moves(staging), {})
    (staging.folder / "stage" / first.name).mkdir()
    with pytest.raises(LostError):
        staging.finish(first, moves(staging), {})
    with pytest.raises(LostError):
        check()
    staging.publish_all({"a"})
    assert published(staging) == ["second", "second"]
    assert not list((staging.folder / "ready").iterdir())
