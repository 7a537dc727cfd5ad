"""What the training of a method's folders says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dlplora.documents import read_json


def training_tokens(folders: Mapping[str, Path], roles: Sequence[str]) -> int | None:
    """Tokens that the training of the named artifacts saw, 0 for none; None if one of them does not say.

    Args:
        folders: Folder by role.
        roles: Those that count.
    """
    total = 0
    for role in roles:
        known = [_noted_tokens(folders[role] / name) for name in ("training.json", "router.json") if role in folders]
        if not any(known):
            return None
        total += next(tokens for tokens in known if tokens)
    return total


def _noted_tokens(path: Path) -> int | None:
    if not path.is_file():
        return None
    notes = read_json(path)
    return notes.get("training_tokens") or notes.get("metrics", {}).get("training_tokens")  # type: ignore[no-any-return]
