"""A folder with one sound document of every kind that a command reads, and commands run in it with the outcome that is expected of them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dlplora.config import configs_root
from tests.toy_tasks import write_tasks

SECRET = "hunter2-is-secret"
LIMIT_S = 10
"""No command that is refused takes longer."""
EXECUTED = "EXECUTED"
"""The file that code in a document would make."""
ERROR = re.compile(r"^((dlplora|lightning)( [\w-]+)*: )?error: ")
FAILED_RECORD = re.compile(r"/out(/scratch(/.*)?)?$")


class TooLongError(BaseException):
    """A command ran into ``LIMIT_S``. No ``Exception``, so that nothing on its way catches it."""


def make_workplace(root: Path) -> Path:
    """Write the documents into an empty folder."""
    from dlplora.adapters.pool import write_manifest
    from dlplora.inference.loading import nano_asset
    from dlplora.testing import tiny

    setup = tiny.tiny_setup(root / "made")
    setup.model.save_pretrained(root / "model")
    setup.tokenizer.save_pretrained(root / "model")
    for name in ("alpha", "beta", "gamma"):
        shutil.copytree(setup.pool / name, root / "pool" / name)
    shutil.copytree(setup.pool / "alpha", root / "delta")
    shutil.rmtree(root / "made")
    for readme in root.rglob("README.md"):
        readme.unlink()
    write_manifest(root / "pool", ["alpha", "beta", "gamma"], None)
    shutil.copytree(nano_asset("router"), root / "router")
    shutil.copytree(nano_asset("trained") / "mole", root / "mole")
    write_tasks(root / "rows", num_train=8, num_test=4)
    for old, new in (("colors", "alpha"), ("pets", "beta"), ("echo", "gamma")):
        (root / "rows" / old).rename(root / "rows" / new)
    _write_configurations(root)
    _write_results(root / "results")
    return root


def _write_configurations(root: Path) -> None:
    protocol = {
        "suite": "local:all",
        "data_root": "rows",
        "backbone": "model",
        "dtype": "float32",
        "batch_size": 4,
        "seeds": [0],
        "tasks": ["alpha"],
    }
    (root / "protocol.yaml").write_text(yaml.safe_dump(protocol))
    (root / "method.yaml").write_text((configs_root() / "method" / "dlp.yaml").read_text())
    (root / "average.yaml").write_text((configs_root() / "method" / "avg_delta.yaml").read_text())
    bench = {
        "shape": "tiny",
        "groups": {"g": {"systems": ["base", "dlp"], "experts": [2], "prompt": [4], "new_tokens": 2, "repeats": 2, "warmup": 0}},
    }
    (root / "bench.yaml").write_text(yaml.safe_dump(bench))
    for name in ("expert", "router"):
        content = yaml.safe_load((configs_root() / "train" / f"{name}.yaml").read_text())
        content["trainer"] |= {"max_epochs": 1, "logger": False, "default_root_dir": f"fits/{name}"}
        content["model"]["init_args"] |= {"backbone": "model", "export_folder": f"fits/{name}_export"}
        content["data"]["init_args"] |= {"suite": "local:all", "data_root": "rows", "batch_size": 2, "num_train": 8}
        if name == "expert":
            content["data"]["init_args"] |= {"tasks": "alpha", "num_steps": 2, "num_validation": 2}
        else:
            content["data"]["init_args"] |= {"num_validation": 2, "num_test": 2}
            content["model"]["init_args"]["router"] = {"variant": "table", "table_rows": 64, "table_width": 4}
        (root / f"fit_{name}.yaml").write_text(yaml.safe_dump(content))


def _write_results(root: Path) -> None:
    """Two small records with outcomes, as an evaluation writes them."""
    from tests.unit.test_comparison import saved

    for name in ("dlp", "base"):
        saved(root, name, {"a": 0.9, "b": 0.9, "g": 0.8})


def contents(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, and folders; lock files stay where a pool was locked."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders:
            found[os.path.join(folder, name)] = (-1, -1)
        for name in files:
            if name != ".lock":
                stat = os.lstat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = (stat.st_size, stat.st_mtime_ns)
    return found


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: Any
    out: str
    err: str
    seconds: float
    """Of this process's CPU: other processes may keep the machine busy."""
    written: tuple[str, ...]
    """Files and folders that are new, changed, or gone."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TooLongError`` in the block when it takes longer."""

    def stop(*_: Any) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(command: Callable[[Sequence[str]], int], arguments: Sequence[str], root: Path, limit: float = 6 * LIMIT_S) -> Outcome:
    """Run a command in this process with the workplace as working folder. An exception that leaves it is the code.

    Args:
        command: ``main`` of one of our commands.
        arguments: Its arguments.
        root: The workplace.
        limit: Seconds until it is stopped.
    """
    before, place = contents(root), Path.cwd()
    out, err = io.StringIO(), io.StringIO()
    start = time.process_time()
    os.chdir(root)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(), time_limit(limit):
            warnings.simplefilter("ignore")
            try:
                code: Any = command(list(arguments))
            except SystemExit as end:
                code = end.code
    except TooLongError:
        code = "too long"
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        code = f"{type(error).__name__}: {error}"
        err.write("".join(traceback.format_exception(error)))
    finally:
        os.chdir(place)
    seconds = time.process_time() - start
    after = contents(root)
    written = sorted({*before.items()} ^ {*after.items()})
    return Outcome(code, out.getvalue(), err.getvalue(), seconds, tuple(dict.fromkeys(path for path, _ in written)))


def complaint(outcome: Outcome, *, must_fail: bool, may_write: bool = False, codes: Sequence[int] = (2,)) -> str | None:
    """What is wrong with an outcome: None if it is the one that is expected.

    Args:
        outcome: Of a command with a malformed input.
        must_fail: Whether the input cannot be sound. A random mutation may be.
        may_write: Whether the command may write even though it fails: a report of what is sound.
        codes: Exit codes of a refusal.
    """
    said = outcome.out + outcome.err
    if SECRET in said:
        return "prints a secret"
    if any(Path(path).name.startswith(EXECUTED) for path in outcome.written):
        return "executes its input"
    if not isinstance(outcome.code, int):
        return f"ends with {outcome.code}"
    if "Traceback" in said:
        return "prints a traceback"
    if outcome.code == 0:
        return "accepts it" if must_fail else None
    if outcome.code not in codes:
        return f"ends with code {outcome.code}"
    errors = [line for line in outcome.err.splitlines() if ERROR.search(line)]
    if not errors:
        return "says no error"
    if len(errors) > 1 and codes == (2,):
        return f"says {len(errors)} errors"
    if len(errors[0]) > 1_600:
        return f"says an error of {len(errors[0])} characters"
    # an evaluation that fails after it has begun leaves a record of the failure
    written = [path for path in outcome.written if not FAILED_RECORD.search(path)]
    if not may_write and written:
        return f"writes {written}"
    return f"takes {outcome.seconds:.0f} s" if outcome.seconds > LIMIT_S else None


def quiet_environment() -> None:
    """A secret to look for, and no hub."""
    os.environ["DLPLORA_SECRET"] = SECRET
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.stdout.flush()


def restore(root: Path, sound: Path, paths: Sequence[str]) -> None:
    """Make files and folders of a workplace what they are in its copy ``sound``."""
    for path in map(Path, paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path in map(Path, paths):
        source = sound / path.relative_to(root)
        if source.is_dir():
            shutil.copytree(source, path, dirs_exist_ok=True)
        elif source.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, path)
