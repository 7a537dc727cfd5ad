"""An adapter pool: a folder of PEFT folders, usually with a manifest that fixes order, checksums and base model.

``pool.json`` (format 2) holds the fingerprint of the base model, if known, and one row per adapter: name, path inside the pool, source
and its revision, SHA-256 of weights and configuration, base model, rank, alpha, rsLoRA, target modules, and an optional description.
Format 1, without ``revision`` and ``config_sha256``, is still read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dlplora.adapters.config import MAX_CONFIG_BYTES, load_config
from dlplora.adapters.files import CONFIG_NAME, WEIGHTS_NAME, AdapterSpec, file_sha256, read_adapter
from dlplora.adapters.hub import find_pool
from dlplora.adapters.inspect import adapter_folders
from dlplora.atomic import write_json
from dlplora.config import build, short
from dlplora.documents import is_unicode, read_json
from dlplora.errors import PoolError, nearest

MANIFEST_NAME = "pool.json"
FORMAT = 2
READABLE_FORMATS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One adapter of a manifest; format 1 lacks what has a default."""

    name: str
    path: str
    sha256: str
    source: str | None = None
    revision: str | None = None
    config_sha256: str | None = None
    base_model_name_or_path: str | None = None
    rank: int | None = None
    alpha: float | None = None
    use_rslora: bool | None = None
    target_modules: list[str] | None = None
    other_base_allowed: bool = False
    converted_from: str | None = None
    description: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    """The content of ``pool.json``."""

    format: int
    base_model: dict[str, Any] | None = None
    adapters: list[_Row]


@dataclass(frozen=True, slots=True)
class Pool:
    """Ordered adapters of one folder. ``base_model`` is the fingerprint of the base model, None without a manifest.

    ``rows`` are the manifest's rows by name, empty without a manifest.
    """

    path: Path
    names: tuple[str, ...]
    folders: Mapping[str, Path]
    sha256: Mapping[str, str]
    base_model: Mapping[str, Any] | None
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def checksum(self) -> str:
        """SHA-256 over names, files and scalings in order.

        The scaling every configuration of this project has, alpha = 2 r and nothing else, adds nothing to the text.
        """
        text = "\n".join(f"{name} {self.sha256[name]}{_unusual_scaling(self.folders[name], name)}" for name in self.names)
        return hashlib.sha256(text.encode()).hexdigest()


def _unusual_scaling(folder: Path, name: str) -> str:
    config = load_config(folder, name)
    facts = {key: config.get(key) for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)}
    rank, alpha = facts.pop("r", None), facts.pop("lora_alpha", None)
    plain = not facts and isinstance(rank, (int, float)) and alpha == 2 * rank
    return "" if plain else " " + json.dumps([rank, alpha, facts], sort_keys=True)


def _inside(root: Path, relative: str, name: str) -> Path:
    folder = (root / relative).resolve()
    if not folder.is_relative_to(root.resolve()):
        raise PoolError(f"{root / MANIFEST_NAME}: path '{relative}' of adapter '{name}' leaves the pool folder.")
    return folder


def _from_manifest(root: Path) -> Pool:
    path = root / MANIFEST_NAME
    content = read_json(path, error=PoolError)
    if content.get("format") not in READABLE_FORMATS:
        raise PoolError(f"{path}: format {short(content.get('format'))} is not known; this version reads formats 1 and 2.")
    manifest = build(_Manifest, content, str(path), error=PoolError)
    rows = [(row.name, row.path, row.sha256, content["adapters"][i]) for i, row in enumerate(manifest.adapters)]
    if not rows:
        raise PoolError(f"{path} lists no adapter; add one with `dlplora pool add`, or remove the file.")
    names = [name for name, *_ in rows]
    for name in names:
        if not name or Path(name).name != name or name.startswith(".") or "\\" in name or not name.isprintable():
            raise PoolError(f"{path}: {name!r} cannot name an adapter: it must be the name of one folder.")
    if len(set(names)) != len(names):
        raise PoolError(f"{path}: adapter names must be unique, got {', '.join(names)}.")
    folders = {name: _inside(root, relative, name) for name, relative, *_ in rows}
    for name, _, expected, row in rows:
        for file, wanted in ((WEIGHTS_NAME, expected), (CONFIG_NAME, row.get("config_sha256"))):
            _check_file(path, folders[name] / file, name, wanted)
    sums, by_name = {name: value for name, _, value, _ in rows}, {name: row for name, _, _, row in rows}
    return Pool(root, tuple(names), folders, sums, manifest.base_model, by_name)


def _check_file(manifest: Path, file: Path, name: str, expected: str | None) -> None:
    if not file.is_file():
        raise PoolError(f"{manifest} lists adapter '{name}', but {file} is missing.")
    if file.name == CONFIG_NAME and file.stat().st_size > MAX_CONFIG_BYTES:
        raise PoolError(f"adapter '{name}': {file} is longer than {MAX_CONFIG_BYTES:,} bytes, which is more than any such file needs.")
    found = file_sha256(file) if expected is not None else None
    if found != expected:
        raise PoolError(
            f"adapter '{name}': {file} has SHA-256 {str(found)[:12]}…, the manifest says {str(expected)[:12]}…; "
            "it was changed after it was added."
        )


