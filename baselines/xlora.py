"""X-LoRA: a head on the base model's last hidden state weighs the experts (Buehler and Buehler, arXiv:2402.07148).

Two passes over the same tokens. First the base model without adapters: last hidden states h (B, T, D). Then ``w = softmax(head(h) /
temperature)``, one vector per token for the whole model (``layerwise``: one per layer), and the second pass uses them. Only the head is
trained.

* ``xlora`` decodes with a cache: the first pass keeps a cache of its own, tied to the request's, so a token costs two forward passes of one
  token. PEFT's class reads the whole prefix twice at every token, without a cache.
* ``xlora_frozen`` computes the weights once, at the prompt's last token, and keeps them: X-LoRA at prompt level. (mistral.rs calls
  kept weights "non-granular" and keeps them after a set number of generated tokens.)

Deviations: depth 1 only (one linear head, PEFT's default). ``scaling_pass_value`` is 0: the first pass is exactly the base model, and no
gradient runs through it. Top-k masking is left out; PEFT's does not renormalise.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlplora.errors import ConfigError, GenerationError
from dlplora.methods.base import FusedModel, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.per_thread import PerThread, nothing
from dlplora.modules.routing_state import RoutingState
from dlplora.types import PromptBatch

from ._gates import TRAINED_NEEDS, TrainedGates, drawn, hidden_size

PAPER = "https://arxiv.org/abs/2402.07148"
REARRANGING = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices")
"""What ``generate`` may do to a request's cache directly; the first pass's cache follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class XLoRAConfig:
    """X-LoRA's settings."""

    layerwise: bool = False
    """Whether every adapted layer has weights of its own."""
    temperature: float = 1.0
    """Divides the head's logits."""
    global_scaling_weight: float = 1.0
    """Multiplies the experts' sum; 0 is the base model."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"'temperature' must be positive, got {self.temperature}.")


class XLoRA(TrainedGates):
    """Token-level weights from the base model's own reading."""

    name = "xlora"
    metadata = Metadata(
        title="X-LoRA", paper=PAPER, granularity="token", depth="model", needs=TRAINED_NEEDS, trainable=True, weight_sum="any"
    )
    Config = XLoRAConfig
    evaluation_params = ("temperature", "global_scaling_weight")

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Note sizes; forget other requests."""
        self._width = hidden_size(context)
        self._modules_in_order = tuple(bank.modules)
        self._pass = PerThread(reading=bool, weights=nothing)
        self._caches: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        return super().prepare(bank, context)

    def build(self, bank: AdapterBank, seed: int) -> None:
        """A linear head: (E, D) and (E,), or as many a layer, within the bounds of ``nn.Linear``."""
        layers = self._modules_in_order if self.config.layerwise else ("all",)
        rows = [drawn(bank, self._width, self._width**-0.5, self.name, seed, layer) for layer in layers]
        self.weight = nn.Parameter(torch.stack(rows))
        self.bias = nn.Parameter(torch.zeros(len(layers), bank.num_experts))

    def weigh(self, hidden: Tensor) -> Tensor:
        """Weights (L, B, T, E) from last hidden states (B, T, D); L is 1 unless ``layerwise``."""
        logits = torch.einsum("btd,led->lbte", hidden.float(), self.weight) + self.bias[:, None, None]
        return (logits / self.config.temperature).softmax(dim=-1) * self.config.global_scaling_weight

    def attach(self, model: FusedModel) -> None:
        """Read with the base model before every pass of the decoder."""
        super().attach(model)
        decoder = model.model.base_model
        model.patched.hooks.append(decoder.register_forward_pre_hook(self._before, with_kwargs=True))

    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self._pass.reading:
            return None
        config: Any = decoder.config
        wanted = kwargs.get("use_cache")
        if kwargs.get("past_key_values") is None and (config.use_cache if wanted is None else wanted):
            from transformers import DynamicCache

            kwargs = {**kwargs, "past_key_values": DynamicCache(config=config)}
        own = self._own_cache(kwargs.get("past_key_values"), config)
        self._pass.reading = True
        try:
            with torch.no_grad():
                hidden = decoder(*args, **{**kwargs, "past_key_values": own, "use_cache": own is not None}).last_hidden_state
        finally:
            self._pass.reading = False
        self._pass.weights = self.weigh(hidden)
        return args, kwargs

    def _own_cache(self, cache: Any, config: Any) -> Any:
        """The first pass's cache of a request; it is freed and rearranged together with the request's cache."""
        from transformers import DynamicCache

        if cache is None:
            return None
        if not isinstance(cache, DynamicCache):
            raise GenerationError(f"method '{self.name}' keeps a second cache and needs DynamicCache, got {type(cache).__name__}.")
        own = self._caches.get(cache)
        if own is None:
            own = DynamicCache(config=config)
            self._caches[cache] = own
            for name in REARRANGING:
                if hasattr(cache, name):
                    setattr(cache, name, _both(getattr(cache, name), getattr(own, name)))
        if own.get_seq_length() != cache.get_seq_length():
            raise GenerationError(
                f"method '{self.name}': the request's cache holds {cache.get_seq_length()} tokens, the first pass has read "
                f"{own.get_seq_length()}; a cache filled elsewhere cannot be continued. Start from the prompt."
            )
        return own

    def gate(self, module: str, x: Tensor) -> Tensor:
        """Zeros in the first pass, the head's weights in the second."""
        weights = self._pass.weights
        if self._pass.reading or weights is None:
            return x.new_zeros((1, 1, self.bias.shape[-1]), dtype=torch.float32)
        return weights[self._modules_in_order.index(module) if self.config.layerwise else 0]  # type: ignore[no-any-return]


def _both(first: Any, second: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        second(*args, **kwargs)
        return first(*args, **kwargs)

    return call


class XLoRAFrozen(TrainedGates):
    """The head reads the prompt once, and its weights stay."""

    name = "xlora_frozen"
    metadata = Metadata(
        title="X-LoRA, weights of the prompt", paper=PAPER, granularity="prompt", depth="model", needs=TRAINED_NEEDS, trainable=True
    )

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Note the width of the hidden states."""
        self._width = hidden_size(context)
        return super().prepare(bank, context)

    def build(self, bank: AdapterBank, seed: int) -> None:
        """A linear head: (E, D) and (E,)."""
        self.weight = nn.Parameter(drawn(bank, self._width, self._width**-0.5, self.name, seed))
        self.bias = nn.Parameter(torch.zeros(bank.num_experts))

    def attach(self, model: FusedModel) -> None:
        """Keep a way to the base model; no gates."""
        self._model = (model,)  # inside a tuple, so that nn.Module does not register it

    def route(self, prompts: PromptBatch) -> Tensor:
        """Weights (B, E). Every prompt is read alone and without padding, so that batches cannot change a bit."""
        (model,) = self._model
        zeros = RoutingState(torch.zeros(len(self.expert_names), device=model.device), "dense")
        rows = []
        with torch.no_grad(), model.slot.bind(zeros):
            for ids, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True):
                row = ids[mask.bool()][None].to(model.device)
                rows.append(model.model.base_model(input_ids=row, use_cache=False).last_hidden_state[0, -1].float())
        return (torch.stack(rows) @ self.weight.T + self.bias).softmax(dim=-1)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The answers under the prompt's weights."""
        return batch["answer_loss"](self.route(batch["prompts"]))  # type: ignore[no-any-return]
