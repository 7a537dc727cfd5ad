"""Several adapters in one forward pass over one frozen base model, for training.

A batch holds the same number of rows for each adapter of a group, adapter by adapter, so the low-rank update of all rows is two batched
matrix products. Shapes: G adapters of a group, R rank, I inputs, O outputs, N rows times tokens of one adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlplora.errors import IncompatibleAdapterError
from dlplora.modules.input_layout import InputGrid
from dlplora.training.settings import LoRASettings, expert_generator, initial_lora_a


@dataclass
class ActiveGroup:
    """The factors used by the next forward, one pair per adapted module: A (G, R, I) and B (G, O, R)."""

    factors: Sequence[tuple[Tensor, Tensor]] = field(default_factory=tuple)
    grid: InputGrid = field(default_factory=InputGrid)
    """Rows and tokens of the running forward pass."""


class GroupedLoRALinear(nn.Module):
    """``base(x) + scaling * B_g A_g dropout(x)``, where g is the adapter of the row.

    Args:
        base: Frozen linear layer; called, never read.
        index: Position of this module in the factors of the active group.
        active: Shared by all modules of a model; without factors the layer is its base.
        scaling: Factor of B @ A.
        dropout: On the adapter's input.
    """

    def __init__(self, base: nn.Module, index: int, active: ActiveGroup, scaling: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        self.index = index
        self.active = active
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)

    @property
    def weight(self) -> Tensor:
        """The base's weight, as a PEFT layer has it."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """x (G * rows, T, I) or (G * rows * T, I) -> the same with O, in the dtype of the base's output.

        Raises:
            IncompatibleAdapterError: If several adapters train together and ``x`` does not hold one vector for every token.
        """
        y = self.base(x)
        if not self.active.factors:
            return y
        lora_a, lora_b = self.active.factors[self.index]
        z = self.dropout(x.to(lora_a.dtype))
        if lora_a.shape[0] == 1:
            delta = F.linear(F.linear(z, lora_a[0]), lora_b[0])
        else:
            if x.ndim == 2 and not self.active.grid.fits(x):
                raise IncompatibleAdapterError(
                    f"a layer got an input of shape {tuple(x.shape)}, which mixes the rows of {lora_a.shape[0]} adapters. "
                    "Train them one after another: model.init_args.mode=sequential."
                )
            rows = z.reshape(lora_a.shape[0], -1, z.shape[-1])
            delta = torch.bmm(torch.bmm(rows, lora_a.mT), lora_b.mT).view(y.shape)
        return y + (self.scaling * delta).to(y.dtype)


class ExpertGroup(nn.Module):
    """The trained factors of the experts that share a batch.

    Args:
        names: The experts.
        shapes: (I, O) of every adapted module, in order.
        lora: Shape of the adapters.
        seed: With each expert's name, decides its initial weights.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, int]], lora: LoRASettings, seed: int) -> None:
        super().__init__()
        self.names = tuple(names)
        generators = [expert_generator(seed, name) for name in names]
        self.lora_a = nn.ParameterList()
        self.lora_b = nn.ParameterList()
        for inputs, outputs in shapes:
            self.lora_a.append(nn.Parameter(torch.stack([initial_lora_a((lora.rank, inputs), generator) for generator in generators])))
            self.lora_b.append(nn.Parameter(torch.zeros(len(names), outputs, lora.rank, device="cpu", dtype=torch.float32)))

    def factors(self, expert: str | None = None) -> list[tuple[Tensor, Tensor]]:
        """A and B of every module, of all experts or (as a group of one) of the named one."""
        rows = slice(None) if expert is None else slice(self.names.index(expert), self.names.index(expert) + 1)
        return [(a[rows], b[rows]) for a, b in zip(self.lora_a, self.lora_b, strict=True)]

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale every expert's gradient to a norm of at most ``max_norm``, each by itself; returns the norms before (G,).

        The factor is ``max_norm / (norm + 1e-6)``, as in ``torch.nn.utils.clip_grad_norm_``.
        """
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        factor = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor[:, None, None])
        return norms


class GroupedLoRA:
    """Puts ``GroupedLoRALinear`` layers into a model.

    Args:
        model: Frozen causal LM; its target layers are replaced.
        lora: Which layers, and their scaling and dropout.

    Raises:
        IncompatibleAdapterError: If no linear layer of the model has a target's name.
    """

    def __init__(self, model: nn.Module, lora: LoRASettings) -> None:
        self.active = ActiveGroup()
        self.module_names: list[str] = []
        self.shapes: list[tuple[int, int]] = []
        for name, module in list(model.named_modules()):
            parent_name, _, leaf = name.rpartition(".")
            if leaf not in lora.target_modules or not hasattr(module, "in_features"):
                continue
            wrapped = GroupedLoRALinear(module, len(self.module_names), self.active, lora.scaling, lora.lora_dropout)
            setattr(model.get_submodule(parent_name), leaf, wrapped)
            self.module_names.append(name)
            self.shapes.append((int(module.in_features), int(module.out_features)))  # type: ignore[arg-type]
        if hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_pre_hook(self.active.grid.note)  # type: ignore[operator]
        found = {name.rpartition(".")[2] for name in self.module_names}
        missing = [target for target in lora.target_modules if target not in found]
        if missing:
            linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
            raise IncompatibleAdapterError(
                f"the model has no linear layer named {', '.join(missing)}. Its linear layers: {', '.join(linear)}."
            )

    @contextmanager
    def use(self, factors: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Inside, every layer adds the update of these factors; afterwards the base model is unchanged."""
        self.active.factors = factors
        try:
            yield
        finally:
            self.active.factors = ()

    def peft_tensors(self, group: ExpertGroup, expert: str) -> Mapping[str, Any]:
        """One expert's tensors under the names PEFT gives them: A (R, I), B (O, R)."""
        tensors: dict[str, Tensor] = {}
        for name, (lora_a, lora_b) in zip(self.module_names, group.factors(expert), strict=True):
            tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a[0]
            tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b[0]
        return tensors
