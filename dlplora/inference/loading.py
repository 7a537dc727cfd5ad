"""Load base models: a folder, a hub id, or the embedded one; quantised or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from dlplora.errors import ConfigError
from dlplora.inference.backbones import nano_asset, resolve_backbone
from dlplora.inference.devices import resolve_dtype
from dlplora.inference.model_files import ReadingModel, check_settings, check_sizes
from dlplora.inference.quantization import bitsandbytes_config, check_widths, is_quantized

_KEPT: ContextVar[dict[Any, tuple[Any, Any]] | None] = ContextVar("kept base models", default=None)


@contextmanager
def backbones_kept() -> Iterator[None]:
    """Inside the block ``load_backbone`` gives the same objects for the same arguments.

    One fused model at a time: a second one finds the first one's layers and is refused, until the first is closed.
    """
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def method_asset(role: str, preset: str, runs: Path | None = None) -> Path:
    """Folder of the asset that a preset reads in a role, embedded or in ``runs``; trained gates are its own."""
    name = f"trained/{preset}" if role == "trained" else role
    return nano_asset(name) if runs is None else runs / name


def load_backbone(
    name: str | Path | None, *, dtype: str | torch.dtype = "float32", device: torch.device | str = "cpu", **options: Any
) -> tuple[Any, Any]:
    """A causal LM in eval mode and its tokenizer, from a folder or the hub, or kept from before (``backbones_kept``).

    Args:
        name: What ``resolve_backbone`` takes: model folder, GGUF file, short name or hub id; None is the embedded nano base model.
        dtype: Of weights and products; of what is not quantised in a quantised model. ``auto``: see ``resolve_dtype``.
        device: Where the model goes.
        options: Of ``read_backbone``: revision, quantisation, attention, ``trust_remote_code``.

    Raises:
        ConfigError: If it is not found or cannot be loaded; one line with what was looked for, where, and how to supply it.
    """
    source, kept = resolve_backbone(name), _KEPT.get()
    torch_dtype = resolve_dtype(dtype, device, None if name is None else source, options.get("revision"))
    key = (source, torch_dtype, str(torch.device(device)), repr(sorted(options.items(), key=lambda pair: pair[0])))
    if kept is not None and key in kept:
        return kept[key]
    loaded = read_backbone(source, torch_dtype, device, **options)
    if kept is not None:
        kept[key] = loaded
    return loaded


def read_backbone(
    source: str,
    torch_dtype: torch.dtype,
    device: torch.device | str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization_config: Any = None,
    attn_implementation: str | None = None,
    **bits: Any,
) -> tuple[Any, Any]:
    """Read model and tokenizer; always new objects.

    Args:
        source: What ``resolve_backbone`` returns.
        torch_dtype: Dtype.
        device: Where the model goes.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Whether code of the model's repository may run.
        quantization_config: Any quantisation configuration of transformers.
        attn_implementation: As in transformers: ``eager``, ``sdpa``, ``flash_attention_2``; None leaves it to transformers.
        bits: ``load_in_4bit``, ``load_in_8bit`` and the ``bnb_4bit_*`` settings; see ``bitsandbytes_config``.

    Raises:
        ConfigError: As ``load_backbone``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

    quantised = bitsandbytes_config(torch_dtype, **bits)
    if quantised is not None and quantization_config is not None:
        raise ConfigError("give quantization_config, or load_in_4bit / load_in_8bit; not both.")
    quantised = quantised or quantization_config
    found: dict[str, Any] = {"trust_remote_code": trust_remote_code, **({} if Path(source).is_dir() else {"revision": revision})}
    options: dict[str, Any] = {"dtype": torch_dtype, "attn_implementation": attn_implementation, "quantization_config": quantised}
    options = {key: value for key, value in options.items() if value is not None}
    with ReadingModel(source, revision):
        stored, _ = PreTrainedConfig.get_config_dict(source, **found)
        check_sizes(stored, source)
        if quantised is not None or "quantization_config" in stored:
            options["device_map"] = {"": torch.device(device)}  # quantised weights are made where they stay
        tokenizer = AutoTokenizer.from_pretrained(source, **found)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **found, **options)
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"base model '{source}': {len(missing)} weights are not in its files, the first is {missing[0]}; they would be random. "
            "Pass a complete causal language model."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_settings(model, tokenizer, source)
    check_widths(model)
    model.hub_commit = hub_commit(source, revision)
    return (model if is_quantized(model) else model.to(torch.device(device))).eval(), tokenizer


def hub_commit(source: str, revision: str | None) -> str | None:
    """The commit of a hub id's revision in the cache; None for a local folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return None
    file = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def empty_backbone(source: str, revision: str | None = None) -> Any:
    """The architecture of a base model without its weights (on the ``meta`` device), from its ``config.json``.

    Raises:
        ConfigError: As ``load_backbone``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with ReadingModel(source, revision):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **({} if Path(source).is_dir() else {"revision": revision}))
        check_sizes(config.to_dict(), source)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
