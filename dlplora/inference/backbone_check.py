"""Check a pool against a base model, using an empty model made from ``config.json``; no weight is read or downloaded."""

from __future__ import annotations

from dlplora.adapters.fingerprint import check_base_names
from dlplora.adapters.pool import Pool
from dlplora.errors import IncompatibleAdapterError
from dlplora.inference.fit_trial import try_shapes
from dlplora.inference.loading import empty_backbone, resolve_backbone
from dlplora.inference.patching import patch
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.routing_slot import RoutingSlot


def check_pool_fits(pool: Pool, bank: AdapterBank, pretrained: str, revision: str | None = None) -> str:
    """Put the bank's layers into an empty model of the base model's architecture and run two rows through it, shapes only.

    Args:
        pool, bank: The adapters.
        pretrained: Model folder or hub id.
        revision: Of a hub id.

    Returns:
        The architecture and its name, for people.

    Raises:
        IncompatibleAdapterError: If a module is missing, has other sizes or is not used as a linear layer, or an adapter names another base
            model.
        ConfigError: If the base model's configuration is not found.
    """
    source = resolve_backbone(pretrained)
    model = empty_backbone(source, revision)
    try:
        slot = RoutingSlot()
        handle = patch(model, bank.to("meta"), slot)
        try_shapes(model, handle.layers, slot)
    except IncompatibleAdapterError as error:
        raise IncompatibleAdapterError(f"{source}: {error}") from error
    check_base_names(pool, source)
    return f"{type(model).__name__} ({source})"
