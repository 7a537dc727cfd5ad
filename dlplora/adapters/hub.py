"""Find an adapter named on the command line: in a local folder, or in a repository of the model hub.

A local folder has priority over a hub id. ``hf://ORG/NAME[/SUB/FOLDER][@REVISION]`` uses the hub even if a folder of that name exists.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from dlplora.adapters.config import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from dlplora.errors import PoolError

HUB_PREFIX = "hf://"
ENV_POOLS = "DLPLORA_POOLS"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter folder on this machine and where it came from.

    Attributes:
        folder: Where the files are.
        name: Default name of the adapter.
        source: What the manifest keeps: the absolute path, or ``hf://ORG/NAME[/SUB/FOLDER]``.
        revision: Commit of the hub repository; None for a local folder.
    """

    folder: Path
    name: str
    source: str
    revision: str | None


def pools_root() -> Path:
    """Folder of the pools that are called by a bare name: ``DLPLORA_POOLS``, else ``~/.cache/dlplora/pools``."""
    given = os.environ.get(ENV_POOLS)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "dlplora" / "pools"


def find_pool(name: str | Path) -> Path:
    """An existing folder wins; a bare name (no separator) that is not a folder here is a pool below ``pools_root``.

    Raises:
        PoolError: If the name is empty or no name.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise PoolError(f"a pool is given as a folder or by its name, got {type(name).__name__}.")
    text = str(name)
    if not text.strip() or "\0" in text:
        raise PoolError("the name of the pool is empty; pass a folder, or the name of a pool below DLPLORA_POOLS.")
    path = Path(name).expanduser()
    bare = text not in {".", ".."} and not {"/", os.sep} & set(text) and not text.startswith("~")
    return pools_root() / text if bare and not path.is_dir() else path


def find_adapter(given: str | Path, *, revision: str | None = None, offline: bool = False, with_pickle: bool = False) -> AdapterSource:
    """Find an adapter, downloading it if it is a hub id that is not in the cache yet.

    Args:
        given: Folder, ``ORG/NAME``, or ``hf://ORG/NAME[/SUB/FOLDER][@REVISION]``.
        revision: Branch, tag or commit of a hub id; the returned source has the commit.
        offline: Look in the cache only, as with ``HF_HUB_OFFLINE=1``.
        with_pickle: Fetch pickled weights too, for adapters that have no others.

    Raises:
        PoolError: If it is neither; one line with what was looked for, where, and both ways to supply it.
    """
    text = str(given)
    folder = Path(given).expanduser()
    if not text.startswith(HUB_PREFIX):
        if folder.is_dir():
            if revision is not None:
                raise PoolError(f"--revision is for the hub, but {folder} is a local folder; write {HUB_PREFIX}{text} to ask the hub.")
            return AdapterSource(folder, folder.resolve().name, str(folder.absolute()), None)
        if isinstance(given, Path) or not _HUB_ID.fullmatch(text):
            raise PoolError(f"adapter not found: there is no folder {text}. Pass a PEFT LoRA folder, or a hub id like ORG/NAME.")
    repo, sub, revision = _hub_parts(text, revision)
    snapshot = _download(repo, sub, revision, offline, with_pickle)
    commit = snapshot.name if _COMMIT.fullmatch(snapshot.name) else None
    address = f"{repo}/{sub}" if sub else repo
    return AdapterSource(snapshot / sub if sub else snapshot, address.rsplit("/", 1)[-1], HUB_PREFIX + address, commit)


def _hub_parts(text: str, revision: str | None) -> tuple[str, str, str | None]:
    """Repository, folder inside it (may be empty) and revision of a hub address."""
    bare, at, tag = text.removeprefix(HUB_PREFIX).partition("@")
    if at and revision not in (None, tag):
        raise PoolError(f"{text} names revision '{tag}', --revision says '{revision}'; give one of them.")
    parts = bare.removesuffix("/").split("/")
    repo, sub = "/".join(parts[:2]), "/".join(parts[2:])
    if not _HUB_ID.fullmatch(repo) or (at and not tag) or any(part in {"", ".", ".."} for part in parts):
        raise PoolError(
            f"'{text}' is not a hub address; expected {HUB_PREFIX}ORG/NAME, {HUB_PREFIX}ORG/NAME/FOLDER or either with @REVISION."
        )
    return repo, sub, tag or revision


def _download(repo: str, sub: str, revision: str | None, offline: bool, with_pickle: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    no_answer: type[Exception] = HfHubHTTPError.__mro__[1]  # the transport library's own error: httpx in some versions, httpx2 in others
    files = [CONFIG_NAME, WEIGHTS_NAME, *([PICKLE_NAME] if with_pickle else [])]
    try:
        found = snapshot_download(
            repo, revision=revision, allow_patterns=[f"{sub}/{file}" if sub else file for file in files], local_files_only=offline
        )
    except (OSError, EntryNotFoundError, HFValidationError, no_answer) as error:
        reason = str(error).split("\n")[0].strip() or type(error).__name__
        raise PoolError(
            f"adapter not found: there is no folder {repo}{'/' + sub if sub else ''}, and "
            f"{hub_failure(repo, revision, offline or constants.HF_HUB_OFFLINE, reason)}"
            f" Pass a local PEFT folder, or fetch it once with a connection: hf download {repo}."
        ) from error
    return Path(found)


def hub_failure(repo: str, revision: str | None, offline: bool, reason: str) -> str:
    """What to say when a hub id does not resolve: what was looked for and where."""
    from huggingface_hub import constants

    what = f"hub id '{repo}'" + (f" (revision {revision})" if revision else "")
    if offline:
        return f"{what} is not in the cache {constants.HF_HUB_CACHE}, and the hub is not asked (offline mode)."
    return f"{what} is neither in the cache {constants.HF_HUB_CACHE} nor available from {constants.ENDPOINT}: {reason.rstrip('.')}."
