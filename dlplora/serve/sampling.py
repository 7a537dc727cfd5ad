"""Sample the next token of a row from its logits. Shapes: V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy decoding, as in vLLM: logits divided by less may exceed float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How a request samples; the names are those of the OpenAI API."""

    temperature: float = 1.0
    """0, or anything below ``GREEDY_BELOW``, is greedy decoding."""
    top_p: float = 1.0
    """Probability mass kept; 0 keeps the most likely token."""
    seed: int | None = None
    """Seed of the request; None draws one."""
    top_logprobs: int | None = None
    """Alternatives to report for each token; None reports no log-probabilities."""
    frequency_penalty: float = 0.0
    """Subtracted once per earlier occurrence in the generated text."""
    presence_penalty: float = 0.0
    """Subtracted once if the token occurred in the generated text."""

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_BELOW or self.top_p == 0


@dataclass(frozen=True, slots=True)
class Chosen:
    """One token with its log-probability and the most likely alternatives, both before penalties, temperature and ``top_p``, as in vLLM."""

    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    offset: int = 0
    """Characters of the answer before the token; set if the log-probability is."""


class Sampler:
    """The sampler of one request; its random state is its own, so other requests have no influence."""

    def __init__(self, options: SamplingOptions, device: torch.device) -> None:
        self.options = options
        self._generator = torch.Generator(device)
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)
        self._counts: dict[int, int] = {}

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is the argmax of the logits and nothing else is requested."""
        options = self.options
        return options.is_greedy and options.top_logprobs is None and not (options.frequency_penalty or options.presence_penalty)

    def choose(self, logits: Tensor) -> Chosen:
        """The next token from logits (V,)."""
        options = self.options
        logits = logits.float()
        penalised = self._penalised(logits)
        if options.is_greedy:
            token = int(penalised.argmax())
        else:
            scores = penalised[None]
            if options.temperature != 1.0:
                scores = TemperatureLogitsWarper(options.temperature)(None, scores)
            if options.top_p < 1.0:
                scores = TopPLogitsWarper(options.top_p)(None, scores)
            token = int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))
        if options.frequency_penalty or options.presence_penalty:
            self._counts[token] = self._counts.get(token, 0) + 1
        if options.top_logprobs is None:
            return Chosen(token)
        logprobs = logits.log_softmax(dim=-1)
        values, tokens = logprobs.topk(min(options.top_logprobs, logprobs.shape[0]))
        pairs = tuple((int(one), float(value)) for one, value in zip(tokens.tolist(), values.tolist(), strict=True))
        return Chosen(token, float(logprobs[token]), pairs)

    def _penalised(self, logits: Tensor) -> Tensor:
        if not self._counts:
            return logits
        tokens = torch.tensor(list(self._counts), device=logits.device)
        counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype, device=logits.device)
        penalty = self.options.frequency_penalty * counts + self.options.presence_penalty
        return logits.index_add(0, tokens, -penalty)
