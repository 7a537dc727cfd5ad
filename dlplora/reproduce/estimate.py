"""Estimate what a run needs before it starts: parameters, memory, tokens, disk. From shapes only; nothing is loaded or measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlplora.errors import ConfigError
from dlplora.inference.model_files import ReadingModel
from dlplora.inference.shapes import ModelShape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CHARS_PER_TOKEN = 4.0
TOKENS_PER_ROW_UNSEEN = 300
"""Assumed where the rows are not at hand."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Sizes of a base model and of one adapter over it."""

    parameters: int
    adapter_parameters: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    kv_size: int
    """Width of keys (and of values) of one layer."""


def shape_of(source: str | None, given: ModelShape | None, *, rank: int, targets: Sequence[str]) -> ModelSize:
    """Sizes from ``config.json`` (a folder, or the hub's cache), or from sizes that are given; built on the meta device, no weights.

    Args:
        source: Folder or hub id; None if only sizes are known.
        given: Published sizes, used instead of ``source``.
        rank, targets: Of the adapters.

    Raises:
        ConfigError: If neither is to be had.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = None
    if given is not None:
        config = given.config()
    elif source is not None:
        with ReadingModel(source):
            config = AutoConfig.from_pretrained(source)
    if config is None:
        raise ConfigError("neither a base model nor its sizes are known; nothing can be estimated.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.rsplit(".", 1)[-1] in targets]
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        adapter_parameters=sum(rank * (m.in_features + m.out_features) for m in linears),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        kv_size=head_size * (getattr(config, "num_key_value_heads", None) or heads),
    )


def training_memory(shape: ModelSize, *, batch_size: int, length: int, dtype: str, size: int = 1) -> int:
    """Bytes while one adapter trains: weights, the adapter with gradient and two moments in float32, and activations.

    ``size`` is the adapter's, in adapters of one expert.

    Activations: (34 + 5 a s / h) s b h bytes per layer at two bytes a number, nothing recomputed and attention written out.

    Source: Korthikanti et al., arXiv:2205.05198, equation 2 (without tensor parallelism).
    """
    width = BYTES[dtype]
    per_layer = (34 + 5 * shape.num_heads * length / shape.hidden_size) * length * batch_size * shape.hidden_size
    return int(shape.parameters * width + size * shape.adapter_parameters * 16 + per_layer * shape.num_layers * width / 2)


def evaluation_memory(shape: ModelSize, *, num_experts: int, batch_size: int, length: int, dtype: str) -> int:
    """Bytes while a full batch is scored or decoded: weights, all experts, keys and values, and the logits of every position."""
    size = BYTES[dtype]
    weights = shape.parameters + num_experts * shape.adapter_parameters
    cache = 2 * shape.num_layers * shape.kv_size * batch_size * length
    return int(size * (weights + cache + batch_size * length * shape.vocab_size))


def tokens_per_row(lengths_in_chars: Sequence[int]) -> float:
    """Mean tokens of a row, by four characters per token; an assumption where no row is at hand."""
    if not lengths_in_chars:
        return TOKENS_PER_ROW_UNSEEN
    return sum(lengths_in_chars) / len(lengths_in_chars) / CHARS_PER_TOKEN


def amount(number: float, unit: str) -> str:
    """A number of bytes or tokens for people.

    >>> amount(3_100_000_000, "B"), amount(2_500_000, "tokens")
    ('3.1 GB', '2.5 M tokens')
    """
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {prefix}{unit}" if unit == "B" else f"{number / limit:.1f} {prefix} {unit}"
    return f"{number:.0f} {unit}"


def lines(
    shape: ModelSize,
    *,
    num_experts: int,
    training: Mapping[str, Mapping[str, int]],
    rows: Sequence[int],
    protocol: Mapping[str, Any],
    dtype: str,
) -> Iterator[str]:
    """The announcement.

    Args:
        shape: Of the base model.
        num_experts: Tasks.
        training: Kind of training -> ``batch_size``, ``num_steps``, ``runs``, ``max_length``, and the ``size`` of what is trained, in
            adapters of one expert; gates count as one.
        rows: Characters of the rows at hand; empty if there are none.
        protocol: ``batch_size`` and ``max_length`` of the evaluation.
        dtype: Of the base model.
    """
    mean = tokens_per_row(rows)
    source = "of the rows at hand" if rows else "assumed: the rows are not at hand"
    sizes = [amount(number, "parameters") for number in (shape.parameters, shape.adapter_parameters)]
    yield f"base model {sizes[0]}, one adapter {sizes[1]}, {amount(num_experts, 'experts' if num_experts != 1 else 'expert')}"
    yield f"about {mean:.0f} tokens a row ({source})"
    for kind, one in training.items():
        tokens = one["batch_size"] * one["num_steps"] * one["runs"] * mean
        memory = training_memory(
            shape, batch_size=one["batch_size"], length=min(one["max_length"], round(2 * mean)), dtype=dtype, size=one["size"]
        )
        what = f"{one['runs']} x {one['num_steps']} steps of {one['batch_size']} rows"
        yield f"training {kind}: {what}, about {amount(tokens, 'tokens')}, {amount(memory, 'B')}"
    length = protocol["max_length"] or round(4 * mean)
    memory = evaluation_memory(shape, num_experts=num_experts, batch_size=protocol["batch_size"], length=length, dtype=dtype)
    yield f"evaluation in batches of {protocol['batch_size']} up to {length} tokens: at most {amount(memory, 'B')}"
    kept = sum(one["runs"] * one["size"] for one in training.values())
    disk = 4 * shape.adapter_parameters * kept * 7 + BYTES[dtype] * shape.parameters
    yield f"disk: about {amount(disk, 'B')} (weights, adapters, resume files of two states each)"
