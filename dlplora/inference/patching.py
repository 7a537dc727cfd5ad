"""Put fused layers into a Hugging Face model, and remove them without changing the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from dlplora.errors import IncompatibleAdapterError, RoutingError, nearest
from dlplora.inference.fit_trial import try_fit
from dlplora.modules.fused_linear import FusedLinear
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.routing_slot import RoutingSlot


@dataclass
class PatchHandle:
    """The fused layers of one model.

    Attributes:
        layers: Module path -> fused layer.
        hooks: Handles of forward hooks that a method put on the model; removed with the layers.
    """

    model: nn.Module
    layers: dict[str, FusedLinear]
    slot: RoutingSlot
    hooks: list[Any] = field(default_factory=list)

    def restore(self) -> None:
        """Put the original modules back; they were never changed. A second call does nothing."""
        for path, layer in self.layers.items():
            _set(self.model, path, layer.base)
        self.slot.release(self.layers.values())
        self.layers = {}
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def patch(model: nn.Module, bank: AdapterBank, slot: RoutingSlot, combine: Literal["delta", "factor"] = "delta") -> PatchHandle:
    """Replace every module the bank adapts by a ``FusedLinear`` around it.

    Args:
        model: A causal LM; changed in place until ``restore``.
        bank: Experts; their module paths are looked up in ``model``.
        slot: Shared by all layers of the model.
        combine: What the layers sum; see ``FusedLinear``.

    Raises:
        IncompatibleAdapterError: If a module does not exist in the model, is not linear, has other sizes, or a trial run shows that the
            model does not use it as a linear layer. Nothing is changed then.
    """
    others = list(slot.layers)
    try:
        layers = _fused(model, bank, slot, combine)
    except IncompatibleAdapterError:
        slot.layers = others
        raise
    for path, layer in layers.items():
        layer.train(layer.base.training)
        _set(model, path, layer)
    handle = PatchHandle(model, layers, slot)
    try:
        handle.hooks += try_fit(model, layers, slot)
    except IncompatibleAdapterError:
        handle.restore()
        raise
    return handle


def _why_absent(path: str, known: Mapping[str, nn.Module]) -> str:
    """A hint: another base model, or a prefix in the keys that a wrapper or a surrounding module has left."""
    parts = path.split(".")
    for start in range(1, len(parts)):
        if ".".join(parts[start:]) in known:
            prefix = ".".join(parts[:start])
            return f"The adapters were saved from a wrapped model: '{prefix}.' must be removed from the keys of their tensors."
    return "The adapters were trained on another base model."


def _fused(model: nn.Module, bank: AdapterBank, slot: RoutingSlot, combine: Literal["delta", "factor"]) -> dict[str, FusedLinear]:
    """The fused layers by module path; ``model`` is only looked at."""
    known = dict(model.named_modules())
    layers: dict[str, FusedLinear] = {}
    for path, entry in bank.modules.items():
        adapters = ", ".join(name for name, rank in zip(bank.names, entry.ranks, strict=True) if rank)
        base = known.get(path)
        if base is None:
            raise IncompatibleAdapterError(
                f"the base model {type(model).__name__} has no module '{path}', which is adapted by: {adapters}.{nearest(path, known)} "
                f"{_why_absent(path, known)}"
            )
        if isinstance(base, FusedLinear):
            raise IncompatibleAdapterError(f"module '{path}' is already fused; restore the model before patching it again.")
        try:
            layer = FusedLinear(base, entry, slot, combine)
        except RoutingError as error:
            raise IncompatibleAdapterError(f"module '{path}' (adapted by: {adapters}) cannot be fused: {error}") from error
        expected, found = (entry.lora_a.shape[-1], entry.lora_b.shape[1]), (layer.in_features, layer.out_features)
        if expected != found:
            raise IncompatibleAdapterError(
                f"module '{path}' maps {found[0]} -> {found[1]} in the base model, "
                f"the adapters ({adapters}) expect {expected[0]} -> {expected[1]}; "
                "they were trained on another base model."
            )
        layer.path = path
        layers[path] = layer
    return layers
