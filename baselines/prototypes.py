"""Prompt and task routers by prototypes in an encoder's space. Shapes: B rows, E experts, K centroids, D features.

* ARIADNE (arXiv:2606.19079): an expert is a few centroids of its training inputs, found by k-means; only the expert of the nearest
  centroid is used. From the abstract; number of centroids, inputs and encoder are our choice.
* AdapterSoup (Chronopoulou et al., arXiv:2302.07027): the parameters of the adapters with the nearest domains are averaged, once per
  task. For LoRA these are A and B, so factors are summed. A domain is the mean of its inputs' embeddings.

Deviations: a task's own adapter, if it is in the pool, is nearest and part of the average; ``leave_one_out`` excludes it, which is the
paper's setting (unseen domains). The paper compares domains by inputs of the test domain; here by training inputs of the task.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dlplora.errors import ConfigError, MethodError, nearest
from dlplora.methods.base import Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.seeds import derive_seed
from dlplora.types import PromptBatch

from ._encoders import LearnsFromEncodings
from ._gates import kept_of


@dataclass(frozen=True, kw_only=True, slots=True)
class _EncodedConfig:
    """What both read."""

    encoder: str = "minilm"
    """``minilm``, ``features``, ``router``, or a sentence-transformers model (``_encoders.py``)."""
    num_samples: int = 100
    """Training inputs per task."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ConfigError(f"'num_samples' must be at least 1, got {self.num_samples}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class AriadneConfig(_EncodedConfig):
    """How fine the picture of a task is."""

    num_centroids: int = 4
    """Centroids per expert; as many as it has inputs, if these are fewer."""

    def __post_init__(self) -> None:
        _EncodedConfig.__post_init__(self)
        if self.num_centroids < 1:
            raise ConfigError(f"'num_centroids' must be at least 1, got {self.num_centroids}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSoupConfig(_EncodedConfig):
    """Who is averaged."""

    top_k: int = 5
    """Adapters averaged, all of them if the pool holds fewer."""
    leave_one_out: bool = False
    """Whether the task's own adapter stays out."""

    def __post_init__(self) -> None:
        _EncodedConfig.__post_init__(self)
        if self.top_k < 1:
            raise ConfigError(f"'top_k' must be at least 1, got {self.top_k}.")


class Ariadne(LearnsFromEncodings):
    """The expert of the nearest centroid."""

    name = "ariadne"
    metadata = Metadata(title="ARIADNE", paper="https://arxiv.org/abs/2606.19079", granularity="prompt", needs=("inputs",))
    Config = AriadneConfig
    learned = ("centroids", "owners")
    max_kept = 1
    centroids: Tensor
    owners: Tensor

    def learn(self, prompts: Mapping[str, list[str]], context: MethodContext) -> dict[str, Tensor]:
        """Centroids of all experts (n, D), and the index of each one's expert (n,)."""
        from scipy.cluster.vq import kmeans2

        found = []
        for name, texts in prompts.items():
            points = self._encoder.texts(texts).double().cpu().numpy()
            number = min(self.config.num_centroids, len({row.tobytes() for row in points}))
            seed = derive_seed(self.name, context.seed, name) % 2**32
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*clusters is empty")  # empty clusters are dropped below
                centroids, members = kmeans2(points, number, minit="++", seed=seed)
            found.append(torch.from_numpy(centroids[sorted(set(members))]).float())
        owners = torch.cat([torch.full((len(rows),), index) for index, rows in enumerate(found)])
        return {"centroids": torch.cat(found), "owners": owners}

    def distances(self, prompts: PromptBatch) -> Tensor:
        """Euclidean distances of prompts and centroids (B, n)."""
        return torch.cdist(self.encoded(prompts), self.centroids, compute_mode="donot_use_mm_for_euclid_dist")

    def scope_scores(self, prompts: PromptBatch) -> dict[str, Tensor]:
        """``closeness``: the negative distance to the nearest centroid."""
        return {"closeness": -self.distances(prompts).amin(dim=-1)}

    def route(self, prompts: PromptBatch) -> Tensor:
        """One-hot rows (B, E)."""
        best = self.owners[self.distances(prompts).argmin(dim=-1)]
        return F.one_hot(best, len(self.expert_names)).float().to(prompts.input_ids.device)


class AdapterSoup(LearnsFromEncodings):
    """The mean of the nearest adapters' parameters, once per task."""

    name = "adapter_soup"
    metadata = Metadata(
        title="AdapterSoup",
        paper="https://arxiv.org/abs/2302.07027",
        granularity="task",
        combine="factor",
        needs=("task_id", "inputs"),
    )
    Config = AdapterSoupConfig
    learned = ("domains",)
    domains: Tensor

    @property
    def max_kept(self) -> int:
        """``top_k``."""
        return int(self.config.top_k)

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Check that the factors can be averaged."""
        bank.require_equal_ranks(self.name)
        others = bank.num_experts - int(self.config.leave_one_out)
        if others < 1:
            raise MethodError(f"method '{self.name}': without the task's own adapter the pool is empty; leave_one_out needs two adapters.")
        self._kept = kept_of(self.config.top_k, others, self.name)
        return super().prepare(bank, context)

    def learn(self, prompts: Mapping[str, list[str]], context: MethodContext) -> dict[str, Tensor]:
        """Mean of every domain (E, D), unit length."""
        means = [self._encoder.texts(texts).mean(dim=0) for texts in prompts.values()]
        return {"domains": F.normalize(torch.stack(means), dim=-1)}

    def route(self, prompts: PromptBatch) -> Tensor:
        """``1 / k`` on the adapters nearest to each row's task (B, E).

        Raises:
            MethodError: If a row has no task name, or no adapter bears it.
        """
        self.require_learned()
        rows = [self._row(task) for task in prompts.task_names or (None,) * len(prompts)]
        scores = self.domains[rows] @ self.domains.mT
        if self.config.leave_one_out:
            scores[torch.arange(len(rows)), rows] = -torch.inf
        best = scores.topk(self._kept, dim=-1).indices
        return torch.zeros_like(scores).scatter(-1, best, 1.0 / self._kept).to(prompts.input_ids.device)

    def _row(self, task: str | None) -> int:
        if task not in self.expert_names:
            hint = nearest(str(task), self.expert_names)
            raise MethodError(f"method '{self.name}' averages adapters once per task and has no task {task!r}.{hint}")
        return self.expert_names.index(task)
