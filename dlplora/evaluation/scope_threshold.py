"""Choose a router's threshold on validation prompts, without loading adapters or the layers of the base model. Shapes: n prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlplora.errors import ConfigError
from dlplora.inference.backbones import resolve_backbone
from dlplora.inference.embedding_only import embedding_backbone
from dlplora.modules.router import MiniMLPRouter
from dlplora.modules.scope import Criterion, ScopeThreshold, Score, choose_threshold, scores_of
from dlplora.tasks.registry import get_suite
from dlplora.tasks.types import Split, Suite
from dlplora.types import PromptBatch

ROWS = 256
"""Prompts that the router reads at once."""


def prompts_of(suite: Suite, names: Sequence[str], split: Split, limit: int) -> list[str]:
    """Prompts of tasks of a suite, at most ``limit`` per task.

    Raises:
        ConfigError: If ``limit`` is below 1.
        TaskError: If the suite has no task of a name.
    """
    if limit < 1:
        raise ConfigError(f"the number of prompts per task must be at least 1, got {limit}.")
    return [item.prompt for name in names for item in suite.task(name).items(split, limit)]


class ScopeCalibration:
    """Chooses the threshold of one router.

    Args:
        router: Its folder.
        pretrained: The base model that provides the embeddings; None is the embedded nano model.
        data_root: Rows of local tasks.
        limit: Prompts per task.

    Raises:
        DLPLoRAError: If router or base model cannot be loaded.
    """

    def __init__(self, router: str | Path, pretrained: str | None = None, *, data_root: str | None = None, limit: int = 100) -> None:
        from transformers import AutoTokenizer

        source = resolve_backbone(pretrained)
        self.router = MiniMLPRouter.load(router, embedding_backbone(source).get_input_embeddings())
        self.data_root, self.limit = data_root, limit
        self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def choose(
        self,
        suite: str,
        out_of_scope: Sequence[str] = (),
        *,
        score: Score = "max_probability",
        criterion: Criterion = "keep",
        keep: float = 0.95,
    ) -> ScopeThreshold:
        """The threshold.

        Args:
            suite: Has the router's tasks; its validation prompts are in scope.
            out_of_scope: Suites with out-of-scope validation prompts; tasks that the router knows are left out.
            score, criterion, keep: See ``choose_threshold``.

        Raises:
            DLPLoRAError: If a suite or one of its tasks is missing, or there are no validation prompts.
        """
        known = self.router.names
        inside = self.scores(prompts_of(get_suite(suite, self.data_root), known, "validation", self.limit), score)
        texts: list[str] = []
        for name in out_of_scope:
            other = get_suite(name, self.data_root)
            texts += prompts_of(other, [task for task in other.names if task not in known], "validation", self.limit)
        return choose_threshold(
            score,
            inside,
            self.scores(texts, score) if out_of_scope else None,
            criterion=criterion,
            keep=keep,
            data={"suite": suite, "out_of_scope": list(out_of_scope), "split": "validation", "prompts_a_task": self.limit},
        )

    @torch.no_grad()
    def scores(self, texts: Sequence[str], score: Score) -> Tensor:
        """Scores (n,) of prompts."""
        parts = [torch.zeros(0)]
        for start in range(0, len(texts), ROWS):
            batch = PromptBatch.from_texts(texts[start : start + ROWS], self._tokenizer)
            parts.append(scores_of(*self.router.probabilities(batch.input_ids, batch.attention_mask))[score])
        return torch.cat(parts)
