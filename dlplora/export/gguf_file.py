"""Export as GGUF LoRA files, which llama.cpp and Ollama load with a GGUF base model.

A file holds ``general.type = adapter``, ``adapter.type = lora``, ``adapter.lora.alpha``, and ``NAME.lora_a``, ``NAME.lora_b`` for each
adapted tensor of the base model. llama.cpp multiplies by ``scale * alpha / rank``; alpha is written as the rank, so ``scale`` is a
routing weight.

For position encoding llama.cpp rotates neighbouring values of a head, transformers rotates halves. GGUF files of Llama models therefore
hold the rows of the query and key projections in another order, and the rows of B are permuted in the same way. Qwen models need no
permutation.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md) and the loader of adapters in llama.cpp (src/llama-adapter.cpp).
Shapes: K rank, I inputs, O outputs, H heads.
"""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlplora.adapters.fingerprint import check_base_names
from dlplora.atomic import replacing
from dlplora.errors import ConfigError, IncompatibleAdapterError
from dlplora.export.fused_adapter import FusedAdapter
from dlplora.export.target import describe, new_folder, require_adapter, require_free, stored
from dlplora.inference.backbones import resolve_backbone
from dlplora.inference.loading import empty_backbone

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""``model_type`` in transformers -> ``general.architecture`` in GGUF."""
_REORDERED = frozenset({"llama"})
GGUF_DTYPES = ("float32", "float16")
SUFFIX = ".gguf"


def export_gguf(
    adapter: FusedAdapter, file: str | Path, *, pretrained: str | Path | None = None, dtype: str = "float32", force: bool = False
) -> Path:
    """Write one GGUF LoRA file. Of the base model only ``config.json`` is read.

    Args:
        adapter: What to write.
        file: Name ending with ``.gguf``.
        pretrained: Base model that the adapter belongs to, as for ``FusedCausalLM.from_pretrained``; None is the embedded nano base model.
        dtype: ``float32`` or ``float16``.
        force: Replace an older file.

    Raises:
        ConfigError: If the file exists, the package ``gguf`` is missing, or the architecture or dtype is not supported.
        IncompatibleAdapterError: If the adapter was made for another base model, or adapts a tensor that GGUF files do not have.
    """
    require_adapter(adapter)
    target = Path(file)
    if target.suffix.lower() != SUFFIX:
        raise ConfigError(f"{target}: the name of a GGUF file must end with {SUFFIX}.")
    _require_free_file(target, force)
    model = _architecture(pretrained, dtype, [adapter])
    with replacing(target) as temporary:
        _write(temporary, target.stem, adapter, model, dtype)
    return target


def export_gguf_pool(
    adapters: Mapping[str, FusedAdapter],
    folder: str | Path,
    *,
    pretrained: str | Path | None = None,
    dtype: str = "float32",
    force: bool = False,
) -> Path:
    """Write several adapters as ``FOLDER/NAME.gguf``, so that a server can weight them per request.

    Arguments and errors are those of ``export_gguf``; ``folder`` is new, empty, or with ``force`` an older export.
    """
    target = Path(folder)
    require_free(target, force)
    model = _architecture(pretrained, dtype, list(adapters.values()))
    with new_folder(target, force) as temporary:
        for name, adapter in adapters.items():
            _write(temporary / f"{name}{SUFFIX}", name, adapter, model, dtype)
        describe(temporary, "gguf", adapters, dtype, ("gguf",))
    return target


def interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection in the order of llama.cpp: within a head, the two halves alternate.

    Args:
        weight: (O, K), O = num_heads * head size.
        num_heads: H; for keys the number of key heads.
    """
    rows = weight.shape[0] // num_heads
    return weight.unflatten(0, (num_heads, 2, rows // 2)).transpose(1, 2).flatten(0, 2)


def _require_free_file(target: Path, force: bool) -> None:
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; give the name of a file.")
    if target.exists():
        if not force:
            raise ConfigError(f"{target} exists; give another name, or replace it with --force (force=True).")
        with target.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ConfigError(f"{target} is not a GGUF file and is not replaced; remove it yourself.")


def _architecture(pretrained: str | Path | None, dtype: str, adapters: list[FusedAdapter]) -> Any:
    """An empty model of the base model's architecture, after every check that needs no tensor name."""
    if dtype not in GGUF_DTYPES:
        raise ConfigError(f"GGUF adapters can be written in {' or '.join(GGUF_DTYPES)}, not '{dtype}'.")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("writing GGUF files needs the package gguf: pip install gguf, or pip install 'dlplora[smollm2]'.")
    source = resolve_backbone(pretrained)
    model = empty_backbone(source)
    kind = model.config.get_text_config().model_type
    if kind not in ARCHITECTURES:
        raise ConfigError(f"adapters of a '{kind}' model cannot be written as GGUF here; supported: {', '.join(ARCHITECTURES)}.")
    for adapter in adapters:
        if adapter.pool is not None:
            check_base_names(adapter.pool, source)
            _check_sizes(adapter.pool.base_model or {}, model)
    return model


def _check_sizes(made_for: Mapping[str, Any], model: Any) -> None:
    """Compare what a pool's manifest says of its base model with a configuration."""
    config = model.config.get_text_config()
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if key in made_for and made_for[key] != getattr(config, key):
            raise IncompatibleAdapterError(
                f"the pool was made for a base model with {key} {made_for[key]}, this one has {getattr(config, key)}."
            )


def _write(path: Path, name: str, adapter: FusedAdapter, model: Any, dtype: str) -> None:
    import gguf

    config = model.config.get_text_config()
    architecture = ARCHITECTURES[config.model_type]
    kinds = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
    writer.add_name(name)
    for module, (lora_a, lora_b) in adapter.modules.items():
        tensor = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if tensor is None or (module == "lm_head" and config.tie_word_embeddings):
            raise IncompatibleAdapterError(f"module '{module}' has no tensor of its own in GGUF files of '{architecture}' models.")
        _require_size(model, module, lora_a, lora_b)
        leaf = module.rpartition(".")[2]
        if architecture in _REORDERED and leaf in {"q_proj", "k_proj"}:
            lora_b = interleaved(lora_b, config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads)
        for side, factor in (("a", lora_a), ("b", lora_b)):
            writer.add_tensor(f"{tensor}.lora_{side}", stored(f"{tensor}.lora_{side}", factor, dtype).numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        if error.errno is None:  # NumPy's: it only counts what could be written
            raise OSError(errno.EIO, f"the disk is full, or the file too large ({error})") from error
        raise


def _require_size(model: Any, module: str, lora_a: Tensor, lora_b: Tensor) -> None:
    try:
        found = tuple(model.get_submodule(module).weight.shape)
    except AttributeError as error:
        raise IncompatibleAdapterError(f"the base model has no module '{module}'; the adapters were trained on another one.") from error
    expected = (lora_b.shape[0], lora_a.shape[1])
    if found != expected:
        raise IncompatibleAdapterError(
            f"module '{module}' has a weight of {found}, the adapters need {torch.Size(expected)}; they were trained on another base model."
        )
