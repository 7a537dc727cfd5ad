"""Gradient checkpointing over a frozen base model: activations inside decoder layers are recomputed instead of kept.

transformers checkpoints only layers in training mode. Our base model stays in evaluation mode, so that none of its dropout is active.
Therefore only the flag of the decoder layers themselves is set, not that of the modules inside them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dlplora.errors import ConfigError


def recompute_activations(model: Any, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> list[nn.Module]:
    """Recompute the decoder layers of a causal LM in the backward pass.

    Args:
        model: The causal LM, changed in place.
        around: Entered in the forward pass of every layer, to set the context in which the layer runs again.

    Returns:
        The layers; ``keep_recomputing`` restores their flag after a call of ``eval()``.

    Raises:
        ConfigError: If the model does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing; set model.init_args.gradient_checkpointing to false.")
    options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), around())}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    keep_recomputing(layers)
    return layers


def keep_recomputing(layers: list[nn.Module]) -> None:
    """Set the training flag of the layers only, not of their submodules."""
    for layer in layers:
        layer.training = True
