"""Add an adapter to a pool. Everything is checked before anything is written; a failure leaves the pool unchanged."""

from __future__ import annotations

import glob
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dlplora.adapters.config import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, base_name, load_config, other_bases, read_config, same_base
from dlplora.adapters.files import file_sha256
from dlplora.adapters.headers import AdapterHeader, read_header
from dlplora.adapters.hub import AdapterSource, find_adapter, find_pool
from dlplora.adapters.pool import Pool, load_pool, manifest_row, save_rows
from dlplora.errors import AdapterError, IncompatibleAdapterError, PoolError, UnsafeFileError

_NAME = re.compile(r"\w[\w.-]*")
LOCK_NAME = ".lock"
"""Lock file of the pool. It is never removed, because waiting processes need it; readers ignore hidden files."""
_ATTEMPTS = 1000
"""Attempts to create a pool while other processes remove its parent folders."""


def add_adapter(
    folder: str | Path,
    adapter: str | Path,
    name: str | None = None,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    offline: bool = False,
    allow_other_base: bool = False,
    description: str | None = None,
) -> Pool:
    """Check a PEFT folder, copy it into a pool and list it in the manifest.

    Args:
        folder: The pool, made if it does not exist; see ``find_pool`` for bare names.
        adapter: PEFT folder or hub id; see ``find_adapter``. A folder inside the pool is listed without a copy.
        name: Name of the expert; None takes the folder's, or the repository's.
        revision, offline: Of a hub id.
        allow_pickle: Convert ``adapter_model.bin`` (read with ``weights_only=True``) if there is no safetensors file.
        allow_other_base: Take an adapter that names another base model than the others, if its sizes fit.
        description: What it is for, in a few words; replaces the description of an adapter that is already listed.

    Raises:
        PoolError: If the name is taken or cannot name a folder, or the adapter is not found.
        IncompatibleAdapterError: If it was made for another base model than the adapters in the pool.
        AdapterError: If it cannot be fused. Nothing is written after any error.
    """
    options: dict[str, Any] = {"revision": revision, "allow_pickle": allow_pickle, "offline": offline, "allow_other_base": allow_other_base}
    return place_adapter(folder, adapter, name, description=description, **options).pool


@dataclass(frozen=True, slots=True)
class Addition:
    """Result of an addition.

    Attributes:
        pool: The pool after the addition.
        name: The adapter's name in it.
        was_there: Whether the pool listed an adapter of that name with the same files before; then nothing was written.
    """

    pool: Pool
    name: str
    was_there: bool


def place_adapter(
    folder: str | Path,
    adapter: str | Path,
    name: str | None = None,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    offline: bool = False,
    allow_other_base: bool = False,
    description: str | None = None,
) -> Addition:
    """As ``add_adapter``, with the same arguments; also says whether the adapter was there already."""
    root = find_pool(folder)
    found = find_adapter(adapter, revision=revision, offline=offline, with_pickle=allow_pickle)
    name = name or found.name
    if not _NAME.fullmatch(name):
        raise PoolError(f"'{name}' cannot name an adapter: use letters, digits, '_', '-' and '.', beginning with a letter or digit.")
    if root.is_symlink() and not root.exists():
        raise PoolError(f"cannot make the folder {root}: it is a broken symbolic link.")
    if root.exists() and not root.is_dir():
        raise PoolError(f"{root} is a file; a pool is a folder.")
    options: dict[str, Any] = {"allow_pickle": allow_pickle, "allow_other_base": allow_other_base, "description": description}
    with ExitStack() as made:
        if _new_pool(root, found, name, made, options):
            was_there = False
        else:
            with FileLock(root / LOCK_NAME), ExitStack() as undo:
                _remove_leftovers(root)
                was_there = _add(root, root, found, name, undo, **options)
                undo.pop_all()
        made.pop_all()
    return Addition(load_pool(root), name, was_there)


def _new_pool(root: Path, found: AdapterSource, name: str, made: ExitStack, options: Mapping[str, Any]) -> bool:
    """Make a pool with one adapter under a hidden name and rename it when it is complete; False if the pool exists."""
    for _ in range(_ATTEMPTS):  # a failing addition may remove parent folders that this one needs
        _remove_abandoned(root)
        if root.is_dir():
            return False
        hidden = root.with_name(f".{root.name}.{secrets.token_hex(4)}.tmp")
        lock = FileLock(hidden / LOCK_NAME, timeout=0)
        try:
            _make_folder(root.parent, made)
            hidden.mkdir()
            held = lock.acquire()
        except (FileNotFoundError, FileExistsError, Timeout):  # another addition removed the folder before this one held its lock
            continue
        with held, ExitStack() as undo:
            undo.callback(shutil.rmtree, hidden, ignore_errors=True)
            _add(root, hidden, found, name, undo, **options)
            try:
                os.replace(hidden, root)
            except OSError:
                if root.is_dir():
                    return False
                raise
            undo.pop_all()
            return True
    raise PoolError(f"cannot create the folder {root}: it keeps disappearing; check for a broken symlink.")


