"""Options of lm-eval's Hugging Face model in ``--model_args``, checked before anything is loaded. lm-eval does not check them.

For example, a batch size of -1 would give an evaluation without questions and exit code 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from dlplora.config import build
from dlplora.errors import ConfigError
from dlplora.inference.devices import require_device
from dlplora.lm_eval.distributed import usable_device

DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessOptions:
    """They mean what they mean for ``--model hf``; None leaves lm-eval's default."""

    batch_size: int | str | None = None
    """Rows per forward pass, ``auto``, or ``auto:N`` (found out again N times); from the command line it comes as text."""
    max_batch_size: int | str | None = None
    """Where ``auto`` begins."""
    max_length: int | None = None
    """Context in tokens."""
    softmax_dtype: str | None = None
    """Dtype of log-probabilities."""
    mixed_precision_dtype: str | None = None
    """Dtype of autocast."""
    add_bos_token: bool | None = None
    """Whether texts begin with the beginning-of-text token."""
    prefix_token_id: int | None = None
    """The token that replaces an empty context."""
    think_end_token: int | str | None = None
    """What ends the thinking of a model."""
    enable_thinking: bool | None = None
    """For the chat template."""
    chat_template_args: dict[str, Any] | None = None
    """For the chat template."""

    def __post_init__(self) -> None:
        for name, least in (("max_batch_size", 1), ("max_length", 1), ("prefix_token_id", 0)):
            value = getattr(self, name)
            if value is not None and _whole(value) < least:
                raise ConfigError(f"--model_args: '{name}' must be a whole number of at least {least}, got {value!r}.")
        if self.batch_size is not None and not re.fullmatch(r"auto(:[1-9]\d*)?", str(self.batch_size)) and _whole(self.batch_size) < 1:
            raise ConfigError(f"--model_args: 'batch_size' must be a whole number of at least 1, auto or auto:N, got {self.batch_size!r}.")
        for name in ("softmax_dtype", "mixed_precision_dtype"):
            if getattr(self, name) not in {None, *DTYPES}:
                raise ConfigError(f"--model_args: unknown {name} '{getattr(self, name)}'. Known: {', '.join(DTYPES)}.")
        if self.enable_thinking and self.think_end_token is None:
            raise ConfigError("--model_args: enable_thinking needs think_end_token, to know where the answer begins.")


HARNESS_OPTIONS = tuple(option.name for option in fields(HarnessOptions))


def _whole(value: int | str) -> int:
    """The number that is written, -1 for anything else."""
    return int(value) if re.fullmatch(r"\d+", str(value)) else -1


def parse_harness_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options among some keyword arguments, checked; those that are None are left out.

    Raises:
        ConfigError: For a value that the option cannot have.
    """
    given = {key: value for key, value in values.items() if key in HARNESS_OPTIONS and value is not None}
    for key, value in given.items():
        if isinstance(value, float) and value.is_integer():
            given[key] = int(value)  # lm-eval reads -1 as -1.0
        elif isinstance(value, torch.dtype):
            given[key] = str(value)
        if key.endswith("_dtype"):
            given[key] = str(given[key]).removeprefix("torch.")
    build(HarnessOptions, given, "--model_args")
    return {key: int(value) if key.endswith("batch_size") and _whole(value) > 0 else value for key, value in given.items()}


def present_device(name: str | None) -> torch.device:
    """``usable_device``; an error if this machine does not have it.

    Raises:
        ConfigError: If the name is not a device that a model can run on here.
    """
    return require_device(usable_device(name))


def require_fit(options: Mapping[str, Any], config: Any, num_tokens: int) -> None:
    """Refuse what only the loaded model shows to be wrong.

    Args:
        options: As ``parse_harness_options`` gave them.
        config: Of the base model.
        num_tokens: Of the tokenizer.

    Raises:
        ConfigError: If the context is longer than a table of positions, or the prefix token does not exist. Rotary positions have no
            table, so a longer context is the user's to judge.
    """
    positions = getattr(config, "max_position_embeddings", None)  # also the name of what GPT-2 calls n_positions
    length = options.get("max_length")
    if length is not None and positions is not None and length > positions and getattr(config, "rope_parameters", None) is None:
        raise ConfigError(
            f"--model_args: 'max_length' is {length}, but the base model has {positions} positions. Lower it, or leave it out."
        )
    prefix = options.get("prefix_token_id")
    if prefix is not None and prefix >= num_tokens:
        raise ConfigError(f"--model_args: 'prefix_token_id' is {prefix}, but the tokenizer has {num_tokens} tokens, numbered from 0.")
