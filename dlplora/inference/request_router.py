"""From prompts to a routing state: call the method, check its weights, choose the backend, size the buffers.

Shapes: B rows, E experts, K experts per row at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from dlplora.errors import RoutingError
from dlplora.kernels.backends import require_gates_served, require_known
from dlplora.kernels.cost_model import LayerShape, Work
from dlplora.kernels.merged import unreadable
from dlplora.methods.base import FusionMethod
from dlplora.modules.fused_linear import FusedLinear
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.routing_state import RoutingState
from dlplora.types import PromptBatch

_MANY = 1000
"""Decode steps that make the cost of the buffers and of the prefill negligible."""

TYPICAL_PROMPT = 128
"""Assumed number of tokens per row for weights bound by a caller."""


class RequestRouter:
    """Makes the routing states of one fused model.

    Args:
        method: Prepared and attached.
        bank: The bank that runs.
        layers: The fused layers by module path.
        backend: ``auto`` or a backend's name.

    Attributes:
        used: Names of the backends that bound routing weights and gates have used so far; the code that binds a state adds its backend.
        num_weights: Routing weights of a row: E, or E for every block where they differ from layer to layer (``FusedLinear.block``).
        weighs_parts: Whether layers or ranks of an adapter have weights of their own, which only ``dense`` and ``reference`` can serve.
        fixed_width: Whether all buffers have room for as many experts as the method may keep, so that compiled graphs fit all of them.

    Raises:
        RoutingError: If the backend is unknown, or cannot serve the method or a layer; names which property forbids it.
    """

    def __init__(self, method: FusionMethod, bank: AdapterBank, layers: Mapping[str, FusedLinear], backend: str) -> None:
        self.method, self.bank, self.backend = method, bank, backend
        self.used: set[str] = set()
        self.fixed_width = False
        self._combines_factors = method.metadata.combine == "factor"
        self._fused = layers
        self.num_weights = max([bank.num_experts, *(layer.block.stop for layer in layers.values() if layer.block is not None)])
        self.weighs_parts = any(layer.block is not None or layer.rank_gate is not None for layer in layers.values())
        self._layers = _shapes(layers)
        require_known(backend)
        if self._combines_factors and backend not in {"auto", "dense"}:
            raise RoutingError(f"backend '{backend}' sums deltas, method '{method.name}' sums factors; use dense or auto.")
        if self.weighs_parts and backend not in {"auto", "dense", "reference"}:
            raise RoutingError(
                f"backend '{backend}' has one weight per adapter, method '{method.name}' weights layers or ranks separately; use "
                "dense, reference or auto."
            )
        self.is_gated = any(layer.gate is not None for layer in layers.values())
        """Whether gates inside the layers decide, so that no routing weights can be given."""
        if self.is_gated:
            require_gates_served(backend, method.name)
            self.used.add(self.gate_backend)
        if backend == "merged":
            _require_plain(layers)

    def with_backend(self, backend: str) -> RequestRouter:
        """A request router of the same model for another backend."""
        other = RequestRouter(self.method, self.bank, self._fused, backend)
        other.fixed_width = self.fixed_width
        return other

    @property
    def gate_backend(self) -> str:
        """Backend of layers with a gate."""
        return "reference" if self.backend == "reference" else "dense"

    def route(self, prompts: PromptBatch) -> Tensor | None:
        """Routing weights (B, E) of the method, or None if gates decide, or without any expert.

        Task names reach only methods that declare ``task_id``.

        Raises:
            RoutingError: If they have another shape.
        """
        return self.route_with_confidence(prompts)[0]

    def route_with_confidence(self, prompts: PromptBatch) -> tuple[Tensor | None, Tensor | None]:
        """What ``route`` returns, and the method's confidence (B,), None where it has none."""
        if self.bank.num_experts == 0:
            return None, None
        if "task_id" not in self.method.metadata.needs:
            prompts = prompts.without_task_names()
        weights, confidence = self.method.route_with_confidence(prompts)
        if weights is not None and tuple(weights.shape) != (len(prompts), self.num_weights):
            raise RoutingError(
                f"method '{self.method.name}' returned routing weights of shape {tuple(weights.shape)}, "
                f"expected {(len(prompts), self.num_weights)} (rows, experts)."
            )
        return weights, confidence

    def per_expert(self, weights: Tensor) -> Tensor:
        """Routing weights (..., E) of weights that may differ from layer to layer: their mean over the blocks."""
        experts = self.bank.num_experts
        return weights if weights.shape[-1] == experts else weights.unflatten(-1, (-1, experts)).mean(dim=-2)

    def state(
        self, weights: Tensor, *, own: bool = False, reroutes: bool = False, prompt_tokens: int = TYPICAL_PROMPT, new_tokens: int = 0
    ) -> RoutingState:
        """The state of routing weights (E,), (B, E) or (B, T, E) on the device of the model.

        Args:
            weights: From ``route``, or from a caller.
            own: Whether they come from the method, so that its ``max_kept`` holds for them.
            reroutes: Whether rows will be routed again at sentence ends.
            prompt_tokens, new_tokens: Expected work, for the choice of ``auto``.

        Raises:
            RoutingError: If they are for another number of experts, not finite, or the backend cannot serve them.
        """
        if weights.shape[-1] == self.bank.num_experts != self.num_weights:  # given by a caller: the same for every layer
            weights = weights.repeat(*[1] * (weights.ndim - 1), self.num_weights // self.bank.num_experts)
        if weights.shape[-1] != self.num_weights:
            raise RoutingError(f"routing weights are for {weights.shape[-1]} experts, the bank has {self.bank.num_experts}.")
        itemsize = next(iter(self.bank.modules.values())).lora_a.itemsize if self.bank.modules else 4
        if self.fixed_width:  # the choice must not depend on the request, or the next one would be compiled again
            prompt_tokens, new_tokens = 1, _MANY
        work = Work(
            layers=self._layers, device=weights.device.type, itemsize=itemsize, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
            eager=not self.fixed_width,
        )  # fmt: skip
        fixed = own and (reroutes or self.fixed_width) and weights.ndim == 2
        return RoutingState(
            weights,
            "dense" if self._combines_factors or (self.weighs_parts and self.backend == "auto") else self.backend,
            width=self._width() if fixed else None,
            reroutes=reroutes,
            work=work,
        )

    def given(self, routing: Tensor | RoutingState, device: torch.device, *, for_call: bool = False) -> RoutingState:
        """The state of routing weights that a caller gives.

        Args:
            routing: Weights as for ``state``, or a state, which is used unchanged.
            device: Of the model.
            for_call: Whether they are an argument of a call that must follow them.

        Raises:
            RoutingError: If gates decide in every layer, so that the call could not follow; and what ``state`` raises.
        """
        if for_call and self.is_gated:
            raise RoutingError(f"method '{self.method.name}' decides by gates inside the layers and takes no routing weights.")
        if not isinstance(routing, (Tensor, RoutingState)):
            raise RoutingError(f"routing weights must be a tensor (E,), (B, E) or (B, T, E), got {type(routing).__name__}.")
        state = routing if isinstance(routing, RoutingState) else self.state(routing.to(device))
        self.used.add(state.backend)
        return state

    def _width(self) -> int:
        """K for buffers that must not grow."""
        most = self.method.max_kept
        return self.num_weights if most is None else max(1, min(most, self.num_weights))


def _shapes(layers: Mapping[str, FusedLinear]) -> tuple[LayerShape, ...]:
    """The layers' sizes, equal ones counted."""
    sizes = Counter((layer.in_features, layer.out_features, layer.lora_a.shape[0], layer.lora_a.shape[1]) for layer in layers.values())
    return tuple(LayerShape(*size, count) for size, count in sizes.items())


def _require_plain(layers: Mapping[str, FusedLinear]) -> None:
    for path, layer in layers.items():
        reason = unreadable(layer.base)
        if reason is not None:
            raise RoutingError(
                f"backend 'merged' cannot serve module '{path}': {reason}. Backends that can: reference, dense, folded, triton; or auto."
            )
