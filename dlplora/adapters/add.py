"""Adding an adapter to a pool: everything is checked before a byte is written, and a failure leaves the pool as it was."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from dlplora.adapters.config import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, base_name, load_config, read_config, same_base
from dlplora.adapters.headers import AdapterHeader, read_header
from dlplora.adapters.hub import AdapterSource, find_adapter, find_pool
from dlplora.adapters.pool import Pool, load_pool, manifest_row, save_rows
from dlplora.errors import AdapterError, IncompatibleAdapterError, PoolError, UnsafeFileError

_NAME = re.compile(r"\w[\w.-]*")
_ATTEMPTS = 1000
"""To make and lock a pool's folder that others remove at the same time."""


def add_adapter(
    folder: str | Path,
    adapter: str | Path,
    name: str | None = None,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    offline: bool = False,
    allow_other_base: bool = False,
) -> Pool:
    """Check a PEFT folder, copy it into a pool and list it in the manifest.

    Args:
        folder: The pool, made if it does not exist; see ``find_pool`` for bare names.
        adapter: PEFT folder or hub id; see ``find_adapter``. A folder inside the pool is listed where it lies.
        name: Name of the expert; None takes the folder's, or the repository's.
        revision, offline: Of a hub id.
        allow_pickle: Convert ``adapter_model.bin`` (read with ``weights_only=True``) where there is no safetensors file.
        allow_other_base: Take an adapter that names another base model than the others, if its sizes fit.

    Raises:
        PoolError: If the name is taken or no name for a folder, or the adapter is not found.
        IncompatibleAdapterError: If it was made for another backbone than the adapters that are there.
        AdapterError: If it cannot be fused. Nothing is written after any error.
    """
    root = find_pool(folder)
    found = find_adapter(adapter, revision=revision, offline=offline, with_pickle=allow_pickle)
    name = name or found.name
    if not _NAME.fullmatch(name):
        raise PoolError(f"'{name}' cannot name an adapter: use letters, digits, '_', '-' and '.', beginning with a letter or digit.")
    with _locked(root) as undo:
        _add(root, found, name, undo, allow_pickle=allow_pickle, allow_other_base=allow_other_base)
    return load_pool(root)


@contextmanager
def _locked(root: Path) -> Iterator[ExitStack]:
    """The pool's folder, made if need be and held by one process at a time, where the system can lock a folder.

    Yields the stack of what an error inside the block takes back; folders made here go too, before another process gets the lock.
    """
    handle: int | None = None
    try:
        with ExitStack() as made:
            for _ in range(_ATTEMPTS):  # what was made or locked may be removed by a failed addition meanwhile
                handle = _lock(root) if _make_folder(root, made) else None
                if handle is not None:
                    break
            else:
                raise PoolError(f"cannot make and hold the folder {root}: it goes away again. Is it a link to nowhere?")
            with ExitStack() as undo:
                yield undo
                undo.pop_all()
            made.pop_all()
    finally:
        if handle is not None and handle >= 0:
            os.close(handle)  # the lock goes with it


def _lock(root: Path) -> int | None:
    """The open, locked folder; -1 where there are no such locks; None if ``root`` is gone or another folder by now."""
    try:
        import fcntl
    except ImportError:  # Windows: two additions at once are the user's to avoid
        return -1
    handle = -1
    try:
        handle = os.open(root, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(handle), os.stat(root)):
            return handle
    except FileNotFoundError:
        pass
    if handle >= 0:
        os.close(handle)
    return None


