"""Prompt routers that compare a prompt with a few inputs of each expert's task. Shapes: B rows, E experts, D features.

* LoRARetriever (Zhao et al., arXiv:2402.09997): an expert is the mean of 20 sentence embeddings of its inputs, not normalised again;
  the ``top_k`` experts by inner product share the weight equally. ``retriever_mixture`` sums deltas, ``retriever_fusion`` sums A and B
  separately.
* LORAUTER (arXiv:2601.21795): a task is the centroid of a few inputs' embeddings; the ``top_k`` tasks by cosine, weights by the
  softmax of the similarities. Details were not available: number of samples, ``top_k``, temperature and unit-length centroids are our
  choice.

Deviations: the authors embed with an instruction-tuned sentence encoder. Here the encoder is a setting (``_encoders.py``); the default
``features`` needs only the base model. Inputs come from the training split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlplora.errors import ConfigError, MethodError
from dlplora.methods.base import Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch

from ._encoders import Encoder, UsesEncoder
from ._gates import kept_of, top_k_softmax

PAPER = "https://arxiv.org/abs/2402.09997"


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrieverConfig:
    """What is compared, and how many experts are kept."""

    encoder: str = "features"
    """``features``, ``router``, ``minilm``, or a sentence-transformers model."""
    top_k: int = 3
    """Experts kept; all of them if the pool holds fewer."""
    num_samples: int = 20
    """Inputs that represent an expert."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError(f"'num_samples' must be at least 1, got {self.num_samples}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LorauterConfig(RetrieverConfig):
    """The same with a softmax."""

    temperature: float = 0.1
    """Divides the similarities, which are in [-1, 1]."""

    def __post_init__(self) -> None:
        RetrieverConfig.__post_init__(self)
        if self.temperature <= 0:
            raise ConfigError(f"'temperature' must be positive, got {self.temperature}.")


class RetrieverMixture(UsesEncoder):
    """The nearest experts, equally; deltas are summed."""

    name = "retriever_mixture"
    metadata = Metadata(title="LoRARetriever (mixture)", paper=PAPER, granularity="prompt", needs=("inputs",))
    Config = RetrieverConfig
    unit_centroids = False
    """Whether an expert's mean is brought to unit length."""
    index: Tensor

    @property
    def max_kept(self) -> int:
        """``top_k``."""
        return int(self.config.top_k)

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Embed the inputs of every expert, unless a saved index is there."""
        self._kept = kept_of(self.config.top_k, bank.num_experts, self.name)
        self._encoder = Encoder(self.config.encoder, context, self.name)
        if not hasattr(self, "index"):
            known = context.few_shot is not None
            rows = [self.centroid(context, name) for name in bank.names] if known else [torch.zeros(0)] * bank.num_experts
            self.register_buffer("index", torch.stack(rows).to(context.device))
        return super().prepare(bank, context)

    def centroid(self, context: MethodContext, task: str) -> Tensor:
        """Mean embedding of a few training inputs of a task, (D,)."""
        texts = [item.prompt for item in context.examples(task, self.config.num_samples, self.name)]
        mean = self._encoder(PromptBatch.from_texts(texts, context.tokenizer, device=context.device)).mean(dim=0)
        return F.normalize(mean, dim=-1) if self.unit_centroids else mean

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """A saved index replaces the one that ``prepare`` made without inputs."""
        saved = state_dict.get(f"{prefix}index")
        if saved is not None:
            self.index = torch.empty_like(saved, device=self.index.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def similarities(self, prompts: PromptBatch) -> Tensor:
        """Inner products of prompts and experts (B, E).

        Raises:
            MethodError: If no inputs of the experts are known.
        """
        if self.index.shape[-1] == 0:
            raise MethodError(
                f"method '{self.name}' needs {self.config.num_samples} training inputs of every expert, and no suite was given. Pass "
                "--suite or --data-root (few_shot in Python), or load a saved model."
            )
        return self._encoder(prompts).to(self.index.device) @ self.index.mT

    def scope_scores(self, prompts: PromptBatch) -> dict[str, Tensor]:
        """``similarity`` to the nearest expert."""
        return {"similarity": self.similarities(prompts).amax(dim=-1)}

    def route(self, prompts: PromptBatch) -> Tensor:
        """``1 / k`` on the nearest experts, (B, E)."""
        scores = self.similarities(prompts)
        best = scores.topk(self._kept, dim=-1).indices
        return torch.zeros_like(scores).scatter(-1, best, 1.0 / self._kept).to(prompts.input_ids.device)


class RetrieverFusion(RetrieverMixture):
    """The nearest experts, equally; A and B are summed separately."""

    name = "retriever_fusion"
    metadata = Metadata(title="LoRARetriever (fusion)", paper=PAPER, granularity="prompt", needs=("inputs",), combine="factor")

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Check that the factors can be summed."""
        bank.require_equal_ranks(self.name)
        return super().prepare(bank, context)


class Lorauter(RetrieverMixture):
    """Softmax of the cosine with the nearest tasks' centroids."""

    name = "lorauter"
    metadata = Metadata(title="LORAUTER", paper="https://arxiv.org/abs/2601.21795", granularity="prompt", needs=("inputs",))
    Config = LorauterConfig
    unit_centroids = True

    def route(self, prompts: PromptBatch) -> Tensor:
        """Softmax over the nearest experts, (B, E)."""
        weights = top_k_softmax(self.similarities(prompts), self._kept, self.config.temperature)
        return weights.to(prompts.input_ids.device)
