"""LoRAHub: weights per task, searched without gradients on a few examples (Huang et al., arXiv:2307.13269). Shapes: E experts.

``A = sum_e w_e A_e``, ``B = sum_e w_e s_e B_e``, ``dW = B A``: factors are summed separately, so the delta is quadratic in w, and w and -w
are the same. The search minimises ``loss(w) + l1 * mean |w|`` over ``w in [-bound, bound]^E`` from w = 0 (the base model).

* ``lorahub_in_pool``: the task's own adapter is in the pool; the search should find it.
* ``lorahub_leave_one_out``: it does not; this is the setting that the method was designed for.
* ``lorahub_in_pool_nevergrad``, ``lorahub_leave_one_out_nevergrad``: the same with the original's optimiser.

Deviations, with reasons: the loss is the mean cross-entropy of answer tokens (``hub_code_loss`` divides it by the number of examples once
more, as the released code does, which makes its L1 term as many times heavier). The released code calls nevergrad's NGOpt with 40
evaluations, which for 26 experts is a COBYLA that has barely completed its initial simplex; ``budget: null`` takes five evaluations an
expert, at least 40. ``optimizer: nevergrad`` is the original's (an optional package; presets ``*_nevergrad``); ``optimizer: cobyla`` is
scipy's, the algorithm that NGOpt also chooses for that many weights. On the nano suite the two hardly differ. Experts are searched in the
order of their names, and on one CPU thread, so that neither the order of the pool nor the number of threads changes anything.
Each expert's scaling is multiplied into its B; the original's adapters all have one scaling.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dlplora.data.encoding import collate, encode_items
from dlplora.errors import ConfigError, MethodError, nearest
from dlplora.methods.base import FusedModel, FusionMethod, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.types import PromptBatch

MIN_BUDGET = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAHubConfig:
    """LoRAHub's settings."""

    leave_one_out: bool = True
    """Whether the adapter trained on the task itself is set aside."""
    num_examples: int = 5
    """Examples of the task that the search sees."""
    budget: int | None = None
    """Evaluations of the objective a task; null is five an expert, at least 40."""
    l1: float = 0.05
    """Weight of the mean absolute weight."""
    bound: float = 1.5
    """Largest absolute weight."""
    optimizer: Literal["cobyla", "nevergrad"] = "cobyla"
    """What searches."""
    hub_code_loss: bool = False
    """Whether the loss is divided by the number of examples, as in the released code."""

    def __post_init__(self) -> None:
        if self.num_examples < 1 or self.bound <= 0 or self.l1 < 0 or (self.budget is not None and self.budget < 1):
            raise ConfigError(
                "'num_examples' and 'budget' must be at least 1, 'bound' positive and 'l1' not negative, got "
                f"{self.num_examples}, {self.budget}, {self.bound}, {self.l1}."
            )


