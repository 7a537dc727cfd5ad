"""Check, by a forward pass of two short rows, that a model uses its fused layers as linear layers.

PEFT's rule is ``layer(x) = base(x) + scaling * B A x`` for every vector x of a row. It cannot hold if a model reads the weight of a layer
instead of calling the layer. Rows can be routed separately only if it is known which vectors belong to which row. Both are found by running
the model when the layers are put in; there is no list of architectures.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dlplora.errors import IncompatibleAdapterError
from dlplora.modules.fused_linear import FusedLinear
from dlplora.modules.input_layout import Layout
from dlplora.modules.routing_slot import RoutingSlot
from dlplora.modules.routing_state import RoutingState

log = logging.getLogger(__name__)

ROWS, TOKENS = 2, 4
"""Different numbers, so that rows and tokens cannot be mistaken for each other."""
ORDER_TOLERANCE = 0.05
"""Tolerance, relative to the largest input: rounding (1e-2 in bfloat16) is below it, another order of the tokens is not."""
_CANNOT_RUN = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, AssertionError)
"""Errors of a model that needs other inputs than token ids, or an attribute that a layer does not have."""


@dataclass
class Seen:
    """Inputs of one layer in a forward pass: their shapes and, of flattened ones, the values."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


def try_fit(model: nn.Module, layers: Mapping[str, FusedLinear], slot: RoutingSlot) -> list[Any]:
    """Run two rows through a patched model and note in every layer how it receives them.

    Models that are not from transformers, or with absent weights (offloaded, on the ``meta`` device), are not run.
    Weights, random states and training flags do not change.

    Args:
        model: A causal LM; its layers have been replaced by ``layers``.
        layers: By module path.
        slot: Of the layers.

    Returns:
        Handles of the hooks that flattened inputs need; to be removed with the layers.

    Raises:
        IncompatibleAdapterError: If the model reads the weight of a layer instead of calling it, or runs only without the layers.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not layers or any(one.device.type == "meta" for one in model.parameters()):
        return []
    ids = _token_ids(model)
    seen = _run(model, layers, slot, ids)
    if seen is None:
        return []
    layouts = _layouts(type(model).__name__, layers, seen)
    flat = {path: layers[path] for path, layout in layouts.items() if layout == "flat"}
    alone = [_run(model, flat, slot, ids[row : row + 1], keep=True) for row in range(ROWS)] if flat else []
    together = _run(model, flat, slot, ids, keep=True) if flat else None
    for path, layer in layers.items():
        layer.layout = layouts[path]
        if path in flat and not _in_order(path, together, alone):
            layer.layout = "other"
    needed = [layer for layer in flat.values() if layer.layout == "flat"]
    for layer in needed:
        layer.grid = needed[0].grid
    return [model.get_input_embeddings().register_forward_pre_hook(needed[0].grid.note)] if needed else []


def try_shapes(model: nn.Module, layers: Mapping[str, FusedLinear], slot: RoutingSlot) -> bool:
    """As ``try_fit``, with a model on the ``meta`` device: shapes only, no number is computed.

    Returns:
        Whether the model could be run; some models read values, which are absent there.

    Raises:
        IncompatibleAdapterError: As ``try_fit``.
    """
    seen = _run(model, layers, slot, _token_ids(model))
    if seen is not None:
        _layouts(type(model).__name__, layers, seen)
    return seen is not None


def _token_ids(model: Any) -> Tensor:
    ids = torch.arange(1, ROWS * TOKENS + 1, device=model.device).view(ROWS, TOKENS)
    return ids % int(model.config.get_text_config().vocab_size)


def _arguments(model: Any, ids: Tensor) -> dict[str, Any]:
    wanted = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    accepted = inspect.signature(model.forward).parameters
    anything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in accepted.values())
    return {key: value for key, value in wanted.items() if anything or key in accepted}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, random numbers and gradients; every training flag is restored."""
    training = [module for module in model.modules() if module.training]
    devices = [model.device] if getattr(model.device, "type", "") == "cuda" else []
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module in training:
            module.training = True


def _run(model: nn.Module, layers: Mapping[str, FusedLinear], slot: RoutingSlot, ids: Tensor, keep: bool = False) -> dict[str, Seen] | None:
    """What the layers receive in a forward pass under zero weights; None if the model cannot be run on token ids.

    Raises:
        IncompatibleAdapterError: If it can be run without the layers only.
    """
    seen = {path: Seen() for path in layers}
    hooks = [layer.register_forward_hook(_noting(layer, seen[path], keep)) for path, layer in layers.items()]
    fused = [module for module in model.modules() if isinstance(module, FusedLinear)]
    state = RoutingState(torch.zeros(fused[0].lora_a.shape[0], device="cpu"), "dense")
    for layer in fused:
        layer.weight_was_read = False
    try:
        with _evaluating(model), slot.bind(state):
            model(**_arguments(model, ids))
    except IncompatibleAdapterError:
        raise
    except _CANNOT_RUN as error:
        if _runs_without(model, fused, ids):
            raise IncompatibleAdapterError(
                f"{type(model).__name__} runs without adapters but not with them: {' '.join(str(error).split())}"
            ) from error
        log.debug("%s cannot be tried on token ids: %s", type(model).__name__, error)
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _noting(layer: FusedLinear, seen: Seen, keep: bool) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0]
        if not isinstance(output, Tensor) or output.shape != (*x.shape[:-1], layer.out_features):
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise IncompatibleAdapterError(
                f"module '{layer.path}' ({type(layer.base).__name__}) is not a linear layer: it returns {found} for {tuple(x.shape)}."
            )
        seen.shapes.append(tuple(x.shape))
        if keep:
            seen.values.append(x.detach().float())

    return note


def _runs_without(model: nn.Module, fused: list[FusedLinear], ids: Tensor) -> bool:
    """Whether the model runs with the base layers in place; the fused layers are restored afterwards."""
    parents = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children() if child in fused]
    for parent, name, child in parents:
        setattr(parent, name, child.base)
    try:
        with _evaluating(model):
            model(**_arguments(model, ids))
    except _CANNOT_RUN:
        return False
    finally:
        for parent, name, child in parents:
            setattr(parent, name, child)
    return True


def _layouts(model: str, layers: Mapping[str, FusedLinear], seen: Mapping[str, Seen]) -> dict[str, Layout]:
    found: dict[str, Layout] = {}
    for path, layer in layers.items():
        shapes = seen[path].shapes
        if not shapes and layer.weight_was_read:
            raise IncompatibleAdapterError(
                f"{model} reads the weight of '{path}' and never calls the layer, so an adapter on it has no effect there. "
                "Leave it out of the adapter's target_modules."
            )
        if not shapes:
            found[path] = "unknown"
        elif all(len(shape) >= 3 and shape[0] == ROWS for shape in shapes):
            found[path] = "rows"
        else:
            found[path] = "flat" if shapes == [(ROWS * TOKENS, layer.in_features)] else "other"
    return found


def _in_order(path: str, together: Mapping[str, Seen] | None, alone: list[dict[str, Seen] | None]) -> bool:
    """Whether the flattened input of two rows is that of the first row, then that of the second."""
    parts = [seen[path].values for seen in alone if seen is not None]
    if together is None or len(parts) != ROWS or any(len(values) != 1 for values in parts):
        return False
    whole, expected = together[path].values[0], torch.cat([values[0] for values in parts])
    return whole.shape == expected.shape and bool((whole - expected).abs().max() <= ORDER_TOLERANCE * whole.abs().max())
