"""How each inference server selects adapters for a request.

===========  ==================================================================================================================
vllm         ``model`` is the name of one loaded adapter (``--lora-modules NAME=PATH``), or of the base model
sglang       ``model`` is ``BASE:NAME`` for one loaded adapter (``--lora-paths NAME=PATH``), or the base model
lorax        ``model`` is the id of one adapter; several adapters with weights go to ``/generate`` as ``merged_adapters``
llama.cpp    ``lora`` lists ``{id, scale}`` for every adapter that ``llama-server`` was started with (``--lora FILE``)
===========  ==================================================================================================================

Sources: the servers' own documentation (vLLM 0.33 "LoRA adapters", SGLang 0.5 "LoRA serving", LoRAX "Merging adapters", llama.cpp
tools/server/README.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from dlplora.errors import ConfigError, nearest

KINDS = ("vllm", "sglang", "lorax", "llama.cpp")


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """Names of models and adapters in an upstream server.

    Attributes:
        kind: One of ``KINDS``.
        base: Name of the base model there; empty for llama.cpp, which serves one model.
        ids: Adapter of the pool, or a further one -> its name there; for llama.cpp its number.
    """

    kind: str
    base: str = ""
    ids: Mapping[str, str] = field(default_factory=dict)

    def applied(self, weights: Mapping[str, float]) -> dict[str, float]:
        """What the server will do with a decision: all weights, or the adapter with the largest one, at weight 1.

        LoRAX reads the weights of several adapters and ignores that of a single one (``load_and_merge_adapters``).
        """
        if not weights or self.kind == "llama.cpp" or (self.kind == "lorax" and len(weights) > 1):
            return dict(weights)
        return {max(weights, key=lambda name: weights[name]): 1.0}

    def fields(self, applied: Mapping[str, float]) -> dict[str, Any]:
        """The fields of an OpenAI request that select the adapters. ``applied`` is what ``applied`` gives."""
        if self.kind == "llama.cpp":  # every adapter is named: those that are left out may keep the scale of the server's start
            scales = {self.ids[name]: weight for name, weight in applied.items()}
            return {"lora": [{"id": int(one), "scale": scales.get(one, 0.0)} for one in self.ids.values()]}
        if not applied:
            return {"model": self.base}
        (name,) = applied
        return {"model": f"{self.base}:{self.ids[name]}" if self.kind == "sglang" else self.ids[name]}

    def merges(self, applied: Mapping[str, float]) -> bool:
        """Whether a request must go to LoRAX's own endpoint, since OpenAI's has no field for weights."""
        return self.kind == "lorax" and len(applied) > 1

    def merged(self, applied: Mapping[str, float]) -> dict[str, Any]:
        """LoRAX's parameter for several adapters."""
        return {"ids": [self.ids[name] for name in applied], "weights": list(applied.values()), "merge_strategy": "linear"}


def base_of(models: Sequence[Mapping[str, Any]], wanted: str | None) -> str:
    """Name of the base model among the cards of ``GET /v1/models``.

    Args:
        models: The cards.
        wanted: ``--upstream-model``; None takes the first card without a parent.

    Raises:
        ConfigError: If there is none, or not the requested one.
    """
    names = [str(card.get("id")) for card in models]
    if wanted is not None:
        if names and wanted not in names:
            raise ConfigError(f"the upstream server has no model '{wanted}'.{nearest(wanted, names)}")
        return wanted
    for card in models:
        if not card.get("parent"):
            return str(card.get("id"))
    raise ConfigError("the upstream server lists no model; name its base model with --upstream-model.")


def require_adapters(models: Sequence[Mapping[str, Any]], ids: Mapping[str, str]) -> None:
    """Check that a vLLM server has loaded every adapter.

    Raises:
        ConfigError: Naming those that it has not.
    """
    names = [str(card.get("id")) for card in models]
    missing = [one for one in ids.values() if one not in names]
    if missing:
        raise ConfigError(
            f"the upstream server has not loaded: {', '.join(missing)}.{nearest(missing[0], names)} Load them there "
            "(--lora-modules NAME=PATH), or give their names there with --upstream-adapter NAME=ID."
        )


def numbers_of(loaded: Sequence[Mapping[str, Any]], names: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Numbers of adapters in ``llama-server``, by the names of their files.

    Args:
        loaded: What ``GET /lora-adapters`` answers: ``id`` and ``path`` of each.
        names: Adapters of the pool.
        given: ``--upstream-adapter``, name -> number or name of the file without its ending.

    Raises:
        ConfigError: Naming the adapters that are not loaded.
    """
    found = {PurePath(str(one.get("path", "")).replace("\\", "/")).stem: str(one.get("id")) for one in loaded}
    known = set(found.values())
    ids = {}
    for name in dict.fromkeys([*names, *given]):
        asked = given.get(name, name)
        number = asked if asked in known else found.get(asked)
        if number is None:
            raise ConfigError(
                f"llama-server has not loaded adapter '{name}'.{nearest(name, found)} Write the files with "
                "`dlplora export gguf FOLDER --each`, and start it with `--lora-init-without-apply --lora FILE,FILE,…`."
            )
        ids[name] = number
    unnamed = {f"#{one}": one for one in sorted(known - set(ids.values()))}  # they get scale 0, too
    return {**ids, **unnamed}
