"""From prompts to a running generation: first routing weights, routing of the prompt itself, and detection of sentence ends.

Shapes: B rows, T columns of the prompts, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteria

from dlplora.inference.chat_formats import TurnMarkers
from dlplora.inference.generate_options import GenerateOptions
from dlplora.inference.generation import RoutedCriterion, SentenceRerouter, VocabularyTable, kept_experts, trace_entry, with_watchers
from dlplora.inference.kv_policy import CacheRefresher, own_cache
from dlplora.inference.prompt_routing import initial_router_input, piecewise_weights, routed_questions, segment_task
from dlplora.inference.request import Request
from dlplora.inference.row_tokens import PieceEncoder, RowTokens
from dlplora.methods.base import FusedModel, FusionMethod
from dlplora.modules.routing_state import RoutingState
from dlplora.types import PromptBatch

if TYPE_CHECKING:
    from dlplora.inference.request_router import RequestRouter


class RoutedModel(FusedModel, Protocol):
    """What a routed generation needs of the fused model."""

    method: FusionMethod
    request_router: RequestRouter

    def route(self, prompts: PromptBatch, *, new_tokens: int = 0, questions: PromptBatch | None = None) -> RoutingState | None:
        """Routing state for a batch of prompts, or None if gates decide."""
        ...

    @property
    def vocabulary(self) -> VocabularyTable:
        """Which tokens can end a sentence."""
        ...

    @property
    def piece_encoder(self) -> PieceEncoder | None:
        """Encodes parts of texts, where the tokenizer allows it."""
        ...

    @property
    def chat_markers(self) -> TurnMarkers | None:
        """What the tokenizer's chat template writes around the words of a user."""
        ...


class PrefillEnd(StoppingCriteria):
    """Ends the prefill: from the first generated token on, the request runs under the per-row weights. Never stops anything."""

    def __init__(self, request: Request, state: RoutingState) -> None:
        self.request, self.state = request, state

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        """Give the per-row state to the request; always returns False (B,)."""
        self.request.state = self.state
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class RoutedGeneration:
    """The routing of one call of ``generate`` under the model's method.

    Args:
        fused: The model.
        request: The call; it receives the routing state, and what acts before its forward passes.
        prompts: The prompts, one per row; the router reads their questions.
        ids, mask: Prompts (B, T) as they are processed, every row ending with a token.
        options: Of the call; its arguments receive the watchers.
        trace: A list that receives one dict per routed sentence.
    """

    def __init__(
        self,
        fused: RoutedModel,
        request: Request,
        prompts: PromptBatch,
        ids: Tensor,
        mask: Tensor,
        options: GenerateOptions,
        trace: list[dict[str, Any]] | None,
    ) -> None:
        self.fused, self.request, self.prompts, self.ids, self.mask, self.trace = fused, request, prompts, ids, mask, trace
        self.options, self.copies = options, options.copies()
        self.questions = routed_questions(prompts, fused.tokenizer, fused.chat_markers)
        self.device = fused.device  # asking costs more than some of what follows

    def start(self, new_tokens: int) -> None:
        """Route the prompts and set up what follows the generation; nothing to do if gates decide."""
        method, names = self.fused.method, self.fused.bank.names
        state = self.fused.route(self.prompts, new_tokens=new_tokens, questions=self.questions)
        if state is None:
            return
        sentences = self.options.is_sentence_level
        if self.trace is not None:
            read = initial_router_input(method.view, self.questions, self.fused.tokenizer) if sentences else self.questions
            for row, text in enumerate(read.texts):
                self.trace.append(trace_entry(row, 0, text, state.per_row()[row], names))
        piecewise = sentences and method.prompt_routing != "whole"
        prefill = self.request.owns(self._prefill_state(state).expand(self.copies)) if piecewise else None
        state = self.request.owns(state.expand(self.copies))
        self.fused.request_router.used.add(state.backend)
        self.request.state = state if prefill is None else prefill
        kwargs = self.options.kwargs
        for criterion in kwargs.get("stopping_criteria") or ():
            if isinstance(criterion, RoutedCriterion):
                criterion.state = state
        if not sentences:
            return
        watcher = self._rerouter(state, piecewise)
        watcher.deferred = True
        self.request.before_forward, self.request.after_last_token = watcher.reroute_before_forward, watcher.finish
        watchers: list[StoppingCriteria] = [watcher]
        if prefill is not None:
            watchers.insert(0, PrefillEnd(self.request, state))
        kwargs["stopping_criteria"] = with_watchers(watchers, kwargs.get("stopping_criteria"))

    def _prefill_state(self, state: RoutingState) -> RoutingState:
        names = self.prompts.task_names

        def route(texts: Sequence[str], places: Sequence[tuple[int, int]]) -> Tensor:
            tasks = None if names is None else [segment_task(names[row], piece) for row, piece in places]
            return self._route(texts, tasks)

        how = self.fused.method.prompt_routing
        weights, shown = piecewise_weights(self.ids, self.mask, how, state.per_row(), route, self.fused.tokenizer)
        if self.trace is not None:
            entries = self.trace[-len(shown) :]
            for entry, parts in zip(entries, shown, strict=True):
                entry["prompt_pieces"] = [{"text": text, "weights": kept_experts(chosen, self.fused.bank.names)} for text, chosen in parts]
        return self.fused.request_router.state(weights.to(self.device))

    def _route(
        self, texts: Sequence[str], task_names: Sequence[str | None] | None = None, ids: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        tokenizer, device = self.fused.tokenizer, self.device
        if ids is None:
            prompts = PromptBatch.from_texts(texts, tokenizer, device=device, task_names=task_names)
        else:
            prompts = PromptBatch.from_ids(ids, tokenizer, device=device, task_names=task_names, texts=texts)
        weights = self.fused.request_router.route(prompts)
        assert weights is not None
        return weights

    def _rerouter(self, state: RoutingState, piecewise: bool) -> SentenceRerouter:
        fused = self.fused
        # The question of an answer is only determined for methods that receive its task.
        names = self.prompts.task_names if "task_id" in fused.method.metadata.needs else None
        cache = own_cache(fused.model, fused.method.kv_policy, self.options)
        refresher = None
        if cache is not None:
            mask = self.mask.repeat_interleave(self.copies, dim=0)
            policy = fused.method.kv_policy
            first = None if piecewise and policy == "recompute" else state.per_row()
            refresher = CacheRefresher(fused.model, fused.routing, policy, cache, mask, first)
        return SentenceRerouter(
            state,
            self._route,
            [text for text in self.questions.texts for _ in range(self.copies)],
            fused.tokenizer,
            fused.vocabulary,
            self.ids.shape[1],
            fused.method.view,
            self.trace,
            fused.bank.names,
            task_names=None if names is None else [name for name in names for _ in range(self.copies)],
            refresh=refresher,
            encode=RowTokens(fused.tokenizer, fused.piece_encoder),
        )
