"""Reference methods that fusion is compared with.

``base`` no adapter, ``oracle`` the task's own adapter, ``multitask`` one adapter trained on all tasks, ``avg_delta`` the uniform average of
the weight deltas. Definitions: PEFT's ``adapter_names`` for one adapter per row; the mean of the weight deltas for the average.
Shapes: B rows, E experts.

Deviations: none in the formulas. All four run through the same fused layers as every other method, so accuracy and latency differ by the
rule alone; none merges into the base weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dlplora.config import OMIT_DEFAULT_FROM_HASH
from dlplora.errors import MethodError, nearest
from dlplora.methods.base import FusionMethod, Granularity, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch


class Base(FusionMethod):
    """The base model without any adapter: all routing weights are zero."""

    name = "base"
    metadata = Metadata(title="Base model", granularity="none", weight_sum="zero")
    max_kept = 0

    def route(self, prompts: PromptBatch) -> Tensor:
        """Zeros (B, E)."""
        return torch.zeros(len(prompts), len(self.expert_names), device=prompts.input_ids.device)


class Oracle(FusionMethod):
    """The adapter of the prompt's own task. A reference, not a bound: another adapter may do better."""

    name = "oracle"
    metadata = Metadata(title="Single LoRA (oracle)", granularity="task", needs=("task_id",))
    max_kept = 1

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        """What the oracle does with prompts of several questions."""

        segments: bool = field(default=False, metadata=OMIT_DEFAULT_FROM_HASH)
        """Whether a prompt may hold several questions of known tasks; then the i-th answer has the adapter of the i-th task. A
        reference for composite prompts: it is given the tasks and reads the end of an answer from line breaks. If the layout has fewer
        questions than there are tasks, every finished sentence is an answer."""
        prompt_routing: Literal["whole", "question"] = field(default="whole", metadata=OMIT_DEFAULT_FROM_HASH)
        """With ``segments``: the prompt under the first task's adapter, or each question under its own."""
        kv_policy: Literal["stale", "recompute", "prompt_frozen"] = field(default="stale", metadata=OMIT_DEFAULT_FROM_HASH)
        """With ``segments``: what happens to cached keys and values when the adapter changes."""

    config: Config

    @property
    def granularity(self) -> Granularity:
        """``task``, or ``sentence`` with ``segments``."""
        return "sentence" if self.config.segments else "task"

    @property
    def view(self) -> str:
        """The question that is answered next; only its task is read."""
        return "segment"

    @property
    def prompt_routing(self) -> str:
        """As configured."""
        return self.config.prompt_routing

    @property
    def kv_policy(self) -> str:
        """As configured."""
        return self.config.kv_policy

    def route(self, prompts: PromptBatch) -> Tensor:
        """One-hot rows (B, E).

        Raises:
            MethodError: If a row has no task name, or no expert has this name.
        """
        known = ", ".join(self.expert_names)
        if prompts.task_names is None:
            raise MethodError(f"method 'oracle' needs the task name of every prompt; none was given. Known tasks: {known}.")
        weights = torch.zeros(len(prompts), len(self.expert_names))
        position = {name: index for index, name in enumerate(self.expert_names)}
        for row, task in enumerate(prompts.task_names):
            if task is None:
                raise MethodError(f"method 'oracle' needs the task name of every prompt; prompt {row} has none. Known tasks: {known}.")
            if task not in position:
                raise MethodError(f"method 'oracle': no adapter for task '{task}'.{nearest(task, position)} Known tasks: {known}.")
            weights[row, position[task]] = 1.0
        return weights.to(prompts.input_ids.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiTaskConfig:
    """Which adapter is used."""

    artifact: str = "multitask"
    """Role of its folder: ``multitask`` has the rank of one expert, ``multitask_r64`` the paper's, ``multitask_r208`` as many parameters
    as 26 experts of rank 8."""


class MultiTask(FusionMethod):
    """One adapter trained on the mixture of all tasks; this adapter replaces the pool."""

    name = "multitask"
    metadata = Metadata(title="Multi-task LoRA", granularity="none", needs=("all_tasks_adapter",))
    Config = MultiTaskConfig

    @property
    def artifact_roles(self) -> tuple[str, ...]:
        """The folder of the adapter."""
        return (self.config.artifact,)

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """A bank of the one adapter in ``context.artifact(config.artifact)``, with the dtype and device of the pool's bank."""
        super().prepare(bank, context)
        folder = context.artifact(self.config.artifact, self.name)
        like = next(iter(bank.modules.values())).lora_a
        own = AdapterBank.from_peft({"multitask": folder}).to(dtype=like.dtype, device=like.device)
        self._num_parameters = sum(entry.lora_a.numel() + entry.lora_b.numel() for entry in own.modules.values())
        return own

    @property
    def num_trained_parameters(self) -> int:
        """Those of the adapter."""
        return getattr(self, "_num_parameters", 0)

    def route(self, prompts: PromptBatch) -> Tensor:
        """Ones (B, 1)."""
        return torch.ones(len(prompts), 1, device=prompts.input_ids.device)


class AvgDelta(FusionMethod):
    """Uniform average of the weight deltas: ``dW = (1/N) sum_i s_i B_i A_i``, every adapter with its own scaling.

    Not the product of averaged factors, and not PEFT's ``linear`` combination: both add cross terms ``B_i A_j``.
    """

    name = "avg_delta"
    metadata = Metadata(title="Uniform average of deltas", granularity="none")

    def route(self, prompts: PromptBatch) -> Tensor:
        """``1 / N`` for every expert, (B, E)."""
        num_experts = len(self.expert_names)
        return torch.full((len(prompts), num_experts), 1.0 / num_experts, device=prompts.input_ids.device)
