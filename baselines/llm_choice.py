"""Let the model choose: the base model reads what each adapter is for and names one (Adaptive Minds, arXiv:2510.15416).

The base model is shown all descriptions of the pool under letters, and the question. Only the adapter with the most likely letter is
used. Descriptions come from the pool's manifest (``description`` in ``pool.json``, ``dlplora pool add --description``).

Deviations: the authors let the model write an answer and parse it (qpiai/adaptive-minds@2199c0c); here the letters are scored, so that
the answer is always one of them, and the prompt is ours. The cost is a prompt of about ten tokens per adapter for every question; a record
has the mean as ``routing_tokens_per_prompt``.

Shapes: B rows, E experts, V vocabulary.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from dlplora.errors import MethodError
from dlplora.methods.base import FusedModel, FusionMethod, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.routing_state import RoutingState
from dlplora.types import PromptBatch

SHOWN = 3
"""Adapters named in an error; the others are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LLMChoiceConfig:
    """What replaces a missing description."""

    missing: Literal["refuse", "name"] = "refuse"
    """``refuse`` the pool, or read the adapter's ``name`` instead."""


def letters(number: int) -> list[str]:
    """As many labels of equal length: A to Z, then AA to ZZ, and so on."""
    width = 1
    while 26**width < number:
        width += 1
    labels = ("".join(parts) for parts in product(string.ascii_uppercase, repeat=width))
    return [label for label, _ in zip(labels, range(number), strict=False)]


def menu(descriptions: Mapping[str, str], question: str) -> str:
    """The prompt that the base model reads; the label of its choice comes next.

    Args:
        descriptions: What each adapter is for, by name; shown in alphabetical order of the names.
        question: To be answered.
    """
    lines = [f"{label}. {descriptions[name]}" for label, name in zip(letters(len(descriptions)), sorted(descriptions), strict=True)]
    return "Skills:\n" + "\n".join(lines) + f"\n\nQuestion: {question}\n\nThe skill that answers the question is"


class LLMChoice(FusionMethod):
    """The adapter that the base model names."""

    name = "llm_choice"
    metadata = Metadata(title="The model's choice", paper="https://arxiv.org/abs/2510.15416", granularity="prompt")
    Config = LLMChoiceConfig
    stand_in_params = {"missing": "name"}
    max_kept = 1

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Collect the descriptions.

        Raises:
            MethodError: If an adapter has none.
        """
        known = {name: bank.specs[name].description if name in bank.specs else None for name in bank.names}
        lacking = [name for name, text in known.items() if not text]
        if lacking and self.config.missing == "refuse":
            more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
            raise MethodError(
                f"method '{self.name}' reads what adapters are for, and the pool's manifest has no description of "
                f"{', '.join(lacking[:SHOWN])}{more}. "
                "Write 'description' into pool.json (`dlplora pool add --description TEXT`), or choose missing=name."
            )
        self._descriptions = {name: text or name.replace("_", " ") for name, text in known.items()}
        self._asked = self._tokens = 0
        return super().prepare(bank, context)

    def attach(self, model: FusedModel) -> None:
        """Keep a way to the model; spell the labels."""
        self._model = (model,)  # inside a tuple, so that nn.Module does not register it
        self._labels = [model.tokenizer(f" {label}", add_special_tokens=False)["input_ids"] for label in letters(len(self.expert_names))]

    @property
    def reported(self) -> Mapping[str, float | None]:
        """Tokens that the base model reads to choose, mean over the prompts routed so far."""
        return {"routing_tokens_per_prompt": self._tokens / self._asked if self._asked else None}

    @torch.no_grad()
    def route(self, prompts: PromptBatch) -> Tensor:
        """One-hot rows (B, E). Every question is read alone, so that batches cannot change a bit.

        Raises:
            MethodError: If descriptions and question do not fit into the context of the base model.
        """
        order = sorted(self.expert_names)
        weights = torch.zeros(len(prompts), len(order))
        for row, question in enumerate(prompts.texts):
            weights[row, self.expert_names.index(order[int(self.scores(question).argmax())])] = 1.0
        return weights.to(prompts.input_ids.device)

    def scores(self, question: str) -> Tensor:
        """Mean log-probability of a token of each label (E,), float32, adapters in alphabetical order."""
        (model,) = self._model
        ids = model.tokenizer(menu(self._descriptions, question))["input_ids"]
        longest = max(map(len, self._labels))
        if len(ids) + longest > model.max_length:
            raise MethodError(
                f"method '{self.name}': descriptions and question have {len(ids)} tokens, the base model reads {model.max_length}. Shorten "
                "the descriptions in pool.json, or use fewer adapters."
            )
        zeros = RoutingState(torch.zeros(len(self.expert_names), device=model.device), "dense")
        with model.slot.bind(zeros):
            out = model.model(input_ids=torch.tensor([ids], device=model.device), use_cache=longest > 1)
            first = out.logits[0, -1].float().log_softmax(dim=-1)
            sums = torch.stack([first[label[0]] for label in self._labels])
            if longest > 1:
                sums = sums + self._continued(model, out.past_key_values, longest)
        self._asked += 1
        self._tokens += len(ids) + (sum(map(len, self._labels)) - len(self._labels) if longest > 1 else 0)
        return sums / torch.tensor([len(label) for label in self._labels], device=sums.device)

    def _continued(self, model: FusedModel, cache: object, longest: int) -> Tensor:
        """Log-probability (E,) of what follows the first token of each label, all labels after one cached prompt."""
        rows = torch.tensor([label + [label[-1]] * (longest - len(label)) for label in self._labels], device=model.device)
        cache.batch_repeat_interleave(len(rows))  # type: ignore[attr-defined]
        logs = model.model(input_ids=rows[:, :-1], past_key_values=cache, use_cache=True).logits.float().log_softmax(dim=-1)
        found = logs.gather(-1, rows[:, 1:, None])[..., 0]
        lengths = torch.tensor([len(label) - 1 for label in self._labels], device=model.device)
        return found.masked_fill(torch.arange(longest - 1, device=model.device) >= lengths[:, None], 0.0).sum(dim=-1)
