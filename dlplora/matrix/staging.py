"""Files of an attempt until the attempt counts, and how they are moved into place: each by one rename or link.

An attempt writes into a folder of its own, ``stage/CELL.N``. When it is finished the folder moves to ``ready/CELL.N``, the board notes that
the cell is done and which attempt counts, and the files are moved into place. If a worker dies in between, any other worker can continue. A
successor renames an unfinished folder to its own name, resume files included, so a worker that was taken for dead and still writes has lost
its folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlplora.atomic import write_json
from dlplora.documents import read_json
from dlplora.errors import ConfigError
from dlplora.matrix.board import Board, Lease, LostError
from dlplora.reproduce.artifacts import RECIPE

STAGE, READY = "stage", "ready"
Moves = Sequence[tuple[str, str]]
"""Path in the attempt's folder -> place; in this order, each at most once."""


class Staging:
    """The folders of attempts.

    Args:
        board: Says which attempts count.
    """

    def __init__(self, board: Board) -> None:
        self.board, self.folder = board, board.folder
        for name in (STAGE, READY):
            (self.folder / name).mkdir(exist_ok=True)

    def begin(self, lease: Lease) -> Path:
        """The attempt's folder, with what an earlier attempt left to resume from."""
        own = self.folder / STAGE / lease.name
        for attempt in range(lease.attempt - 1, -1, -1):
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.folder / STAGE / f"{lease.cell}.{attempt}", own)
                break
        own.mkdir(exist_ok=True)
        return own

    def adopted(self, lease: Lease) -> bool:
        """Whether an earlier attempt had everything ready and only the last notes were missing; they are written now."""
        for attempt in range(lease.attempt - 1, -1, -1):
            note = self.folder / READY / f"{lease.cell}.{attempt}.json"
            if note.is_file() and note.with_suffix("").is_dir():
                lease.finish(read_json(note))
                self.publish(lease.cell)
                return True
        return False

    def finish(self, lease: Lease, moves: Moves, facts: dict[str, Any]) -> None:
        """Make the attempt's files the cell's.

        Raises:
            LostError: If another worker has the cell; its files stay where they are and are not read.
        """
        lease.check()
        result = {"attempt": lease.attempt, "moves": [list(move) for move in moves], **facts}
        ready = self.folder / READY / lease.name
        write_json(Path(f"{ready}.json"), result)
        try:
            os.rename(self.folder / STAGE / lease.name, ready)
        except FileNotFoundError as error:
            raise LostError("taken over by another worker") from error
        lease.finish(result)
        self.publish(lease.cell)

    def is_there(self, cell: str) -> bool:
        """Whether everything that a finished cell has made is in its place; so is what a cell has found finished."""
        result = self.board.result(cell)
        places = [place for _, place in result.get("moves", ())]
        places += [str(result["record"])] if result.get("record") else []
        return all(self._place(place).exists() for place in places)

    def _place(self, place: str) -> Path:
        return Path(place) if Path(place).is_absolute() else self.folder / place

    def publish(self, cell: str) -> None:
        """Move the files of a finished cell to their places; any worker may do it, several at once and again.

        Raises:
            ConfigError: If a file is neither ready nor in its place.
        """
        result = self.board.result(cell)
        ready = self.folder / READY / f"{cell}.{result['attempt']}"
        for inside, place in result["moves"]:
            source, target = ready / inside, self._place(place)
            if _of_another_recipe(source, target):
                old = target.parent / f".{target.name}.{os.getpid()}.old"
                with contextlib.suppress(OSError):  # another worker may replace it at the same time
                    os.rename(target, old)
                shutil.rmtree(old, ignore_errors=True)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(OSError):
                    os.rename(source, target) if source.is_dir() else os.link(source, target)
            if not target.exists():
                _copy_without_links(source, target)
        second = (self.folder / STAGE).glob(f"{cell}.*")  # later attempts may still write here
        for left in (*(self.folder / READY).glob(f"{cell}.*"), *second):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def publish_all(self, done: set[str]) -> None:
        """Move the files of workers that died between finishing a cell and moving its files."""
        for cell in {entry.name.strip(".").split(".")[0] for entry in os.scandir(self.folder / READY)} & done:
            self.publish(cell)

    def discard(self, lease: Lease) -> None:
        """Remove the files of a failed attempt."""
        shutil.rmtree(self.folder / STAGE / lease.name, ignore_errors=True)


def _of_another_recipe(source: Path, target: Path) -> bool:
    """Whether a new artifact takes the place of one that was trained by another recipe."""
    try:
        return bool(read_json(source / RECIPE)["recipe_hash"] != read_json(target / RECIPE)["recipe_hash"])
    except (ConfigError, OSError, KeyError):
        return False


def _copy_without_links(source: Path, target: Path) -> None:
    """A file system without hard links, or two of them."""
    if not source.exists():
        raise ConfigError(f"{target} is neither there nor ready in {source.parent}; was it removed? Plan again with another --out.")
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    if source.is_dir():
        shutil.copytree(source, temporary, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