def _remove_abandoned(root: Path) -> None:
    """Remove unfinished new pools whose lock no process holds."""
    # glob.glob returns nothing if the parent disappears meanwhile; Path.glob of Python before 3.13 raises.
    for hidden in glob.glob(f".{glob.escape(root.name)}.*.tmp", root_dir=root.parent, include_hidden=True):
        folder = root.parent / hidden
        with suppress(OSError, Timeout), FileLock(folder / LOCK_NAME, timeout=0):  # its owner, or another addition, may remove it first
            shutil.rmtree(folder)


def _remove_leftovers(root: Path) -> None:
    """Remove what a killed addition left in the pool; the caller holds the lock."""
    for path in root.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _add(
    root: Path,
    current: Path,
    found: AdapterSource,
    name: str,
    undo: ExitStack,
    *,
    allow_pickle: bool,
    allow_other_base: bool,
    description: str | None,
) -> bool:
    """Everything that happens while the pool is locked; ``undo`` takes back what was written. True if there was nothing to do.

    The adapter's folder comes first and the manifest second; an addition that was killed between the two is completed by the next one
    of the same files. ``current`` is the folder that holds the pool now; for a new pool that is not yet ``root``.
    """
    pool = load_pool(current) if any(path for path in current.iterdir() if not path.name.startswith(".")) else None
    in_place = found.folder.resolve() == (root / name).resolve()
    known = () if pool is None else tuple(listed for listed in pool.names if pool.folders[listed].resolve() != found.folder.resolve())
    pickled = _pickled(found.folder)
    if pickled and not allow_pickle:
        read_header(found.folder, name)  # says why it is refused
    ready = _converted(found.folder, name, current, undo) if pickled else found.folder
    there = not in_place and (root / name).exists()
    if there or name in known:
        if not _same_files(ready, pool.folders[name] if pool is not None and name in known else root / name):
            if name in known:
                raise PoolError(f"pool {root} already has an adapter '{name}'. Pass another --name.")
            raise PoolError(f"{root / name} exists and is not listed in the pool; move it away or pass another --name.")
        if pool is not None and name in pool.rows:
            _remove_hidden(ready, found.folder)
            if description:
                _describe(current, pool, name, description)
            return True
        known = tuple(listed for listed in known if listed != name)
    other = _check_base(read_header(ready, name), pool, known, allow_other_base)
    extra: dict[str, Any] = {"other_base_allowed": True} if other else {}
    extra |= {**({"converted_from": PICKLE_NAME} if pickled else {}), **({"description": description} if description else {})}
    row = _checked_row(found, ready, name, extra)
    kept = () if pool is None else [_kept_row(pool, listed) for listed in known]
    if there:
        _remove_hidden(ready, found.folder)
    elif not in_place:
        _move(ready if pickled else _copied(found.folder, name, current, undo), current / name, undo)
    elif pickled:
        _move_weights(ready, root / name, undo)
    save_rows(current, [*kept, row], None if pool is None else pool.base_model)
    return False


def _describe(current: Path, pool: Pool, name: str, description: str) -> None:
    """Write another description of an adapter that is listed."""
    rows = [{**row, "description": description} if listed == name else row for listed, row in pool.rows.items()]
    save_rows(current, rows, pool.base_model)


def _same_files(ready: Path, there: Path) -> bool:
    """Whether two adapter folders hold the same configuration and weights."""
    files = [(ready / file, there / file) for file in (CONFIG_NAME, WEIGHTS_NAME)]
    return all(mine.is_file() and other.is_file() and file_sha256(mine) == file_sha256(other) for mine, other in files)


def _remove_hidden(ready: Path, source: Path) -> None:
    """Remove the converted copy of an adapter that is not moved into the pool."""
    if ready != source:
        shutil.rmtree(ready)


