"""4-bit and 8-bit backbones through transformers' quantisation configurations.

The fused layer calls the base module and never reads its weight, so it does not matter how that weight is stored.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from dlplora.errors import ConfigError

PACKAGES = ("bitsandbytes", "torchao", "optimum.quanto", "gptqmodel", "hqq", "compressed_tensors")
"""Packages that transformers' quantisation configurations may ask for."""


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
    """A transformers ``BitsAndBytesConfig``; None if neither 4 nor 8 bits are asked for.

    Args:
        dtype: Dtype of the rest of the model, and of 4-bit products unless ``bnb_4bit_compute_dtype`` names another.
        load_in_4bit, load_in_8bit, bnb_4bit_quant_type, bnb_4bit_compute_dtype, bnb_4bit_use_double_quant: As in transformers, and as in
            lm-eval's ``--model hf``.

    Raises:
        ConfigError: If both are asked for, a value is unknown, or bitsandbytes is not installed.
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
