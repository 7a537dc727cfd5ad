"""One adapter that equals a weighted sum of adapters.

A sum of low-rank products is a low-rank product: ``sum_e w_e s_e B_e A_e = [w_1 s_1 B_1, w_2 s_2 B_2, …] [A_1; A_2; …]``. Ranks add up.
Weights and scalings are multiplied into B, so the result has scaling 1.

Shapes: K rank of the result, I inputs, O outputs, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dlplora.adapters.config import load_config
from dlplora.adapters.pool import Pool, load_pool
from dlplora.config import short
from dlplora.errors import AdapterError, ConfigError, MethodError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.modules.lora_bank import AdapterBank, BankEntry


@dataclass(frozen=True, kw_only=True)
class FusedAdapter:
    """A low-rank adapter with scaling 1 that equals weighted adapters.

    Attributes:
        modules: Module path in the base model -> A (K, I) and B (O, K), float32 on the CPU; zero rows and columns fill up to K.
        rank: K, the same for every module.
        weights: The adapters that it was made from -> routing weight, none of them zero.
        sha256: Checksums of their weight files, if they were read from files.
        method: Method that decided the weights; None if they were given.
        base_model: Base model that the adapters name, if they agree.
        target_modules: Last parts of module paths where they select exactly ``modules``, else the whole paths.
        fan_in_fan_out: Whether the adapters are for layers that store their weight transposed (GPT-2).
        pool: The pool of the adapters; its fingerprint is compared with the base model.
    """

    modules: Mapping[str, tuple[Tensor, Tensor]]
    rank: int
    weights: Mapping[str, float]
    sha256: Mapping[str, str] = field(default_factory=dict)
    method: str | None = None
    base_model: str | None = None
    target_modules: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    pool: Pool | None = None

    @classmethod
    def from_pool(cls, pool: str | Path | Pool, weights: Mapping[str, float]) -> FusedAdapter:
        """Fuse adapters of a pool under given weights. No model is loaded.

        Args:
            pool: Folder, name below ``DLPLORA_POOLS``, or an opened pool.
            weights: Adapter -> weight; any finite numbers, negative ones too. Zeros are dropped.

        Raises:
            PoolError: If an adapter is not in the pool; names the nearest one.
            ConfigError: If a weight is not a finite number, or none is left.
        """
        opened = pool if isinstance(pool, Pool) else load_pool(pool)
        kept = require_weights(weights)
        names = [name for name in opened.names if name in kept] + [name for name in kept if name not in opened.names]
        bank = AdapterBank.from_pool(opened.path, names)
        return cls.from_bank(bank, kept, pool=opened)

    @classmethod
    def from_bank(
        cls, bank: AdapterBank, weights: Mapping[str, float], *, combine: str = "delta", method: str | None = None, pool: Pool | None = None
    ) -> FusedAdapter:
        """Fuse experts of a bank.

        Args:
            bank: Experts; float32 for an exact result.
            weights: Expert -> weight.
            combine: ``delta``, or ``factor``: A and B are summed separately, which needs one rank.
            method, pool: See the attributes.

        Raises:
            AdapterError: If an expert is unknown, or a product is not finite in float32.
            ConfigError: If a weight is not a finite number, or none is left.
        """
        kept = require_weights(weights)
        indices = {bank.index(name): weight for name, weight in kept.items()}
        if combine == "factor":
            bank.select(list(kept)).require_equal_ranks(method or "factor")
        make = _summed if combine == "factor" else _concatenated
        found = {path: pair for path, entry in sorted(bank.modules.items()) if (pair := make(entry, indices)) is not None}
        rank = max((lora_a.shape[0] for lora_a, _ in found.values()), default=0)
        if rank == 0:
            raise AdapterError(f"the adapters {', '.join(kept)} change no module; there is nothing to export.")
        for path, pair in found.items():
            if not all(bool(torch.isfinite(factor).all()) for factor in pair):
                raise AdapterError(f"module '{path}': weights and scaling give values that float32 cannot hold. Use smaller weights.")
        specs = [bank.specs[name] for name in kept if name in bank.specs]
        configs = [load_config(spec.path, spec.name) for spec in specs]
        bases = {spec.base_model for spec in specs}
        leaves = {target for config in configs for target in _plain_targets(config)}
        by_leaf = len(configs) == len(kept) and all(map(_plain_targets, configs))
        return cls(
            modules={path: _padded(*pair, rank) for path, pair in found.items()},
            rank=rank,
            weights=kept,
            sha256={spec.name: spec.sha256 for spec in specs},
            method=method,
            base_model=bases.pop() if len(bases) == 1 else None,
            target_modules=tuple(sorted(leaves if by_leaf else found)),
            fan_in_fan_out=any(bool(config.get("fan_in_fan_out")) for config in configs),
            pool=pool,
        )

    @classmethod
    @torch.no_grad()
    def from_prompt(cls, fused: FusedCausalLM, prompt: str, *, pool: Pool | None = None) -> FusedAdapter:
        """Fuse what a model's method decides for a prompt; for a sentence-level method, the weights of the first sentence.

        Adapters that a cast to the model's dtype has rounded are read again from their folders.

        Raises:
            MethodError: If gates inside the layers decide, so that a prompt has no routing weights.
            ConfigError: If the prompt is empty, or no adapter is kept.
        """
        name = fused.method.name
        if not isinstance(prompt, str):
            raise ConfigError(f"the prompt must be one text, got {type(prompt).__name__}.")
        if not prompt.strip():
            raise ConfigError("the prompt is empty; there is nothing to route.")
        state = fused.route(prompt)
        if state is None or state.weights.numel() != fused.bank.num_experts:
            raise MethodError(
                f"method '{name}' has no routing weights for a prompt; it decides inside the layers. Give the weights instead."
            )
        decided = {key: float(value) for key, value in zip(fused.bank.names, state.weights.flatten().tolist(), strict=True) if value}
        state.release()
        if not decided:
            raise ConfigError(f"method '{name}' uses no adapter for this prompt; the base model alone is the answer.")
        bank = fused.bank.select(list(decided)).to("cpu")
        if bank.narrowed and set(decided) <= set(bank.specs):
            bank = AdapterBank.from_peft({key: bank.specs[key].path for key in decided})
        return cls.from_bank(bank.to(dtype=torch.float32), decided, combine=fused.method.metadata.combine, method=name, pool=pool)

    def delta(self, path: str) -> Tensor:
        """What it adds to the weight of a module, (O, I), float32."""
        lora_a, lora_b = self.modules[path]
        return lora_b @ lora_a


def require_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights without the zeros.

    Raises:
        ConfigError: If one is not a finite number, or none is left.
    """
    if not isinstance(weights, Mapping):
        raise ConfigError(f"weights must map names of adapters to numbers, got {short(weights)}.")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"the weight of adapter '{name}' must be a finite number, got {short(weight)}.")
    kept = {name: float(weight) for name, weight in weights.items() if weight}
    if not kept:
        raise ConfigError("no adapter has a weight other than zero; there is nothing to export.")
    return kept