def _checked_row(found: AdapterSource, ready: Path, name: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's row; errors in converted weights name the file that was converted."""
    try:
        return manifest_row(ready, name, source=found.source, revision=found.revision, extra=extra)
    except AdapterError as error:
        text = str(error).replace(str(ready / WEIGHTS_NAME), str(found.folder / PICKLE_NAME)) if ready != found.folder else str(error)
        raise type(error)(text) from error


def _pickled(folder: Path) -> bool:
    return not (folder / WEIGHTS_NAME).is_file() and (folder / PICKLE_NAME).is_file()


def _make_folder(folder: Path, undo: ExitStack) -> None:
    """Make a folder and its missing parents.

    Raises:
        FileNotFoundError: If one of them was removed meanwhile.
    """
    for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        try:
            path.mkdir()
        except FileExistsError:  # made by another addition, which removes it
            continue
        undo.callback(_remove_if_empty, path)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # another process has put something there, or has removed it
        folder.rmdir()


def _hidden(root: Path, name: str, undo: ExitStack) -> Path:
    """An empty folder of the pool that no reader looks into."""
    folder = root / f".{name}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    undo.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _copied(source: Path, name: str, root: Path, undo: ExitStack) -> Path:
    """The two files that matter, in a hidden folder."""
    folder = _hidden(root, name, undo)
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        shutil.copyfile(source / file, folder / file)
    return folder


def _converted(source: Path, name: str, root: Path, undo: ExitStack) -> Path:
    """Configuration and converted weights of a pickled adapter, in a hidden folder."""
    read_config(source, name)
    folder = _hidden(root, name, undo)
    shutil.copyfile(source / CONFIG_NAME, folder / CONFIG_NAME)
    convert_pickle(source / PICKLE_NAME, folder / WEIGHTS_NAME)
    return folder


def _move(ready: Path, target: Path, undo: ExitStack) -> None:
    os.replace(ready, target)
    undo.callback(shutil.rmtree, target, ignore_errors=True)


def _move_weights(ready: Path, target: Path, undo: ExitStack) -> None:
    """Write converted weights next to the pickle of a folder that is already in the pool."""
    undo.callback((target / WEIGHTS_NAME).unlink, missing_ok=True)
    os.replace(ready / WEIGHTS_NAME, target / WEIGHTS_NAME)
    shutil.rmtree(ready)


def _kept_row(pool: Pool, name: str) -> Mapping[str, Any]:
    """The manifest's row unchanged; a new one for a folder without a manifest."""
    return pool.rows[name] if name in pool.rows else manifest_row(pool.folders[name], name)


def convert_pickle(source: Path, target: Path) -> None:
    """Rewrite pickled weights as safetensors. Only tensors are unpickled (``weights_only=True``); no code of the file runs.

    Raises:
        UnsafeFileError: If the file holds anything but tensors by name.
    """
    import pickle

    import torch

    from dlplora.adapters.files import write_tensors

    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        reason = str(error).split("\n")[0][:160]
        raise UnsafeFileError(f"{source} is not a plain file of tensors and is not read: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UnsafeFileError(f"{source} must hold tensors by name, found {type(content).__name__}; it is not read.")
    write_tensors(target, {str(key): value.detach().clone().contiguous() for key, value in content.items()})


def _check_base(header: AdapterHeader, pool: Pool | None, known: tuple[str, ...], allowed: bool) -> bool:
    """Compare sizes and base names with the adapters in the pool; True if an exception for the name was used."""
    mine, differs = base_name(header.config), False
    for name in known:
        assert pool is not None
        other = read_header(pool.folders[name], name)
        for module, sizes in header.sizes.items():
            if other.sizes.get(module, sizes) != sizes:
                theirs = other.sizes[module]
                raise IncompatibleAdapterError(
                    f"adapter '{header.name}' (base {mine or 'not named'}) maps {sizes[0]} -> {sizes[1]} at '{module}', "
                    f"adapter '{name}' of pool {pool.path} (base {base_name(other.config) or 'not named'}) maps "
                    f"{theirs[0]} -> {theirs[1]}; they belong to different base models, use a pool for each."
                )
        if not pool.rows.get(name, {}).get("other_base_allowed") and not same_base(mine, base_name(other.config)):
            differs = True
            if not allowed:
                raise IncompatibleAdapterError(
                    f"adapter '{header.name}' was trained on '{mine}', "
                    f"adapter '{name}' of pool {pool.path} on '{base_name(other.config)}'. "
                    "Use a pool for each, or pass --allow-other-base if they are one base model under two names."
                )
    return differs


def check_one_base(pool: Pool) -> None:
    """Refuse a pool with adapters that name different base models, except those added with ``--allow-other-base``.

    Raises:
        IncompatibleAdapterError: Naming the adapters and their base models.
    """
    bases = {name: base_name(load_config(pool.folders[name], name)) for name in pool.names}
    common, others = other_bases({name: base for name, base in bases.items() if not pool.rows.get(name, {}).get("other_base_allowed")})
    if others:
        shown = ", ".join(f"'{name}' ({base})" for name, base in others.items())
        advice = f"dlplora pool add {pool.path} {pool.folders[next(iter(others))]} --allow-other-base"
        raise IncompatibleAdapterError(
            f"pool {pool.path} has adapters of another base model than '{common}', which most of them name: {shown}. Move them to a pool "
            f"of their own; or, if it is one base model under two names: {advice}."
        )


def adapters_for_other_bases(pool: Pool, backbone: str) -> dict[str, str]:
    """Adapters (name -> base) that name another base model than the hub id given, except those added with ``--allow-other-base``."""
    found = {}
    for name in pool.names:
        base = base_name(load_config(pool.folders[name], name))
        if base is not None and not same_base(base, backbone) and not pool.rows.get(name, {}).get("other_base_allowed"):
            found[name] = base
    return found
