"""Export as a checkpoint with the adapters added to the weights, which plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlplora.adapters.fingerprint import check_backbone
from dlplora.atomic import save_tokenizer, tensors_written_to
from dlplora.errors import IncompatibleAdapterError, nearest
from dlplora.export.fused_adapter import FusedAdapter
from dlplora.export.target import describe, new_folder, require_adapter, require_dtype, require_free, stored
from dlplora.inference.backbones import resolve_backbone
from dlplora.inference.loading import read_backbone
from dlplora.kernels.merged import unreadable


def export_merged(
    adapter: FusedAdapter,
    folder: str | Path,
    *,
    pretrained: str | Path | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    force: bool = False,
) -> Path:
    """Load the base model in float32 on the CPU, add the adapter to its weights, and save model and tokenizer.

    Args:
        adapter: What to merge.
        folder: New or empty folder.
        pretrained: Base model as for ``FusedCausalLM.from_pretrained``; None is the embedded nano base model.
        revision: Of a hub id.
        dtype: Precision of the saved weights; the sum is made in float32.
        force: Replace an older export.

    Raises:
        ConfigError: If the folder is taken, or the base model cannot be loaded.
        IncompatibleAdapterError: If the adapter was made for another base model, or a layer's weight cannot be read (4-bit, 8-bit).
        AdapterError: If the dtype cannot hold the values.
    """
    require_adapter(adapter)
    target = Path(folder)
    require_free(target, force)
    saved_as = require_dtype(dtype)
    source = resolve_backbone(pretrained)
    model, tokenizer = read_backbone(source, torch.float32, "cpu", revision=revision)
    if adapter.pool is not None:
        check_backbone(adapter.pool, model, source)
    merge_into(model, adapter)
    for name, parameter in model.named_parameters():
        stored(name, parameter.detach(), dtype)
    model.to(saved_as)
    with tensors_written_to(target), new_folder(target, force) as temporary:
        model.save_pretrained(temporary)
        save_tokenizer(tokenizer, temporary)
        describe(temporary, "merged", {target.name: adapter}, dtype, ("transformers",))
    return target


@torch.no_grad()
def merge_into(model: Any, adapter: FusedAdapter) -> None:
    """Add an adapter to the weights of a model, in place. A layer that shares its weight with another one gets a weight of its own.

    Raises:
        IncompatibleAdapterError: If a module is missing, is not a plain linear layer, or has other sizes; the model may be half merged.
    """
    known = dict(model.named_modules())
    for path in adapter.modules:
        module = known.get(path)
        if module is None:
            raise IncompatibleAdapterError(
                f"the base model {type(model).__name__} has no module '{path}'.{nearest(path, known)} "
                "The adapters were trained on another base model."
            )
        reason = unreadable(module)
        if reason is not None:
            raise IncompatibleAdapterError(f"module '{path}' cannot be merged into: {reason}. Pass the base model without quantisation.")
        transposed = type(module) is not nn.Linear  # Conv1D stores (I, O)
        delta = adapter.delta(path).T if transposed else adapter.delta(path)
        if delta.shape != module.weight.shape:
            raise IncompatibleAdapterError(
                f"module '{path}' has a weight of {tuple(module.weight.shape)}, the adapters need {tuple(delta.shape)}; "
                "they were trained on another base model."
            )
        _unshare(model, module)
        module.weight.add_(delta.to(module.weight.dtype))


def _unshare(model: Any, module: Any) -> None:
    """Give a module its own copy of a weight that other modules use too (an output layer tied to the embedding)."""
    weight: Tensor = module.weight
    users = sum(parameter is weight for _, parameter in model.named_parameters(remove_duplicate=False))
    if users > 1:
        module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        for config in {id(one): one for one in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
