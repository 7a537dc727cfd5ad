"""Check whether a model's position encoding of a token is independent of the sequence length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FIXED_ROPE = frozenset({"default", "linear", "yarn", "llama3", "proportional", "axial"})
"""Rotary embeddings of transformers with frequencies that are computed once. ``dynamic`` and ``longrope`` choose them by the length of the
sequence; kinds that are not listed are unknown."""
LENGTH_FLAGS = ("use_dynamic_ntk", "use_logn_attn")
"""Settings of models with code of their own that scale by the length of the sequence."""


def length_dependence(model: Any) -> str | None:
    """Why the encoding of a position depends on the length of the sequence, as a clause, or None.

    In that case a token's keys depend on what follows it, so they cannot be shared between sequences of different lengths, and a
    padded row may give another result than alone.
    """
    kinds = sorted({kind for kind in _rope_kinds(model) if kind not in FIXED_ROPE})
    if kinds:
        return f"{type(model).__name__} has rotary embeddings of the kind {', '.join(kinds)}, which depend on the length of the sequence"
    flags = [flag for config in _configs(model) for flag in LENGTH_FLAGS if getattr(config, flag, False)]
    return f"{type(model).__name__} sets {flags[0]}, which depends on the length of the sequence" if flags else None


def _configs(model: Any) -> list[Any]:
    config = getattr(model, "config", None)
    if config is None:
        return []
    return [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]


def _rope_kinds(model: Any) -> Iterator[str]:
    """Kinds of rotary embeddings, as the modules and the configuration name them."""
    for module in model.modules() if hasattr(model, "modules") else ():
        kind = getattr(module, "rope_type", None)
        yield from map(str, kind.values() if isinstance(kind, Mapping) else [kind] if kind is not None else [])
    for config in _configs(model):
        for key in ("rope_parameters", "rope_scaling"):
            yield from _kinds_of(getattr(config, key, None))


def _kinds_of(parameters: Any) -> Iterator[str]:
    """The kind in rotary parameters, which may be given for each type of layer."""
    if not isinstance(parameters, Mapping):
        return
    kind = parameters.get("rope_type", parameters.get("type"))
    if isinstance(kind, str):
        yield kind
    for value in parameters.values():
        yield from _kinds_of(value)
