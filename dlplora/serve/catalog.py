"""The models that a server offers: the base model, ``auto``, and one per adapter."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dlplora.errors import ConfigError, nearest
from dlplora.serve.engine import Engine
from dlplora.serve.jobs import BadRequestError, Target

AUTO, BASE = "auto", "base"


def public_name(pretrained: str | None) -> str:
    """The name of the base model in requests: of a folder or file its last part only."""
    if pretrained is None:
        return "nano"
    return Path(pretrained).resolve().name if Path(pretrained).exists() else pretrained


def check_names(names: Iterable[str], base_name: str) -> None:
    """Refuse adapters that could not be requested by their name.

    Raises:
        ConfigError: If one is called ``auto``, ``base`` or as the base model, or begins like ``base:NAME``.
    """
    for name in names:
        if name in {AUTO, BASE, base_name} or name.partition(":")[0] in {BASE, base_name}:
            raise ConfigError(f"adapter '{name}' has a name that means something else to the server; rename its folder.")


class Catalog:
    """Resolves model names to targets.

    Args:
        engine: Its adapters may change by a reload.
        base_name: Name of the base model, accepted in addition to ``base``.
        created: Unix time of the start.

    Raises:
        ConfigError: See ``check_names``.
    """

    def __init__(self, engine: Engine, base_name: str, created: int) -> None:
        check_names(engine.decider.names, base_name)
        self.engine, self.base_name, self.created = engine, base_name, created

    @property
    def names(self) -> list[str]:
        """All model names: the base model, each adapter, ``auto``."""
        return [BASE, *self.engine.decider.names, AUTO]

    def cards(self) -> list[dict[str, Any]]:
        """What ``GET /v1/models`` lists."""
        return [self.card(name) for name in self.names]

    def card(self, name: str) -> dict[str, Any]:
        """One entry.

        Raises:
            BadRequestError: 404 for an unknown name.
        """
        self.target(name)
        root = {BASE: self.base_name, AUTO: self.base_name}.get(name, name)
        parent = None if name in {BASE, self.base_name} else BASE
        return {"id": name, "object": "model", "created": self.created, "owned_by": "dlplora", "root": root, "parent": parent}

    def target(self, model: str, weights: dict[str, float] | None = None) -> Target:
        """What a request asks for.

        Args:
            model: ``auto``, ``base``, the name of the base model, an adapter, or ``base:adapter``.
            weights: ``adapter_weights`` of the request.

        Raises:
            BadRequestError: For an unknown model or adapter, or weights with a model that is not the base model.
        """
        names = self.engine.decider.names
        adapter = model.partition(":")[2] if model.partition(":")[0] in {BASE, self.base_name} else model
        if weights is not None:
            if model not in {BASE, self.base_name}:
                raise BadRequestError(f"'adapter_weights' needs model '{BASE}', not '{model}'.", "adapter_weights")
            for name in weights:
                if name not in names:
                    raise BadRequestError(f"no adapter '{name}'.{nearest(name, names)}", "adapter_weights")
            return Target(kind="weights", weights={name: value for name, value in weights.items() if value})
        if model == AUTO:
            return Target()
        if model in {BASE, self.base_name}:
            return Target(kind="base")
        if adapter in names:
            return Target(kind="pinned", weights={adapter: 1.0})
        raise BadRequestError(f"The model `{model}` does not exist.{nearest(model, self.names)}", "model", "model_not_found", 404)