def _add(root: Path, found: AdapterSource, name: str, undo: ExitStack, *, allow_pickle: bool, allow_other_base: bool) -> None:
    """Everything that happens while the pool is locked; ``undo`` takes back what was written."""
    pool = load_pool(root) if any(path for path in root.iterdir() if not path.name.startswith(".")) else None
    in_place = found.folder.resolve() == (root / name).resolve()
    known = () if pool is None else tuple(listed for listed in pool.names if pool.folders[listed].resolve() != found.folder.resolve())
    if name in known:
        raise PoolError(f"pool {root} already has an adapter '{name}'. Pass another --name.")
    if not in_place and (root / name).exists():
        raise PoolError(f"{root / name} exists and is not listed in the pool; move it away or pass another --name.")
    pickled = _pickled(found.folder)
    if pickled and not allow_pickle:
        read_header(found.folder, name)  # says why it is refused
    ready = _converted(found.folder, name, root, undo) if pickled else found.folder
    other = _check_base(read_header(ready, name), pool, known, allow_other_base)
    extra = {**({"other_base_allowed": True} if other else {}), **({"converted_from": PICKLE_NAME} if pickled else {})}
    row = _checked_row(found, ready, name, extra)
    kept = () if pool is None else [_kept_row(pool, listed) for listed in known]
    if not in_place:
        _move(ready if pickled else _copied(found.folder, name, root, undo), root / name, undo)
    elif pickled:
        _move_weights(ready, root / name, undo)
    save_rows(root, [*kept, row], None if pool is None else pool.base_model)


def _checked_row(found: AdapterSource, ready: Path, name: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's row; what is wrong with converted weights is said of the file they came from."""
    try:
        return manifest_row(ready, name, source=found.source, revision=found.revision, extra=extra)
    except AdapterError as error:
        text = str(error).replace(str(ready / WEIGHTS_NAME), str(found.folder / PICKLE_NAME)) if ready != found.folder else str(error)
        raise type(error)(text) from error


def _pickled(folder: Path) -> bool:
    return not (folder / WEIGHTS_NAME).is_file() and (folder / PICKLE_NAME).is_file()


def _make_folder(root: Path, undo: ExitStack) -> bool:
    """Make the folder and its missing parents; False if one of them went away meanwhile."""
    missing = [path for path in (root, *root.parents) if not path.exists()]
    for path in reversed(missing):
        try:
            path.mkdir()
        except FileExistsError:  # another addition was faster, and it is that one's to remove
            continue
        except FileNotFoundError:
            return False
        undo.callback(_remove_if_empty, path)
    return True


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
    """Put converted weights beside the pickle of a folder that already lies in the pool."""
    undo.callback((target / WEIGHTS_NAME).unlink, missing_ok=True)
    os.replace(ready / WEIGHTS_NAME, target / WEIGHTS_NAME)
    shutil.rmtree(ready)


def _kept_row(pool: Pool, name: str) -> Mapping[str, Any]:
    """The manifest's row as it is; one made now for a folder without a manifest."""
    return pool.rows[name] if name in pool.rows else manifest_row(pool.folders[name], name)


def convert_pickle(source: Path, target: Path) -> None:
    """Rewrite pickled weights as safetensors. Only tensors are unpickled (``weights_only=True``); no code of the file runs.

    Raises:
        UnsafeFileError: If the file holds anything but tensors by name.
    """
    import pickle

    import torch
    from safetensors.torch import save_file

    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        reason = str(error).split("\n")[0][:160]
        raise UnsafeFileError(f"{source} is not a plain file of tensors and is not read: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UnsafeFileError(f"{source} must hold tensors by name, found {type(content).__name__}; it is not read.")
    save_file({str(key): value.detach().clone().contiguous() for key, value in content.items()}, target)


def _check_base(header: AdapterHeader, pool: Pool | None, known: tuple[str, ...], allowed: bool) -> bool:
    """Compare sizes and base names with the adapters that are there; True if an exception for the name was used."""
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
                    f"{theirs[0]} -> {theirs[1]}; they belong to different backbones, use a pool for each."
                )
        if not same_base(mine, base_name(other.config)):
            differs = True
            if not allowed:
                raise IncompatibleAdapterError(
                    f"adapter '{header.name}' was trained on '{mine}', "
                    f"adapter '{name}' of pool {pool.path} on '{base_name(other.config)}'. "
                    "Use a pool for each, or pass --allow-other-base if they are one backbone under two names."
                )
    return differs


def adapters_for_other_bases(pool: Pool, backbone: str) -> dict[str, str]:
    """Adapters (name -> base) that name another backbone than the hub id given, without those that were let in knowingly."""
    found = {}
    for name in pool.names:
        base = base_name(load_config(pool.folders[name], name))
        if base is not None and not same_base(base, backbone) and not pool.rows.get(name, {}).get("other_base_allowed"):
            found[name] = base
    return found
