"""An adapter pool: a folder of PEFT folders, usually with a manifest that fixes order, checksums and backbone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlplora.errors import PoolError, nearest
from dlplora.modules.adapter_files import CONFIG_NAME, WEIGHTS_NAME, AdapterSpec, file_sha256, read_adapter

MANIFEST_NAME = "pool.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Pool:
    """Ordered adapters of one folder. ``base_model`` is the backbone's fingerprint, None without a manifest."""

    path: Path
    names: tuple[str, ...]
    folders: Mapping[str, Path]
    sha256: Mapping[str, str]
    base_model: Mapping[str, Any] | None

    def checksum(self) -> str:
        """SHA-256 over names and files in order."""
        text = "\n".join(f"{name} {self.sha256[name]}" for name in self.names)
        return hashlib.sha256(text.encode()).hexdigest()


def _inside(root: Path, relative: str, name: str) -> Path:
    folder = (root / relative).resolve()
    if not folder.is_relative_to(root.resolve()):
        raise PoolError(f"{root / MANIFEST_NAME}: path '{relative}' of adapter '{name}' leaves the pool folder.")
    return folder


def _from_manifest(root: Path) -> Pool:
    path = root / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise PoolError(f"{path}: format {manifest['format']!r} is not known; this version reads format {FORMAT}.")
        rows = [(str(row["name"]), str(row["path"]), str(row["sha256"])) for row in manifest["adapters"]]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PoolError(f"{path} is not JSON: {error}.") from error
    except (KeyError, TypeError) as error:
        raise PoolError(f"{path}: missing or malformed field {error}; write it again with `dlplora pool`.") from error
    names = [name for name, _, _ in rows]
    if len(set(names)) != len(names):
        raise PoolError(f"{path}: adapter names must be unique, got {', '.join(names)}.")
    folders = {name: _inside(root, relative, name) for name, relative, _ in rows}
    for name, _, expected in rows:
        weights = folders[name] / WEIGHTS_NAME
        if not weights.is_file():
            raise PoolError(f"{path} lists adapter '{name}', but {weights} is missing.")
        found = file_sha256(weights)
        if found != expected:
            raise PoolError(
                f"adapter '{name}': {weights} has SHA-256 {found[:12]}…, the manifest says {expected[:12]}…; "
                f"it was changed after it was added."
            )
    return Pool(root, tuple(names), folders, {name: value for name, _, value in rows}, manifest.get("base_model"))


def load_pool(folder: str | Path) -> Pool:
    """Open a pool folder; without a manifest its PEFT sub-folders are taken in sorted order.

    Raises:
        PoolError: If the folder is missing, empty or damaged, a path leaves it, or a file differs from the manifest.
    """
    root = Path(folder)
    if not root.is_dir():
        raise PoolError(f"pool folder not found: {root}. Pass the path of a folder of PEFT LoRA folders.")
    if (root / MANIFEST_NAME).is_file():
        return _from_manifest(root)
    names = sorted(path.name for path in root.iterdir() if (path / CONFIG_NAME).is_file())
    if not names:
        hint = " It looks like a single adapter; pass its parent folder." if (root / CONFIG_NAME).is_file() else ""
        raise PoolError(f"no PEFT LoRA folders (with {CONFIG_NAME}) in {root}.{hint}")
    folders = {name: root / name for name in names}
    sums = {name: file_sha256(folders[name] / WEIGHTS_NAME) if (folders[name] / WEIGHTS_NAME).is_file() else "" for name in names}
    return Pool(root, tuple(names), folders, sums, None)


def read_pool(pool: Pool, names: Sequence[str] | None = None) -> dict[str, tuple[AdapterSpec, dict[str, Any]]]:
    """Read the named adapters (None: all), in that order.

    Raises:
        PoolError: If a name is not in the pool.
    """
    wanted = list(pool.names) if names is None else list(names)
    for name in wanted:
        if name not in pool.folders:
            raise PoolError(f"pool {pool.path} has no adapter '{name}'.{nearest(name, pool.names)} Known: {', '.join(pool.names)}.")
    if len(set(wanted)) != len(wanted):
        raise PoolError(f"adapter names must be unique, got {', '.join(wanted)}.")
    return {name: read_adapter(pool.folders[name], name) for name in wanted}


def write_manifest(
    folder: str | Path, names: Sequence[str], base_fingerprint: Mapping[str, Any] | None, sources: Mapping[str, str] | None = None
) -> Path:
    """Write ``pool.json`` for adapters that already lie in ``folder/NAME``; the file appears whole or not at all."""
    root = Path(folder)
    if len(set(names)) != len(names):
        raise PoolError(f"adapter names must be unique, got {', '.join(names)}.")
    rows = []
    for name in names:
        spec, _ = read_adapter(root / name, name)
        rows.append(
            {
                "name": name,
                "path": name,
                "sha256": spec.sha256,
                "rank": spec.rank,
                "alpha": spec.alpha,
                "use_rslora": spec.use_rslora,
                "target_modules": list(spec.target_modules),
                "base_model_name_or_path": spec.base_model,
                "source": (sources or {}).get(name),
            }
        )
    manifest = {"format": FORMAT, "base_model": dict(base_fingerprint) if base_fingerprint else None, "adapters": rows}
    path, temporary = root / MANIFEST_NAME, root / f".{MANIFEST_NAME}.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def pool_hash(folder: str | Path) -> str:
    """Checksum of a pool folder: names and weight files in order."""
    return load_pool(folder).checksum()


def unlisted(pool: Pool) -> list[str]:
    """PEFT folders that lie in the pool's folder but that its manifest does not list, sorted."""
    listed = {folder.resolve() for folder in pool.folders.values()}
    found = (path for path in pool.path.iterdir() if (path / CONFIG_NAME).is_file() and path.resolve() not in listed)
    return sorted(path.name for path in found)


def add_adapter(folder: str | Path, adapter: str | Path, name: str | None = None) -> Pool:
    """Copy a PEFT LoRA folder into a pool and list it last in the manifest; one that lies in the pool already is only listed.

    Args:
        folder: The pool; made if it does not exist.
        adapter: PEFT folder.
        name: Name of the expert; None takes the folder's.

    Raises:
        PoolError: If the name is taken or no name for a folder.
        AdapterError: If the adapter cannot be fused; nothing is copied then.
    """
    root, source = Path(folder), Path(adapter)
    name = name or source.resolve().name
    if name in {"", ".", ".."} or Path(name).name != name:
        raise PoolError(f"'{name}' cannot name an adapter: it must be the name of one folder.")
    read_adapter(source, name)
    pool = load_pool(root) if root.is_dir() and any(root.iterdir()) else None
    known = () if pool is None else tuple(listed for listed in pool.names if pool.folders[listed].resolve() != source.resolve())
    if name in known:
        raise PoolError(f"pool {root} already has an adapter '{name}'. Pass another --name.")
    target = root / name
    if target.resolve() != source.resolve():
        if target.exists():
            raise PoolError(f"{target} exists and is not listed in the pool; move it away or pass another --name.")
        root.mkdir(parents=True, exist_ok=True)
        temporary = root / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for file in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copy2(source / file, temporary / file)
        os.replace(temporary, target)
    write_manifest(root, [*known, name], None if pool is None else pool.base_model, {name: str(source)})
    return load_pool(root)
