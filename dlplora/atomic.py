"""Atomic writes: a file is written under another name in the same folder, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file to write in the block; it replaces ``path`` when the block ends. After an error the old file remains.

    A process killed at any moment leaves the old file or the new one, at worst with an unused ``.NAME.*.tmp`` next to it.

    Args:
        path: Its folder is made if it does not exist.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are their owner's alone
        os.replace(temporary, path)
    except BaseException as error:
        _name(error, path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _name(error: BaseException, path: Path) -> None:
    """Adds the path to errors that name no file, such as a full disk."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, operating system errors that name no file name ``path``."""
    try:
        yield
    except OSError as error:
        _name(error, Path(path))
        raise


@contextlib.contextmanager
def tensors_written_to(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, what safetensors cannot write is an ``OSError`` that names ``path``."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, " ".join(str(error).split()), str(path)) from error


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """``tokenizer.save_pretrained``, where a full disk is an ``OSError``.

    The library under fast tokenizers raises a bare ``Exception``, so its file is written here first.
    """
    folder = Path(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def filling(folder: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """A temporary folder to write in the block; its files move to ``folder`` when the block ends. An error changes nothing.

    A new folder is written atomically. In an existing one the old ``marker`` is removed first and the new one written last, so a process
    killed in between leaves a folder without a marker, never a mixture that looks complete; other files in it stay.

    Args:
        folder: Its parent is made if it does not exist.
        marker: The file without which the folder does not count.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's folders are their owner's alone
        if not folder.exists():
            os.replace(temporary, folder)
            return
        (folder / marker).unlink(missing_ok=True)
        files = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
        for file in sorted(files, key=lambda file: file == Path(marker)):
            (folder / file).parent.mkdir(exist_ok=True)
            os.replace(temporary / file, folder / file)
    except OSError as error:
        _name(error, folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that a reader sees the old file or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_together(files: Mapping[Path, str]) -> None:
    """Write text files one by one, each as ``write_atomically`` does; an error removes those that did not exist before."""
    new = [path for path in files if not path.exists()]
    try:
        for path, text in files.items():
            write_atomically(path, text)
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON as ``write_atomically`` does."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
