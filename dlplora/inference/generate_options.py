"""Options of a ``generate`` call, as transformers resolves them, and which of them a routed model supports.

Sentence-level routing supports greedy decoding and sampling, one token per step, with a cache. Everything else is refused by name.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from dlplora.errors import GenerationError
from dlplora.methods.base import FusionMethod

ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
OTHER_LOOPS = {
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa",
    "constraints": "constrained beam search",
    "force_words_ids": "constrained beam search",
    "custom_generate": "a custom decoding loop",
}
BY_PLACE = ("position_ids", "token_type_ids", "inputs_embeds", "past_key_values")
"""Inputs with one entry for every column of ``input_ids``."""
ROUTE_ONCE = "route once per prompt (dlp: reroute=prompt)"


class GenerateOptions:
    """What a call asks for.

    Args:
        model: The Hugging Face model.
        kwargs: Of ``generate``; changed where the routing needs it.
        method: The method that routes; None if the caller gave the routing weights.
    """

    def __init__(self, model: Any, kwargs: dict[str, Any], method: FusionMethod | None) -> None:
        self.kwargs = kwargs
        self._configs = (kwargs.get("generation_config"), model.generation_config)
        self._method = method
        self.is_sentence_level = method is not None and method.granularity == "sentence"

    def value(self, name: str, default: Any = None) -> Any:
        """An option: the argument, else that of ``generation_config``, else the model's, else ``default``."""
        if name in self.kwargs:
            return self.kwargs[name]
        for config in self._configs:
            found = getattr(config, name, None)
            if found is not None:
                return found
        return default

    def whole(self, name: str) -> int | None:
        """``value`` of an option that is a whole number.

        Raises:
            GenerationError: If it is something else.
        """
        found = self.value(name)
        if found is None:
            return None
        try:
            return operator.index(int(found) if isinstance(found, float) and found.is_integer() else found)
        except TypeError as error:
            raise GenerationError(f"{name} must be a whole number, got {found!r}.") from error

    # ------------------------------------------------------------------ sizes

    def new_tokens(self, width: int) -> int:
        """Number of new tokens after a prompt of ``width`` tokens; without a limit, transformers' default (20).

        Raises:
            GenerationError: If there are none.
        """
        count = self.whole("max_new_tokens")
        if count is None:
            limit = self.whole("max_length")
            count = 20 if limit is None else limit - width
            if count < 1:
                raise GenerationError(
                    f"max_length is {limit}, but the prompts take {width} columns, and it counts them too, padding included; "
                    "raise it, or give max_new_tokens."
                )
        if count < 1:
            raise GenerationError(f"max_new_tokens must be at least 1, got {count}.")
        return count

    def copies(self) -> int:
        """Rows a prompt becomes: beams, or returned sequences.

        Raises:
            GenerationError: If one of them is not a whole number of at least 1.
        """
        beams, sequences = self.whole("num_beams"), self.whole("num_return_sequences") or 1
        if (beams is not None and beams < 1) or sequences < 1:
            raise GenerationError(f"num_beams and num_return_sequences must be at least 1, got {beams} and {sequences}.")
        return beams if beams is not None and beams > 1 else sequences

    def pad_token(self, tokenizer: Any) -> int | None:
        """The padding token: the option, else the tokenizer's."""
        found = self.whole("pad_token_id")
        return tokenizer.pad_token_id if found is None else found

    def require_same_places(self, given: Tensor | None, given_mask: Tensor | None, ids: Tensor, mask: Tensor) -> None:
        """Refuse ``BY_PLACE`` if the tokens of the prompts do not stay in their columns.

        Args:
            given: ``input_ids`` as the caller gave them; None if the prompts were texts.
            given_mask: Their mask, if there was one.
            ids, mask: Of this call (B, T).

        Raises:
            GenerationError: Names the option.
        """
        named = [name for name in BY_PLACE if self.kwargs.get(name) is not None]
        kept = given is not None and torch.equal(given.to(ids), ids) and (given_mask is None or torch.equal(given_mask.to(mask), mask))
        if named and not kept and not self._starts_empty(named):
            raise GenerationError(
                f"{named[0]} belongs to tokens in their places, but the prompts are tokenised, moved or cut here; "
                f"leave it out, or pass input_ids that are padded on the left."
            )
        positions = self.kwargs.get("position_ids")
        if positions is not None and self.kwargs.get("past_key_values") is None:  # of a cache's tokens they may be left out
            shape = tuple(getattr(positions, "shape", ()))
            if len(shape) < 2 or shape[-1] < ids.shape[1]:
                found = f"shape {shape}" if isinstance(positions, Tensor) else type(positions).__name__
                raise GenerationError(
                    f"position_ids must be a tensor with a place for each column of input_ids {tuple(ids.shape)}, got {found}."
                )

    def _starts_empty(self, named: list[str]) -> bool:
        """Whether the only input by place is a cache that holds nothing yet."""
        length = getattr(self.kwargs.get("past_key_values"), "get_seq_length", None)
        return named == ["past_key_values"] and length is not None and not length()

    def mask_from_padding(self, ids: Tensor) -> Tensor:
        """The mask of prompts that came without one, by the rule of transformers: padding is masked unless it also ends texts."""
        pad, ends = self.value("pad_token_id"), self.value("eos_token_id")
        if isinstance(ends, Tensor):
            ends = ends.tolist()
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        if pad is None or pad in ends:
            return ids.new_ones(ids.shape)
        return ids.ne(pad).to(ids.dtype)

    # ------------------------------------------------------------------ supported decoding

    def require_served(self) -> None:
        """Check that the requested decoding loop is supported.

        Raises:
            GenerationError: Names the option.
        """
        if self.value("cache_implementation") == "paged":
            raise GenerationError("cache_implementation='paged' is continuous batching, which cannot be routed; leave it out.")
        if self.value("assistant_early_exit") is not None:
            raise GenerationError("assistant_early_exit shortens the model itself while it runs, for other requests too; leave it out.")
        if not self.is_sentence_level:
            return
        if (self.whole("num_beams") or 1) > 1:
            raise GenerationError(
                "beam search re-orders rows between re-routes, so sentence-level routing cannot follow them exactly; "
                f"use num_beams=1, or {ROUTE_ONCE}."
            )
        for name in ASSISTED:
            if self.value(name):
                raise GenerationError(
                    f"{name} adds several tokens per step, and sentence-level routing must act between them; leave it out, or {ROUTE_ONCE}."
                )
        for name, loop in OTHER_LOOPS.items():
            if self._asks_for(name):
                raise GenerationError(
                    f"{name} asks for {loop}, which sentence-level routing cannot follow; use greedy decoding or sampling, or {ROUTE_ONCE}."
                )
        if self.value("token_healing"):
            raise GenerationError(f"token_healing replaces prompt tokens after they were routed; leave it out, or {ROUTE_ONCE}.")
        assert self._method is not None
        kept = self._method.kv_policy == "stale" and self._method.prompt_routing == "whole"
        if self.value("guidance_scale") not in {None, 1} and not kept:
            raise GenerationError(
                "guidance_scale keeps a second cache, which kv_policy and prompt_routing do not reach; "
                f"use kv_policy=stale with prompt_routing=whole, or {ROUTE_ONCE}."
            )
        self._settle_cache()

    def _asks_for(self, name: str) -> bool:
        value = self.value(name)
        if name == "penalty_alpha":  # contrastive search needs both, and no sampling
            return bool(value) and (self.value("top_k") or 0) > 1 and not self.value("do_sample")
        return value is not None

    def _settle_cache(self) -> None:
        """Whether sentence-level routing has the cache that its ``kv_policy`` is about; see ``kv_policy``.

        Raises:
            GenerationError: If the caller turns the cache off and the policy needs one.
        """
        assert self._method is not None
        policy = self._method.kv_policy
        if self._method.prompt_routing != "whole" and self.value("prefill_chunk_size") is not None:
            raise GenerationError("prefill_chunk_size cuts the prompt, but this method routes its parts in one forward pass; leave it out.")
        if self.value("use_cache", True) is not False:
            return
        given = self.kwargs.get("use_cache") is False or getattr(self._configs[0], "use_cache", None) is False
        if not given:
            # A checkpoint's default, left over from training; the cache is part of what the policy means.
            self.kwargs["use_cache"] = True
        elif policy != "recompute" or self._method.prompt_routing != "whole":
            raise GenerationError(
                f"use_cache=False reads the whole text again at every token, but kv_policy '{policy}' keeps old keys and values; "
                "leave use_cache out, or use kv_policy=recompute with prompt_routing=whole."
            )
