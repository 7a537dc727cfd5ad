"""4-bit and 8-bit base models through transformers' quantisation configurations.

The fused layer calls the base module and never reads its weight, so any storage format works.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from dlplora.errors import ConfigError

_CPU_BLOCK, _CPU_ROWS = 64, 32
"""What bitsandbytes packs 4-bit weights in for CPUs with AVX512-BF16 (``_convert_weight_packed_for_cpu``, 0.50.2)."""


class _OnceEach(logging.Filter):
    """Lets each message pass once: bitsandbytes repeats one per layer and forward pass when the input is not float16."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in self.said
        self.said.add(text)
        return new


def _say_once() -> None:
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(known, _OnceEach) for known in logger.filters):
        logger.addFilter(_OnceEach())


def is_installed(package: str) -> bool:
    """Whether a package (or a module of a namespace package) can be imported; nothing is imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def bitsandbytes_config(
    dtype: torch.dtype,
    *,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    bnb_4bit_quant_type: str = "nf4",
    bnb_4bit_compute_dtype: str | None = None,
    bnb_4bit_use_double_quant: bool = False,
) -> Any:
    """A transformers ``BitsAndBytesConfig``; None if neither 4 nor 8 bits are requested.

    Args:
        dtype: Dtype of the rest of the model, and of 4-bit products unless ``bnb_4bit_compute_dtype`` names another.
        load_in_4bit, load_in_8bit, bnb_4bit_quant_type, bnb_4bit_compute_dtype, bnb_4bit_use_double_quant: As in transformers, and as in
            lm-eval's ``--model hf``.

    Raises:
        ConfigError: If both are requested, a value is unknown, or bitsandbytes is not installed.
    """
    if not load_in_4bit and not load_in_8bit:
        return None
    if load_in_4bit and load_in_8bit:
        raise ConfigError("load_in_4bit and load_in_8bit exclude each other; give one of them.")
    if bnb_4bit_quant_type not in {"nf4", "fp4"}:
        raise ConfigError(f"unknown bnb_4bit_quant_type '{bnb_4bit_quant_type}'. Known: nf4, fp4.")
    compute = dtype if bnb_4bit_compute_dtype is None else getattr(torch, bnb_4bit_compute_dtype.removeprefix("torch."), None)
    if not isinstance(compute, torch.dtype) or not compute.is_floating_point:
        raise ConfigError(f"unknown bnb_4bit_compute_dtype '{bnb_4bit_compute_dtype}'. Known: float32, float16, bfloat16.")
    if not is_installed("bitsandbytes"):
        bits = 4 if load_in_4bit else 8
        raise ConfigError(f"{bits}-bit loading needs the package bitsandbytes, which is not installed: pip install 'dlplora[quant]'.")
    from transformers import BitsAndBytesConfig

    _say_once()
    return BitsAndBytesConfig(
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        bnb_4bit_quant_type=bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=bnb_4bit_use_double_quant,
    )


def is_quantized(model: Any) -> bool:
    """Whether transformers loaded the model through a quantiser."""
    return getattr(model, "hf_quantizer", None) is not None or bool(getattr(model, "is_quantized", False))


def check_widths(model: nn.Module) -> None:
    """Refuse 4-bit layers that bitsandbytes' kernel for this CPU cannot serve; it would fail in the first forward.

    Raises:
        ConfigError: Naming the first such layer and its sizes.
    """
    for path, layer in model.named_modules():
        if not getattr(layer, "support_avx512bf16_for_cpu", False) or layer.weight.device.type != "cpu":
            continue
        block = int(getattr(layer.weight, "blocksize", _CPU_BLOCK))
        if layer.in_features % block or layer.out_features % _CPU_ROWS:  # type: ignore[operator]
            raise ConfigError(
                f"4-bit products on this CPU need inputs in multiples of {block} and outputs in multiples of {_CPU_ROWS}; "
                f"'{path}' maps {layer.in_features} -> {layer.out_features}. Use load_in_8bit, or a GPU."
            )