def _plain_targets(config: Mapping[str, object]) -> tuple[str, ...]:
    """Target modules of an adapter if they are names of modules in every layer; empty if they may select some layers only."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any("." in str(one) for one in targets):
        return ()
    limits = ("layers_to_transform", "layers_pattern", "exclude_modules")
    return () if any(config.get(key) for key in limits) else tuple(map(str, targets))


def _factors(entry: BankEntry, index: int) -> tuple[Tensor, Tensor, float]:
    """A (R, I) and B (O, R) of one expert, without padding, in float64; and its scaling."""
    rank = entry.ranks[index]
    return entry.lora_a[index, :rank].double(), entry.lora_b[index, :, :rank].double(), float(entry.scaling[index])


def _concatenated(entry: BankEntry, weights: Mapping[int, float]) -> tuple[Tensor, Tensor] | None:
    """A (K, I) and B (O, K) of one module; None if no expert adapts it."""
    used = [(_factors(entry, index), weight) for index, weight in weights.items() if entry.ranks[index]]
    if not used:
        return None
    lora_a = torch.cat([lora_a for (lora_a, _, _), _ in used])
    lora_b = torch.cat([lora_b * (weight * scaling) for (_, lora_b, scaling), weight in used], dim=1)
    return lora_a.float(), lora_b.float()


def _summed(entry: BankEntry, weights: Mapping[int, float]) -> tuple[Tensor, Tensor] | None:
    """As ``_concatenated``, for a method that sums factors: K is the rank of the experts."""
    used = [(_factors(entry, index), weight) for index, weight in weights.items() if entry.ranks[index]]
    if not used:
        return None
    lora_a = torch.stack([lora_a * weight for (lora_a, _, _), weight in used]).sum(dim=0)
    lora_b = torch.stack([lora_b * (weight * scaling) for (_, lora_b, scaling), weight in used]).sum(dim=0)
    return lora_a.float(), lora_b.float()


def _padded(lora_a: Tensor, lora_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Zeros up to one rank for all modules, which every reader of PEFT adapters understands."""
    missing = rank - lora_a.shape[0]
    if missing:
        lora_a = torch.cat([lora_a, lora_a.new_zeros(missing, lora_a.shape[1])])
        lora_b = torch.cat([lora_b, lora_b.new_zeros(lora_b.shape[0], missing)], dim=1)
    return lora_a.contiguous(), lora_b.contiguous()
