"""Keys and values of the running requests, one slot per request.

Requests of a batch differ in length, so each row is written at its own position and read up to the longest row; an attention mask hides the
rest. Active rows are always in the first slots, so no row is copied for a step, and one row is copied when a request leaves.

Shapes: S slots, H key-value heads, C capacity in tokens, D head width, B rows, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dlplora.errors import ConfigError
from dlplora.inference.fused_model import FusedCausalLM

GROWTH = 256
"""Tokens by which the buffers grow; they never shrink."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (S, H, C, D) each."""

    is_sliding = False

    def __init__(self, slots: int, limit: int) -> None:
        super().__init__()
        self.slots, self.limit = slots, limit
        self.first = 0
        self.positions: Tensor | None = None
        self.rows: Tensor | None = None
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate on the first call, when head count, width, dtype and device are known."""
        capacity = min(GROWTH, self.limit)
        self.keys = key_states.new_zeros(self.slots, key_states.shape[1], capacity, key_states.shape[3])
        self.values = value_states.new_zeros(self.slots, value_states.shape[1], capacity, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, H, T, D) at the rows and positions set by ``SlotCache.at``; returns the rows up to the longest one."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        if self.length > self.keys.shape[2]:
            self._grow()
        rows, length = key_states.shape[0], self.length
        keys, values = self.keys[self.first : self.first + rows, :, :length], self.values[self.first : self.first + rows, :, :length]
        if self.rows is None:  # one row has no padding: a slice costs a fraction of an index
            begin = length - key_states.shape[2]
            keys[:, :, begin:] = key_states
            values[:, :, begin:] = value_states
        else:
            keys[self.rows, :, self.positions] = key_states.transpose(1, 2)
            values[self.rows, :, self.positions] = value_states.transpose(1, 2)
        return keys, values

    def _grow(self) -> None:
        capacity = min(self.limit, -(-self.length // GROWTH) * GROWTH)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of one slot into another."""
        if self.is_initialized and source != target:
            assert self.keys is not None
            assert self.values is not None
            self.keys[target, :, :length] = self.keys[source, :, :length]
            self.values[target, :, :length] = self.values[source, :, :length]

    def erase(self, slot: int) -> None:
        """Fill a slot with zeros."""
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            self.keys[slot].zero_()
            self.values[slot].zero_()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not used: the engine passes a complete mask."""
        return self.length, 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row of the current forward, before it."""
        return self.length - (0 if self.positions is None else self.positions.shape[1])

    def get_max_length(self) -> int:
        """Tokens that a slot can hold."""
        return self.limit


class SlotCache(Cache):
    """A transformers cache over slots.

    Args:
        config: Configuration of the base model.
        slots: Rows; at least two.
        limit: Tokens of one request, prompt included.

    Raises:
        ConfigError: If the model has layers without ordinary full attention.
    """

    def __init__(self, config: Any, slots: int, limit: int) -> None:
        text = config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        if kinds != {"full_attention"} or (window is not None and window < limit):
            raise ConfigError(
                f"the server needs full attention in every layer; this model has {', '.join(sorted(kinds))}"
                + (f" and a sliding window of {window} tokens. Lower --max-model-len to it." if window else ".")
            )
        self.slots = slots
        self.slot_layers = [SlotLayer(slots, limit) for _ in range(text.num_hidden_layers)]
        super().__init__(layers=list(self.slot_layers))

    def at(self, first: int, positions: Tensor, length: int) -> None:
        """Say where the next forward writes.

        Args:
            first: First slot of the batch.
            positions: Position of each new token, int64 (B, T). Padding is written where the row's next token will be written.
            length: Largest position plus one.
        """
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None] if positions.shape[0] > 1 else None
        for layer in self.slot_layers:
            layer.first, layer.positions, layer.rows, layer.length = first, positions, rows, length

    @torch.inference_mode()  # as the forwards that made the buffers
    def move(self, source: int, target: int, length: int) -> None:
        """Copy one slot into another."""
        for layer in self.slot_layers:
            layer.move(source, target, length)

    @torch.inference_mode()
    def erase(self, slot: int) -> None:
        """Fill a slot with zeros, so that no NaN in it reaches the next request: a mask hides numbers, but not NaN."""
        for layer in self.slot_layers:
            layer.erase(slot)

    def num_bytes(self) -> int:
        """Bytes that the buffers hold now."""
        held = [tensor for layer in self.slot_layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.numel() * tensor.itemsize for tensor in held)


def causal_mask(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, T, length): a token sees the positions up to its own."""
    visible = torch.arange(length, device=positions.device)[None, None, None] <= positions[:, None, :, None]
    return torch.zeros(visible.shape, dtype=dtype, device=positions.device).masked_fill_(~visible, torch.finfo(dtype).min)


@torch.inference_mode()
def check_slots(fused: FusedCausalLM, cache: SlotCache) -> None:
    """Try two rows of unequal length in one batch against plain forwards of the same tokens.

    Raises:
        ConfigError: If the base model does not follow the positions and masks that it is given.
    """
    count = min(fused.config.get_text_config().vocab_size, 97)
    texts = [[1 + (7 * i) % (count - 1) for i in range(num)] for num in (9, 4)]
    zeros = torch.zeros(1, fused.bank.num_experts, device=fused.device)
    rows = [torch.tensor([ids], device=fused.device) for ids in texts]
    given: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    with fused.routing(fused.request_router.state(zeros)):
        wanted = torch.stack([fused(input_ids=row, use_cache=False).logits[0, -1] for row in rows])
        for slot, row in enumerate(rows):
            length = row.shape[1] - 1
            positions = torch.arange(length, device=fused.device)[None]
            cache.at(slot, positions, length)
            mask = causal_mask(positions, length, fused.dtype)
            fused(input_ids=row[:, :-1], attention_mask=mask, position_ids=positions, **given)
        positions = torch.tensor([[row.shape[1] - 1] for row in rows], device=fused.device)
        length = int(positions.max()) + 1
        cache.at(0, positions, length)
        newest, mask = torch.cat([row[:, -1:] for row in rows]), causal_mask(positions, length, fused.dtype)
        seen = fused(input_ids=newest, attention_mask=mask, position_ids=positions, **given).logits[:, -1]
    worst = float((seen - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))
    if worst > (1e-3 if fused.dtype == torch.float32 else 5e-2):
        raise ConfigError(
            f"{type(fused.model).__name__} does not compute the same logits with rows of different lengths in one batch "
            f"(relative difference {worst:.2g}); it cannot be served this way."
        )
