"""DLP-LoRA: a small classifier reads each sentence, and the adapters that it selects are summed.

Source: Zhang et al., *DLP-LoRA: Efficient Task-Specific LoRA Fusion with a Dynamic, Lightweight Plugin*, arXiv:2410.01497;
released code MeCuping/DLP-LoRA@d68fd38. The two differ, and the paper leaves details open, so every choice is a switch:

=============== ================================= ================================== ===========================================
switch          paper                             released code                      presets
=============== ================================= ================================== ===========================================
``selector``    "top-p", read by its reviewers as nucleus: sorted, the crossing item ``dlp`` threshold, ``dlp_code`` nucleus
                keep i where p_i >= threshold     is kept
bound           never stated                      0.6                                ``dlp`` 0.2 (**ours**), ``dlp_code`` 0.6
``renormalize`` softmax of the kept probabilities the same                           both ``softmax``; ``dlp_renorm`` uses ``sum``
``reroute``     first token of every new sentence once for the whole prompt          ``dlp`` sentence, ``dlp_code`` prompt
``view``        not stated                        the whole question                 ``tail`` (**ours**)
``prompt_...``  not stated                        the whole question                 ``whole``
``kv_policy``   not stated                        nothing to decide                  ``stale``
=============== ================================= ================================== ===========================================

A softmax of probabilities makes weights more equal: two kept experts differ by at most a factor e, and by less than 1.83 at a bound of
0.6. ``renormalize="sum"`` divides by the kept mass instead; ``"logits"`` is the softmax of the kept logits, as in the released
code's top-k mode, which equals ``"sum"`` up to rounding; ``"none"`` leaves the probabilities as they are; ``"uniform"`` shares equally.

Deviations: the router is a mini-MLP on the base model's token embeddings (the paper: "mini-MLP", ALBERT tokenizer; the released
code: an ALBERT or RoBERTa encoder, no MLP); its probabilities are calibrated by a temperature; every adapter keeps its own scaling
(the released code takes the first adapter's for all); classes and adapters are matched by name (the released code relies on
the order of a directory listing).

Shapes: B rows, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dlplora.config import OMIT_DEFAULT_FROM_HASH
from dlplora.errors import ConfigError, MethodError
from dlplora.methods.base import FusionMethod, Granularity, Metadata, MethodContext, WeightSum
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.router import MiniMLPRouter, RouterConfig
from dlplora.modules.router_confidence import ConfidenceMonitor
from dlplora.modules.routing import nucleus_mask, renormalize, threshold_mask, top_k_mask
from dlplora.modules.scope import SCOPE_FILE, ScopeThreshold, scores_of
from dlplora.types import PromptBatch

_SLACK = 1e-4
"""Probabilities are float32 and sum to one only up to rounding."""


class DLP(FusionMethod):
    """Dynamic fusion by a mini-MLP router. Needs the artifact ``router``, a folder written by ``MiniMLPRouter.save``."""

    name = "dlp"
    metadata = Metadata(
        title="DLP-LoRA",
        paper="https://arxiv.org/abs/2410.01497",
        granularity="sentence",
        needs=("inputs", "labels"),
        trainable=True,
    )

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        """Switches of DLP-LoRA; the module docstring says where each value comes from."""

        selector: Literal["nucleus", "threshold", "topk", "argmax"] = "threshold"
        """Which experts are kept. ``nucleus``: the fewest whose probabilities exceed ``top_p`` together, the crossing one included;
        ``threshold``: every expert with probability >= ``threshold``; ``topk``: the ``top_k`` best; ``argmax``: the best."""
        threshold: float = 0.2
        """Least probability that ``threshold`` keeps. The paper does not state it; 0.2 is ours and keeps at most five experts."""
        top_p: float = 0.6
        """Probability mass that ``nucleus`` keeps; 0.6 is the value in the released code."""
        top_k: int = 2
        """Experts kept by ``topk``; all of them if the pool holds fewer."""
        renormalize: Literal["softmax", "sum", "logits", "none", "uniform"] = "softmax"
        """How kept probabilities become routing weights. ``softmax`` is the softmax of probabilities of paper and released code."""
        reroute: Literal["prompt", "sentence"] = "sentence"
        """When to route: once for the prompt, or again after every generated sentence."""
        view: Literal["tail", "window", "whole", "segment"] = "tail"
        """What the router reads at a sentence end. ``tail``: the prompt's last question and the text since; ``window``: the last 64
        tokens; ``whole``: prompt and text; ``segment``: the i-th question of the prompt for the i-th answer."""
        prompt_routing: Literal["whole", "question", "sentence"] = field(default="whole", metadata=OMIT_DEFAULT_FROM_HASH)
        """With ``reroute: sentence``: one set of routing weights for the prompt, or one for each of its questions or sentences."""
        kv_policy: Literal["stale", "recompute", "prompt_frozen"] = field(default="stale", metadata=OMIT_DEFAULT_FROM_HASH)
        """With ``reroute: sentence``: cached keys and values after a re-route are kept, all made again, or only those of generated text."""
        min_keep: int = 1
        """Experts kept by ``nucleus`` and ``threshold`` even if no probability reaches the bound."""
        router: str | None = None
        """Folder of a trained router; None takes the one that came with the pool (the artifact ``router``)."""

        scope: Literal["off", "router", "max_probability", "energy"] = field(default="off", metadata=OMIT_DEFAULT_FROM_HASH)
        """Which prompts get no expert at all. ``router``: score and threshold stored next to the router (`dlplora scope`); otherwise this
        score, below ``scope_threshold``."""
        scope_threshold: float | None = field(default=None, metadata=OMIT_DEFAULT_FROM_HASH)
        """Threshold of the named score."""

        def __post_init__(self) -> None:
            named = self.scope in {"max_probability", "energy"}
            if named != (self.scope_threshold is not None):
                raise ConfigError(
                    f"'scope_threshold' needs scope max_probability or energy; got {self.scope_threshold} with scope {self.scope}."
                )
            if self.scope_threshold is not None and not math.isfinite(self.scope_threshold):
                raise ConfigError(f"'scope_threshold' must be a finite number, got {self.scope_threshold}.")
            for name in ("threshold", "top_p"):
                if not getattr(self, name) >= 0.0:
                    raise ConfigError(f"'{name}' must be a probability of at least 0, got {getattr(self, name)}.")
            if self.top_k < 1:
                raise ConfigError(f"'top_k' must be at least 1, got {self.top_k}.")
            if self.min_keep < 1:
                raise ConfigError(f"'min_keep' must be at least 1, got {self.min_keep}.")

    config: Config
    router_role: ClassVar[str] = "router"
    """Role of the router's folder."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        self.router: MiniMLPRouter | None = None
        self._columns: Tensor | None = None
        self._in_order = False
        self._confidence: ConfidenceMonitor | None = None
        self._rejects: tuple[str, float] | None = None
        if self.scope_mode == "router":
            self.unread_files = ()

    @property
    def granularity(self) -> Granularity:
        """``prompt`` or ``sentence``, as configured."""
        return self.config.reroute

    @property
    def view(self) -> str:
        """What the router reads at a sentence end, as configured."""
        return self.config.view

    @property
    def prompt_routing(self) -> str:
        """How the prompt itself is routed, as configured."""
        return self.config.prompt_routing

    @property
    def kv_policy(self) -> str:
        """What happens to cached keys and values, as configured."""
        return self.config.kv_policy

    @property
    def weight_sum(self) -> WeightSum:
        """One, unless probabilities are used as they are, or prompts out of scope get no expert."""
        return "at_most_one" if self.config.renormalize == "none" or self.config.scope != "off" else "one"

    @property
    def max_kept(self) -> int:
        """Bound of the selector: the number of experts of at least ``threshold`` that fit into a mass of one; likewise for ``top_p``."""
        config = self.config
        if config.selector in {"topk", "argmax"}:
            return 1 if config.selector == "argmax" else config.top_k
        experts = len(self.expert_names)
        if config.selector == "nucleus":
            # All but the last hold at most top_p together and, as the best ranked, at least their share of the mass.
            most = experts if config.top_p >= 1.0 else math.floor(config.top_p * experts + _SLACK) + 1
        else:
            most = experts if config.threshold * experts <= 1.0 else math.floor(1.0 / config.threshold + _SLACK)
        return min(max(most, config.min_keep), experts)

    @classmethod
    def upgrade_params(cls, params: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
        """Read ``p`` and ``k``, the names before version 0.2: ``p`` was the bound of either selector."""
        selector = params.get("selector", base.get("selector", cls.Config().selector))
        names = {"p": "top_p" if selector == "nucleus" else "threshold", "k": "top_k"}
        return {names.get(key, key): value for key, value in params.items()}

    @classmethod
    def hashed_params(cls, config: Any) -> dict[str, Any]:
        """Under the names before version 0.2, so that records made with them still match."""
        params = super().hashed_params(config)
        threshold, top_p, top_k = (params.pop(name) for name in ("threshold", "top_p", "top_k"))
        return {**params, "p": top_p if config.selector == "nucleus" else threshold, "k": top_k}

    @property
    def artifact_roles(self) -> tuple[str, ...]:
        """The router, unless the configuration names its folder."""
        return (self.router_role,) if self.config.router is None else ()

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Load the router (unless ``use_router`` gave one) and match its classes to the bank's experts by name.

        Raises:
            MethodError: If there is no router, or its classes are not the bank's experts.
        """
        if self.router is None:
            folder = Path(self.config.router) if self.config.router is not None else context.artifact(self.router_role, self.name)
            self.router = MiniMLPRouter.load(folder, context.embedding)
        self.router.to(context.device).eval()
        self._columns = self.router.column_order(bank.names).to(context.device)
        self._in_order = self.router.names == tuple(bank.names)
        self._confidence = ConfidenceMonitor(self.router.metrics)
        self._rejects = self._chosen_scope()
        return super().prepare(bank, context)

    def _chosen_scope(self) -> tuple[str, float] | None:
        """Score and threshold of the configuration; None if every prompt gets experts."""
        config, scope = self.config, self.scope
        if self.scope_mode == "off":
            return None
        if self.scope_mode != "router":
            return config.scope, float(config.scope_threshold or 0.0)
        if scope is None:
            raise MethodError(f"method '{self.name}' needs the router's threshold, and {SCOPE_FILE} is missing: run `dlplora scope` first.")
        return scope.score, scope.threshold

    @property
    def scope_mode(self) -> str:
        """``scope``, as configured."""
        return self.config.scope

    @property
    def scope(self) -> ScopeThreshold | None:
        """The threshold stored with the router, even if this configuration does not use it."""
        return None if self.router is None else self.router.scope

    @torch.no_grad()
    def scope_scores(self, prompts: PromptBatch) -> dict[str, Tensor]:
        """``max_probability`` and ``energy`` (B,), float32, on the device of the prompts."""
        return {name: score.to(prompts.input_ids.device) for name, score in scores_of(*self.probabilities(prompts)).items()}

    def use_router(self, router: MiniMLPRouter) -> None:
        """Take a router from memory instead of a folder; call it before ``prepare``."""
        self.router = router
        self._columns = None

    def _ready(self) -> tuple[MiniMLPRouter, Tensor]:
        if self.router is None or self._columns is None:
            raise MethodError("method 'dlp' has no router yet; call prepare(bank, context) first.")
        return self.router, self._columns

    def probabilities(self, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """Calibrated ``(probabilities, logits)`` of the experts, in the bank's order, each float32 (B, E)."""
        router, columns = self._ready()
        probs, logits = router.probabilities(prompts.input_ids, prompts.attention_mask)
        return (probs, logits) if self._in_order else (probs[:, columns], logits[:, columns])

    def select(self, probs: Tensor) -> Tensor:
        """Boolean mask (B, E) of the kept experts."""
        config = self.config
        if config.selector == "nucleus":
            return nucleus_mask(probs, config.top_p, min_keep=config.min_keep)
        if config.selector == "threshold":
            return threshold_mask(probs, config.threshold, min_keep=config.min_keep)
        return top_k_mask(probs, 1 if config.selector == "argmax" else min(config.top_k, probs.shape[-1]))

    def weigh(self, probs: Tensor, logits: Tensor) -> Tensor:
        """Routing weights (B, E) of calibrated probabilities and their logits, each float32 (B, E)."""
        return renormalize(probs, self.select(probs), self.config.renormalize, logits=logits)

    @torch.no_grad()
    def route(self, prompts: PromptBatch) -> Tensor:
        """Routing weights (B, E), float32, on the device of the prompts.

        Warns once if the router is far less confident than on validation.
        """
        return self.route_with_confidence(prompts)[0]

    @torch.no_grad()
    def route_with_confidence(self, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """Routing weights (B, E) and the largest calibrated probability (B,), from one pass of the router; warns as ``route``."""
        probs, logits = self.probabilities(prompts)
        if self._confidence is not None:
            self._confidence.add(probs)
        device = prompts.input_ids.device
        weights = self.weigh(probs, logits)
        if self._rejects is not None:
            score, threshold = self._rejects
            weights = weights.masked_fill((scores_of(probs, logits)[score] < threshold)[:, None], 0.0)
        return weights.to(device), probs.max(dim=-1).values.to(device)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Cross-entropy of the task of each prompt; reads ``prompts`` and ``expert_idx`` only."""
        router, columns = self._ready()
        prompts = batch["prompts"]
        labels = columns[batch["expert_idx"].to(columns.device)]
        loss = router.loss({"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask, "labels": labels})
        return loss * batch.get("row_share", 1.0)  # type: ignore[no-any-return]

    def saved_state(self) -> Mapping[str, Tensor]:
        """Nothing: the router has its own files."""
        return {}

    def write_files(self, folder: Path) -> None:
        """Write ``method.json`` and the router under ``router/``."""
        router, _ = self._ready()
        super().write_files(folder)
        router.save(folder / "router")

    @classmethod
    def load(cls, folder: str | Path, bank: AdapterBank, context: MethodContext) -> FusionMethod:
        """Rebuild what ``save`` wrote; the saved router is used, not the one that context or configuration name."""
        method = cls(replace(cls.saved_config(folder, bank), router=None))
        method.use_router(MiniMLPRouter.load(Path(folder) / "router", context.embedding))
        method.prepare(bank, context)
        return method

    @classmethod
    def example_artifacts(cls, folder: Path, bank: AdapterBank, context: MethodContext) -> dict[str, Path]:
        """A random router for the bank's experts, spread enough that prompts are routed differently."""
        generator = torch.Generator().manual_seed(context.seed)
        router = MiniMLPRouter(bank.names, RouterConfig(hidden=(16, 16, 16), pooling="embeddings"), embedding=context.embedding)
        with torch.no_grad():
            for parameter in router.parameters():  # no biases: they would favour the same expert for every prompt
                scale = 2.0 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        router.scope = ScopeThreshold(score="max_probability", threshold=0.0, criterion="keep", keep=1.0)  # keeps every prompt
        router.save(folder / "router")
        return {"router": folder / "router"}
