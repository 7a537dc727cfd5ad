"""Files replaced whole: after an error or a kill at any moment, the old file or the new one is there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dlplora.atomic import replacing, write_atomically, write_json

KILLED_INSIDE = """
import os, signal, sys
from pathlib import Path
from dlplora.atomic import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half a rec")
    os.kill(os.getpid(), signal.SIGKILL)
"""
WRITES_FOR_EVER = """
import sys
from pathlib import Path
from dlplora.atomic import write_atomically
path, number = Path(sys.argv[1]), 0
while True:
    number += 1
    write_atomically(path, str(number % 10) * 2_000_000)
    if number == 3:
        print("going", flush=True)
"""


@pytest.mark.parametrize("before", ["old", None])
def test_a_process_killed_while_writing_leaves_the_old_file_or_none(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "record.json"
    if before is not None:
        path.write_text(before)
    done = subprocess.run([sys.executable, "-c", KILLED_INSIDE, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert (path.read_text() if path.exists() else None) == before
    assert [found for found in tmp_path.glob("*.json") if found != path] == []  # what is left has no name that a reader would read


def test_a_process_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    process = subprocess.Popen([sys.executable, "-c", WRITES_FOR_EVER, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"going\n"
    process.kill()
    process.wait()
    text = path.read_text()
    assert len(text) == 2_000_000
    assert set(text) == {text[0]}


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": "ä"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "ä"\n}\n'
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(str(1 / 0))
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": "ä"}
    assert list(path.parent.iterdir()) == [path]
