"""The adapter bank: every expert of a pool, stacked per adapted module.

Shapes: E experts, R largest rank in the bank for that module, I inputs, O outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlplora.adapters.files import AdapterSpec, LoraWeights, read_adapter
from dlplora.adapters.pool import Pool, load_pool, read_pool
from dlplora.errors import AdapterError, IncompatibleAdapterError, nearest
from dlplora.kernels.allocation import is_stackable, zeros
from dlplora.modules.precision import dtype_name

SHRINK_BANK = "Load fewer experts (names=...), adapters of a smaller rank, or a smaller dtype (dtype=bfloat16)."


@dataclass(frozen=True, slots=True)
class BankEntry:
    """Stacked experts of one module.

    Args:
        lora_a: (E, R, I), zero rows beyond an expert's own rank.
        lora_b: (E, O, R), zero columns beyond an expert's own rank.
        scaling: (E,) float32; 0 for an expert that does not adapt this module.
        ranks: Rank of each expert, 0 where it does not adapt this module.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor
    ranks: tuple[int, ...]

    def index(self, indices: Sequence[int]) -> BankEntry:
        """The entry with other experts or another order."""
        chosen = list(indices)
        return BankEntry(self.lora_a[chosen], self.lora_b[chosen], self.scaling[chosen], tuple(self.ranks[i] for i in chosen))


