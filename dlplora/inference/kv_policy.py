"""What happens to cached keys and values when a row is re-routed (``kv_policy``).

The keys and values of a token were computed under the routing weights in use at that time. After a re-route

* ``stale`` (default) keeps them all; nothing is computed again;
* ``recompute`` runs the row's whole prefix, prompt and generated text, again under the new weights and replaces its entries, as if the
  new weights had been used from the first token;
* ``prompt_frozen`` keeps the keys and values of the *prompt*, and computes those of the generated text again under the new weights.

The newest token has not been processed yet; under every policy it is processed under the new weights. Only rows that were re-routed are
changed, and a row whose weights stay the same is left alone. Positions and padding are those of ``generate``.

Cost of one re-route in tokens: 0, the prefix, and the generated text. Nothing here outlives one call of ``generate``.

Without a cache (``use_cache=False``) every step reads the whole text under the current weights, as ``recompute`` would; the other policies
refuse it. If the configuration of a checkpoint turns the cache off, a cache is used here.

Shapes: B rows, T tokens, P tokens of the padded prompt, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dlplora.errors import GenerationError
from dlplora.inference.generate_options import GenerateOptions

KV_POLICIES = ("stale", "recompute", "prompt_frozen")


class CacheRefresher:
    """Rewrites the cache entries of re-routed rows in place, by one more forward of those rows.

    Args:
        model: The patched causal LM.
        bound: Weights (N, E) -> context manager that binds them.
        policy: ``recompute`` or ``prompt_frozen``.
        cache: The cache that ``generate`` fills.
        mask: Attention mask of the padded prompts (B, P).
        weights: Weights (B, E) that the prompts' cache entries are made under; None if they differ within a prompt.

    Attributes:
        num_tokens: Tokens computed again so far, over all rows.

    Raises:
        GenerationError: If the policy is unknown.
    """

    def __init__(
        self,
        model: Any,
        bound: Callable[[Tensor], AbstractContextManager[Any]],
        policy: str,
        cache: DynamicCache,
        mask: Tensor,
        weights: Tensor | None,
    ) -> None:
        if policy not in KV_POLICIES:
            raise GenerationError(f"unknown kv_policy '{policy}'; known: {', '.join(KV_POLICIES)}.")
        self.model, self.bound, self.policy, self.cache, self.mask = model, bound, policy, cache, mask
        self._made_under: list[Tensor | None] = [None] * mask.shape[0] if weights is None else [row.clone() for row in weights]
        self._takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
        self.num_tokens = 0

    def __call__(self, rows: Sequence[int], weights: Tensor, input_ids: Tensor) -> None:
        """Bring the cache in line with new routing weights.

        Args:
            rows: Re-routed rows (N).
            weights: Their new weights (N, E).
            input_ids: Prompt and text so far (B, T + 1); the newest token is not in the cache.
        """
        changed = [i for i, row in enumerate(rows) if self._is_new(row, weights[i])]
        frozen = self.mask.shape[1] if self.policy == "prompt_frozen" else 0
        cached = input_ids.shape[1] - 1
        for i in changed:
            self._made_under[rows[i]] = weights[i].clone()
        if not changed or cached == frozen:
            return
        chosen = torch.tensor([rows[i] for i in changed], device=input_ids.device)
        mask = torch.cat([self.mask[chosen], self.mask.new_ones(len(changed), cached - self.mask.shape[1])], dim=1)
        fresh = self._beginning(chosen, frozen)
        options: dict[str, Any] = {}
        if self._takes_positions:
            options["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp_min(0)[:, frozen:]
        with torch.no_grad(), self.bound(weights[changed]):
            self.model.base_model(
                input_ids=input_ids[chosen, frozen:cached], attention_mask=mask, past_key_values=fresh, use_cache=True, **options
            )
        for old, new in zip(_layers(self.cache, self.policy), _layers(fresh, self.policy), strict=True):
            old.keys[chosen], old.values[chosen] = new.keys, new.values
        self.num_tokens += int(mask[:, frozen:].sum())

    def _is_new(self, row: int, weights: Tensor) -> bool:
        before = self._made_under[row]
        return before is None or not torch.equal(before.to(weights), weights)

    def _beginning(self, rows: Tensor, length: int) -> DynamicCache:
        """A cache with the first ``length`` entries of some rows."""
        fresh = DynamicCache(config=self.model.config)
        if length:
            for index, layer in enumerate(_layers(self.cache, self.policy)):
                if layer.is_sliding:
                    raise GenerationError(
                        "kv_policy 'prompt_frozen' needs the whole prompt in the cache, and this model's slides. Use recompute."
                    )
                fresh.update(layer.keys[rows, :, :length], layer.values[rows, :, :length], index)
        return fresh


def _layers(cache: DynamicCache, policy: str) -> list[Any]:
    """The layers of a cache that holds keys and values.

    Raises:
        GenerationError: If a layer holds something else (linear attention, state spaces).
    """
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer):
            raise GenerationError(f"kv_policy '{policy}' rewrites keys and values; {type(layer).__name__} holds none. Use kv_policy=stale.")
    return list(cache.layers)


def own_cache(model: Any, policy: str, options: GenerateOptions) -> DynamicCache | None:
    """The cache to hand to ``generate`` so that it can be rewritten, written into its arguments.

    None where nothing is rewritten: under ``stale``, and without any cache, where every step reads the whole text under the weights of
    its time, as ``recompute`` would have it.

    Raises:
        GenerationError: If the caller chose another kind of cache.
    """
    if policy == "stale" or options.value("use_cache", True) is False:
        return None
    for name in ("past_key_values", "cache_implementation"):
        if options.value(name) is not None:
            raise GenerationError(
                f"kv_policy '{policy}' rewrites a dynamic cache of its own, but {name}={options.value(name)!r} was asked for; "
                "use kv_policy=stale."
            )
    options.kwargs["past_key_values"] = cache = DynamicCache(config=model.config)
    return cache