def load_pool(folder: str | Path | Pool) -> Pool:
    """Open a pool: a folder, or the bare name of one below ``DLPLORA_POOLS``; one that is open is returned as it is.

    Without a manifest the PEFT sub-folders are taken in sorted order.

    Raises:
        PoolError: If the folder is missing, empty or damaged, a path leaves it, or a file differs from the manifest.
    """
    if isinstance(folder, Pool):
        return folder
    root = find_pool(folder)
    if not root.is_dir():
        here = "" if root == Path(folder).expanduser() else f" (and no folder {folder} here)"
        raise PoolError(f"pool folder not found: {root}{here}. Pass the path of a folder of PEFT LoRA folders.")
    manifest = root / MANIFEST_NAME
    if manifest.is_file():
        return _from_manifest(root)
    if manifest.is_symlink() or manifest.exists():  # its order and checksums must not be passed over
        raise PoolError(f"{manifest} is not a readable file (it is a folder, a device or a broken symbolic link); put the manifest there.")
    names = sorted(path.name for path in root.iterdir() if (path / CONFIG_NAME).is_file() and not path.name.startswith("."))
    if not names:
        hint = " It looks like a single adapter; pass its parent folder." if (root / CONFIG_NAME).is_file() else ""
        inner = sorted({str((root / name).parent) for name, folder in adapter_folders(root) if folder != root})
        hint = hint or (f" There are some further down; pass one of these: {', '.join(inner[:5])}." if inner else "")
        raise PoolError(f"no PEFT LoRA folders (with {CONFIG_NAME}) in {root}.{hint}")
    for name in names:
        if not is_unicode(name):
            raise PoolError(f"{root}: the name of adapter folder '{name}' is not UTF-8, so it cannot name an expert; rename the folder.")
        if not (root / name).resolve().is_relative_to(root.resolve()):
            raise PoolError(f"{root}: adapter folder '{name}' is a link out of the pool; copy it in with `dlplora pool add`.")
    folders = {name: root / name for name in names}
    sums = {name: file_sha256(folders[name] / WEIGHTS_NAME) if (folders[name] / WEIGHTS_NAME).is_file() else "" for name in names}
    return Pool(root, tuple(names), folders, sums, None)


def read_pool(pool: Pool, names: Sequence[str] | None = None) -> dict[str, tuple[AdapterSpec, dict[str, Any]]]:
    """Read the named adapters (None: all), in that order.

    Raises:
        PoolError: If a name is not in the pool.
    """
    wanted = list(pool.names) if names is None else [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in pool.folders:
            raise PoolError(f"pool {pool.path} has no adapter '{name}'.{nearest(name, pool.names)} Known: {', '.join(pool.names)}.")
    if len(set(wanted)) != len(wanted):
        raise PoolError(f"adapter names must be unique, got {', '.join(wanted)}.")
    read = {name: read_adapter(pool.folders[name], name) for name in wanted}
    described = {name: pool.rows.get(name, {}).get("description") for name in wanted}
    return {name: (replace(spec, description=described[name]), weights) for name, (spec, weights) in read.items()}


def manifest_row(
    folder: Path, name: str, *, source: str | None = None, revision: str | None = None, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the manifest says of the adapter in ``folder``, which is read and checked; it will be moved to ``POOL/name``."""
    spec, _ = read_adapter(folder, name)
    return {
        "name": name,
        "path": name,
        "source": source,
        "revision": revision,
        "sha256": spec.sha256,
        "config_sha256": file_sha256(folder / CONFIG_NAME),
        "base_model_name_or_path": spec.base_model,
        "rank": spec.rank,
        "alpha": spec.alpha,
        "use_rslora": spec.use_rslora,
        "target_modules": list(spec.target_modules),
        **(extra or {}),
    }


def write_manifest(
    folder: str | Path,
    names: Sequence[str],
    base_fingerprint: Mapping[str, Any] | None,
    sources: Mapping[str, str] | None = None,
    descriptions: Mapping[str, str | None] | None = None,
) -> Path:
    """Write ``pool.json`` for adapters that are already in ``folder/NAME``, atomically."""
    root = Path(folder)
    if len(set(names)) != len(names):
        raise PoolError(f"adapter names must be unique, got {', '.join(names)}.")
    known = {name: {"description": text} for name, text in (descriptions or {}).items() if text}
    rows = [manifest_row(root / name, name, source=(sources or {}).get(name), extra=known.get(name)) for name in names]
    return save_rows(root, rows, base_fingerprint)


def save_rows(root: Path, rows: Sequence[Mapping[str, Any]], base_fingerprint: Mapping[str, Any] | None) -> Path:
    """Write ``pool.json`` from finished rows, atomically."""
    manifest = {"format": FORMAT, "base_model": dict(base_fingerprint) if base_fingerprint else None, "adapters": list(rows)}
    path = root / MANIFEST_NAME
    write_json(path, manifest)
    return path


def pool_hash(folder: str | Path) -> str:
    """Checksum of a pool folder: names and weight files in order."""
    return load_pool(folder).checksum()


def unlisted(pool: Pool) -> list[str]:
    """Adapters below the pool's folder that take no part, by their paths in it: not in its manifest, or in folders of folders.

    Left out is what was copied into the pool from there, and what lies in the folder of an adapter: checkpoints, for instance.
    """
    listed = {folder.resolve() for folder in pool.folders.values()}
    listed |= {Path(str(row["source"])) for row in pool.rows.values() if row.get("source")}
    found = [(name, folder.resolve()) for name, folder in adapter_folders(pool.path) if (folder / CONFIG_NAME).is_file()]
    return [name for name, folder in found if folder != pool.path.resolve() and not listed & {folder, *folder.parents}]