class AdapterBank:
    """Experts in a fixed order, named; loaded from PEFT folders or given as tensors.

    Attributes:
        names: Expert index -> name.
        modules: Module path in the base model -> stacked experts.
        specs: Facts about each adapter's folder, if it was loaded from one.
        narrowed: Whether a cast has rounded the factors, so that checksums are read from the folders.
    """

    def __init__(
        self,
        names: Sequence[str],
        modules: Mapping[str, BankEntry],
        specs: Mapping[str, AdapterSpec] | None = None,
        *,
        narrowed: bool = False,
    ) -> None:
        if modules and not names:
            raise AdapterError("a bank with adapted modules needs at least one adapter.")
        if len(set(names)) != len(names):
            raise AdapterError(f"adapter names must be unique, got {', '.join(names)}.")
        self.names = tuple(names)
        self.modules = dict(modules)
        self.specs = dict(specs or {})
        self.narrowed = narrowed

    @classmethod
    def from_tensors(
        cls,
        names: Sequence[str],
        weights: Mapping[str, Sequence[LoraWeights | None]],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        specs: Mapping[str, AdapterSpec] | None = None,
    ) -> AdapterBank:
        """Stack one ``(A (R, I), B (O, R), scaling)`` per expert and module; None where an expert does not adapt a module.

        Raises:
            IncompatibleAdapterError: If two experts disagree on the sizes of a module.
        """
        sizes = {module: _sizes(module, names, experts, specs or {}) for module, experts in weights.items()}
        empty = empty_factors(sizes, dtype, device)
        modules = {module: _filled(module, names, experts, *empty[module]) for module, experts in weights.items()}
        stored = {factor.dtype for experts in weights.values() for expert in experts if expert is not None for factor in expert[:2]}
        return cls(names, modules, specs, narrowed=any(_loses_bits(one, dtype) for one in stored))

    @classmethod
    def from_peft(
        cls, folders: Mapping[str, str | Path], *, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
    ) -> AdapterBank:
        """Load PEFT folders under the names given, in that order.

        Raises:
            AdapterError: If none is given, or one cannot be read.
        """
        if not isinstance(folders, Mapping):
            raise AdapterError(f"from_peft takes a mapping of names to PEFT folders, got {type(folders).__name__}.")
        if not folders:
            raise AdapterError("a bank needs at least one adapter.")
        return cls._from_read({name: read_adapter(path, name) for name, path in folders.items()}, dtype, device)

    @classmethod
    def from_pool(
        cls,
        folder: str | Path | Pool,
        names: Sequence[str] | None = None,
        *,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
    ) -> AdapterBank:
        """Load a pool folder; ``names`` selects and orders, None takes all in the pool's order."""
        return cls._from_read(read_pool(load_pool(folder), names), dtype, device)

    @classmethod
    def _from_read(
        cls, read: Mapping[str, tuple[AdapterSpec, dict[str, LoraWeights]]], dtype: torch.dtype | str, device: torch.device | str
    ) -> AdapterBank:
        found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        if not isinstance(found, torch.dtype):
            raise AdapterError(f"unknown dtype {dtype!r}; pass float32, float16 or bfloat16.")
        names = tuple(read)
        paths = sorted({module for _, weights in read.values() for module in weights})
        weights = {module: [read[name][1].get(module) for name in names] for module in paths}
        return cls.from_tensors(names, weights, dtype=found, device=device, specs={name: read[name][0] for name in names})

    @classmethod
    def empty(cls) -> AdapterBank:
        """No experts and no modules: the base model alone, for methods that use no adapter."""
        return cls((), {})

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.names)

    @property
    def rank(self) -> int:
        """The largest rank in the bank."""
        return max((max(entry.ranks) for entry in self.modules.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Memory of all factors in bytes, padding included."""
        return sum(entry.lora_a.nbytes + entry.lora_b.nbytes + entry.scaling.nbytes for entry in self.modules.values())

    def index(self, name: str) -> int:
        """Index of an expert.

        Raises:
            AdapterError: If no expert has that name.
        """
        if name not in self.names:
            raise AdapterError(f"no expert named '{name}'.{nearest(name, self.names)} Known: {', '.join(self.names)}.")
        return self.names.index(name)

    def select(self, names: Sequence[str]) -> AdapterBank:
        """The bank with only these experts, in this order."""
        indices = [self.index(name) for name in names]
        modules = self._rebuilt(indices=indices)
        specs = {name: self.specs[name] for name in names if name in self.specs}
        return AdapterBank(tuple(names), modules, specs, narrowed=self.narrowed)

    def permute(self, order: Sequence[int]) -> AdapterBank:
        """The bank with experts in another order; ``order[i]`` is the old index of the new expert i."""
        if sorted(order) != list(range(self.num_experts)):
            raise AdapterError(f"order must be a permutation of 0 to {self.num_experts - 1}, got {list(order)}.")
        return self.select([self.names[i] for i in order])

    def require_equal_ranks(self, method: str) -> None:
        """Check that the factors of all experts can be summed: same modules, same rank.

        Args:
            method: Who needs it, for the error.

        Raises:
            IncompatibleAdapterError: Names the first module where they differ, and the rank of every adapter there.
        """
        for path, entry in self.modules.items():
            if len(set(entry.ranks)) > 1:
                shown = ", ".join(f"{name} {rank or 'not adapted'}" for name, rank in zip(self.names, entry.ranks, strict=True))
                raise IncompatibleAdapterError(
                    f"method '{method}' sums the factors A and B of all adapters, which needs one rank; module '{path}' has: {shown}. "
                    "Use a method that sums deltas, or adapters of one rank and one set of target modules."
                )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AdapterBank:
        """The bank on another device or in another dtype."""
        narrowed = dtype is not None and any(_loses_bits(entry.lora_a.dtype, dtype) for entry in self.modules.values())
        return AdapterBank(self.names, self._rebuilt(device, dtype), self.specs, narrowed=self.narrowed or narrowed)

    @torch.no_grad()
    def _rebuilt(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, indices: Sequence[int] | None = None
    ) -> dict[str, BankEntry]:
        """The entries elsewhere, in another dtype, or with other experts, stacked as those of a loaded bank; scaling stays float32."""
        index = None if device is None else torch.empty(0, device=device).device  # "cuda" is a certain one
        wanted = {path: (index or one.lora_a.device, dtype or one.lora_a.dtype) for path, one in self.modules.items()}
        if indices is None and all((one.lora_a.device, one.lora_a.dtype) == wanted[path] for path, one in self.modules.items()):
            return self.modules
        chosen = list(range(self.num_experts) if indices is None else indices)
        sizes = {path: (len(chosen), *one.lora_a.shape[1:], one.lora_b.shape[1]) for path, one in self.modules.items()}
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for place in dict.fromkeys(wanted.values()):
            found |= empty_factors({path: size for path, size in sizes.items() if wanted[path] == place}, place[1], place[0])
        for path, one in self.modules.items():
            for new, old in zip(found[path], (one.lora_a, one.lora_b), strict=True):
                new.copy_(old if indices is None else old[chosen])
        return {
            path: BankEntry(*found[path], one.scaling[chosen].to(wanted[path][0]), tuple(one.ranks[expert] for expert in chosen))
            for path, one in self.modules.items()
        }

    def checksum(self) -> str:
        """SHA-256 over names, module paths, factors and scalings, in order; independent of the dtype in which the adapters were loaded."""
        if self.narrowed and set(self.names) <= set(self.specs):
            return AdapterBank.from_peft({name: self.specs[name].path for name in self.names}).checksum()
        digest = hashlib.sha256("\n".join(self.names).encode())
        for module, entry in sorted(self.modules.items()):
            digest.update(module.encode())
            for tensor in (entry.lora_a, entry.lora_b, entry.scaling):
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _loses_bits(old: torch.dtype, new: torch.dtype) -> bool:
    """Whether a cast loses bits that a checksum covers, which is made in float32."""
    return torch.promote_types(old, new) != new and new != torch.float32


def empty_factors(
    sizes: Mapping[str, tuple[int, int, int, int]], dtype: torch.dtype, device: torch.device | str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Zeros for the factors of some modules, A (E, R, I) and B (E, O, R), the latter stored by rank: the kernels read (E, R, O).

    Those of equal sizes lie one behind another, so that one operation reaches the modules of all blocks (``kernels.folded.FoldedStack``).

    Args:
        sizes: Module -> E, R, I, O.
        dtype, device: As for ``torch.zeros``.

    Raises:
        AllocationError: If they do not fit.
    """
    alike: dict[tuple[int, int, int, int], list[str]] = {}
    for module, size in sizes.items():
        alike.setdefault(size, []).append(module)
    found = {}
    for (experts, rank, inputs, outputs), modules in alike.items():
        target: dict[str, Any] = {"dtype": dtype, "device": device, "shrink": SHRINK_BANK}
        together = all(is_stackable((experts, rank, size), dtype) for size in (inputs, outputs))
        for some in [modules] if together else [[module] for module in modules]:
            what = f"'{some[0]}'" if len(some) == 1 else f"'{some[0]}' and {len(some) - 1} more"
            a_all = zeros((len(some), experts, rank, inputs), what=f"stacked A of module {what}", **target)
            b_all = zeros((len(some), experts, rank, outputs), what=f"stacked B of module {what}", **target)
            found.update({module: (a_all[place], b_all[place].mT) for place, module in enumerate(some)})
    return found


def _sizes(
    module: str, names: Sequence[str], experts: Sequence[LoraWeights | None], specs: Mapping[str, AdapterSpec]
) -> tuple[int, int, int, int]:
    """Experts, largest rank, inputs and outputs of a module."""
    if len(experts) != len(names):
        raise AdapterError(f"module '{module}': {len(experts)} adapters for {len(names)} names.")
    present = [(name, expert) for name, expert in zip(names, experts, strict=True) if expert is not None]
    first_name, first = present[0]
    d_in, d_out = first[0].shape[1], first[1].shape[0]
    for name, (lora_a, lora_b, _) in present:
        if (lora_a.shape[1], lora_b.shape[0]) != (d_in, d_out):
            mine, theirs = (
                f" (base {specs[key].base_model})" if key in specs and specs[key].base_model else "" for key in (name, first_name)
            )
            raise IncompatibleAdapterError(
                f"adapter '{name}'{mine} has sizes {lora_a.shape[1]} -> {lora_b.shape[0]} at '{module}', "
                f"adapter '{first_name}'{theirs} has {d_in} -> {d_out}; they were trained on different base models."
            )
    return len(names), max(expert[0].shape[0] for _, expert in present), d_in, d_out


def _filled(module: str, names: Sequence[str], experts: Sequence[LoraWeights | None], stacked_a: Tensor, stacked_b: Tensor) -> BankEntry:
    """Write the experts of a module into zeros (E, R, I) and (E, O, R)."""
    scaling = torch.zeros(len(experts), dtype=torch.float32, device=stacked_a.device)
    ranks = tuple(0 if expert is None else expert[0].shape[0] for expert in experts)
    for i, expert in enumerate(experts):
        if expert is not None:
            lora_a, lora_b, scale = expert
            stacked_a[i, : ranks[i]] = lora_a.to(stacked_a.dtype)
            stacked_b[i, :, : ranks[i]] = lora_b.to(stacked_b.dtype)
            if not all(bool(torch.isfinite(factor[i]).all()) for factor in (stacked_a, stacked_b)):
                raise AdapterError(
                    f"adapter '{names[i]}': the factors of '{module}' have values that {dtype_name(stacked_a.dtype)} cannot hold. "
                    "Use dtype=float32; if they do not fit that either, the file is damaged or the training diverged."
                )
            scaling[i] = scale
    return BankEntry(stacked_a, stacked_b, scaling, ranks)