class LoRAHub(FusionMethod):
    """Searched weights, one set a task."""

    name = "lorahub"
    metadata = Metadata(
        title="LoRAHub",
        paper="https://arxiv.org/abs/2307.13269",
        granularity="task",
        combine="factor",
        needs=("task_id", "few_shot"),
        weight_sum="any",
    )
    Config = LoRAHubConfig
    found: Tensor
    searched: Tensor

    @property
    def optional_packages(self) -> Mapping[str, str]:
        """nevergrad, if it is the optimiser."""
        how = "pip install 'dlplora[search]', or choose optimizer=cobyla"
        return {"nevergrad": how} if self.config.optimizer == "nevergrad" else {}

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Make room for one row of weights per task; saved rows stay. The bank comes back sorted by name.

        A search follows the last bit of a sum: in the pool's own order, another order would find other weights.
        """
        bank.require_equal_ranks(self.name)
        if not hasattr(self, "found"):
            self.register_buffer("found", torch.zeros(bank.num_experts, bank.num_experts, device=context.device))
            self.register_buffer("searched", torch.zeros(bank.num_experts, dtype=torch.bool, device=context.device))
        self._context = context
        super().prepare(bank, context)
        self._names = tuple(sorted(bank.names))
        return bank.select(self._names)

    def attach(self, model: FusedModel) -> None:
        """Keep a way to the model that the search evaluates."""
        self._model = (model,)  # inside a tuple, so that nn.Module does not register it

    def route(self, prompts: PromptBatch) -> Tensor:
        """The weights of each row's task (B, E); a task is searched when it is first met.

        Raises:
            MethodError: If a row has no task name, or no adapter bears it.
        """
        rows = [self._row(task) for task in prompts.task_names or (None,) * len(prompts)]
        for index in dict.fromkeys(rows):
            if not bool(self.searched[index]):
                self.found[index] = self.search(self._names[index])
                self.searched[index] = True
        return self.found[torch.tensor(rows, device=self.found.device)].to(prompts.input_ids.device)

    def _row(self, task: str | None) -> int:
        if task not in self._names:
            hint = nearest(str(task), self._names)
            raise MethodError(f"method '{self.name}' searches weights per task and has no task {task!r}.{hint}")
        return self._names.index(task)

    def budget(self, size: int) -> int:
        """Evaluations of the objective a task, for ``size`` weights to be found."""
        return self.config.budget or max(MIN_BUDGET, 5 * size)

    @property
    def reported(self) -> Mapping[str, int]:
        """Tasks searched, and the evaluations allowed to each; the record's seed is the search's."""
        size = len(self._names) - int(self.config.leave_one_out)
        return {"search_budget": self.budget(size), "search_examples": self.config.num_examples, "searched_tasks": int(self.searched.sum())}

    def search(self, task: str) -> Tensor:
        """The best weights (E,) for a task within the budget."""
        columns = [index for index, name in enumerate(self._names) if not self.config.leave_one_out or name != task]
        if not columns:
            raise MethodError(f"method '{self.name}': without '{task}' itself the pool is empty; leave_one_out needs two adapters.")
        loss = self.objective(task)

        def value(point: np.ndarray) -> float:
            weights = torch.zeros(len(self._names))
            weights[columns] = torch.from_numpy(np.asarray(point)).float().clamp(-self.config.bound, self.config.bound)
            return loss(weights) + self.config.l1 * float(np.abs(point).mean())

        with _one_thread():
            best = self._minimise(value, len(columns), self.budget(len(columns)))
        weights = torch.zeros(len(self._names))
        weights[columns] = torch.from_numpy(best).float()
        return weights

    def objective(self, task: str) -> Callable[[Tensor], float]:
        """``loss(w)``: mean cross-entropy of the answer tokens of the task's examples under weights (E,)."""
        (model,) = self._model
        items = self._context.examples(task, self.config.num_examples, self.name)
        encoded = encode_items(model.tokenizer, items, model.max_length).items
        batch = collate(encoded, int(model.tokenizer.pad_token_id or 0))
        tensors = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask", "labels")}
        divisor = len(items) if self.config.hub_code_loss else 1

        @torch.no_grad()
        def loss(weights: Tensor) -> float:
            with model.routing(weights.to(model.device)):
                return float(model.model(**tensors, use_cache=False).loss) / divisor

        return loss

    def _minimise(self, value: Callable[[np.ndarray], float], size: int, budget: int) -> np.ndarray:
        """The best of all points evaluated; w = 0 is the first."""
        seen: list[tuple[float, np.ndarray]] = []

        def remembered(point: np.ndarray) -> float:
            clipped = np.clip(point, -self.config.bound, self.config.bound)
            if len(seen) < budget:
                seen.append((value(clipped), clipped.copy()))
                return seen[-1][0]
            return min(seen, key=lambda pair: pair[0])[0]

        remembered(np.zeros(size))
        if self.config.optimizer == "nevergrad":
            _nevergrad(remembered, size, self.config.bound, budget - 1, self._context.seed)
        else:
            from scipy.optimize import minimize

            bounds = [(-self.config.bound, self.config.bound)] * size
            options: dict[str, Any] = {"maxiter": max(1, budget - 1), "rhobeg": 0.5}
            minimize(remembered, np.zeros(size), method="COBYLA", bounds=bounds, options=options)
        return min(seen, key=lambda pair: pair[0])[1]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums on the CPU in one order: the search follows their last bit, which changes with the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _nevergrad(value: Callable[[np.ndarray], float], size: int, bound: float, budget: int, seed: int) -> None:
    import nevergrad as ng

    space = ng.p.Array(init=[0.0] * size, lower=[-bound] * size, upper=[bound] * size)
    space.random_state.seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*RHOEND", category=UserWarning)  # what NGOpt passes to scipy; it is corrected there
        ng.optimizers.NGOpt(parametrization=space, budget=max(1, budget)).minimize(value)
