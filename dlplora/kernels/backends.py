"""Choose the backend that serves given routing weights. Every result records its backend by name."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dlplora.errors import RoutingError, nearest
from dlplora.kernels.cost_model import Work, predict

BACKENDS: dict[str, str] = {
    "reference": "loop over experts in float32; the definition",
    "dense": "all experts concatenated, two matrix products; any granularity",
    "folded": "kept experts gathered once per set of routing weights; static, prompt and sentence level",
    "merged": "routing weights written into a copy of the base weights; all rows routed alike, plain base layers",
    "triton": "kept experts read in place by grouped Triton kernels; many rows that share experts",
}
GATE_BACKENDS = ("reference", "dense")
"""Backends that can serve routing weights that a gate decides token by token."""
AUTOMATIC = ("folded", "dense")
"""What ``auto`` chooses from. ``merged`` doubles the memory of the adapted weights and rounds the delta to their dtype, and ``triton``
has no measured constants yet: both must be requested by name."""

Kind = Literal["static", "row", "token"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingFacts:
    """What decides whether a backend can serve routing weights.

    Args:
        kind: ``static`` (E,), ``row`` (B, E) or ``token`` (B, T, E).
        rows: B; 1 for static weights.
        experts: E.
        width: Experts a row can keep, now or after a re-route. kept: Experts the fullest row keeps now; 0 if not counted.
        alike: Whether all rows have equal weights and will keep them.
        sized: Whether buffer sizes must not depend on the values of the weights, as compiled graphs need it.
        finite: Whether all weights are finite. zero: Whether all weights are zero.
        gradients: Whether gradients must reach the routing weights.
        device: Device type.
    """

    kind: Kind
    rows: int
    experts: int
    width: int
    alike: bool
    sized: bool = False
    finite: bool = True
    zero: bool = False
    gradients: bool = False
    device: str = "cpu"
    kept: int = 0

    @property
    def weight_rows(self) -> int:
        """Rows that folded buffers must hold: equal rows share one, unless the rows of another request of this size may differ."""
        return 1 if self.alike and not self.sized else self.rows

    @classmethod
    def of(cls, weights: Tensor, *, width: int | None = None, reroutes: bool = False) -> RoutingFacts:
        """Facts of routing weights (E,), (B, E) or (B, T, E); ``reroutes``: single rows may be routed again.

        They are read from the device in one transfer.
        """
        kinds: dict[int, Kind] = {1: "static", 2: "row", 3: "token"}
        kind, experts = kinds[weights.ndim], weights.shape[-1]
        rows = 1 if kind == "static" else weights.shape[0]
        flat = weights.detach().reshape(weights.shape[:-1].numel(), experts)  # -1 is ambiguous in an empty bank
        kept = (flat != 0).sum(-1).max()
        finite, most, same = torch.stack([torch.isfinite(flat).all().to(kept), kept, (flat == flat[:1]).all().to(kept)]).tolist()
        return cls(
            kind=kind,
            rows=rows,
            experts=experts,
            width=experts if kind == "token" else min(max(most, width or 1), experts),
            alike=kind != "token" and (rows == 1 or (bool(same) and not reroutes)),
            sized=width is not None,
            finite=bool(finite),
            zero=most == 0,
            gradients=weights.requires_grad and torch.is_grad_enabled(),
            device=weights.device.type,
            kept=most,
        )


def obstacle(name: str, facts: RoutingFacts) -> str | None:
    """The property of the routing weights that a backend cannot serve, as a clause; None if it can."""
    if name in {"reference", "dense"}:
        return None
    if facts.kind == "token":
        return "its routing weights change per token"
    if facts.gradients:
        return "gradients must reach its routing weights, and the backend copies them"
    if name == "merged" and not facts.alike:
        return f"its {facts.rows} rows are routed differently, or may be after a sentence end"
    if name == "triton":
        return triton_obstacle(facts.device)
    return None


def triton_obstacle(device: str) -> str | None:
    """Why Triton cannot run on a device type, as a clause; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install 'dlplora[triton]')"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on {device}, and Triton needs a CUDA device (or its interpreter: TRITON_INTERPRET=1, slow)"
    return None


def require_known(name: str) -> None:
    """Check the name of a backend.

    Raises:
        RoutingError: If it is neither ``auto`` nor a key of ``BACKENDS``.
    """
    if name != "auto" and name not in BACKENDS:
        raise RoutingError(f"unknown backend '{name}'.{nearest(name, BACKENDS)} Known: auto, {', '.join(BACKENDS)}.")


def require_gates_served(name: str, method: str) -> None:
    """Check that a backend can serve a method with gates that decide for every token.

    Raises:
        RoutingError: If it cannot; names those that can.
    """
    require_known(name)
    if name != "auto" and name not in GATE_BACKENDS:
        raise RoutingError(
            f"backend '{name}' cannot serve method '{method}': its gates decide routing weights per token. "
            f"Backends that can: {', '.join(GATE_BACKENDS)}; or auto."
        )


def select_backend(name: str, facts: RoutingFacts, work: Work | None = None) -> str:
    """Resolve ``auto`` and check that a named backend can serve the weights.

    Args:
        name: ``auto`` or a key of ``BACKENDS``.
        facts: Properties of the weights.
        work: What it will be used for. Without it, or on a device without constants, the backend that reads fewer factors is taken.

    Raises:
        RoutingError: For an unknown name, or a backend that cannot serve the weights; names the property that forbids it and the
            backends that can.
    """
    require_known(name)
    if name != "auto":
        reason = obstacle(name, facts)
        if reason is None:
            return name
        able = [other for other in BACKENDS if obstacle(other, facts) is None]
        raise RoutingError(f"backend '{name}' cannot serve this request: {reason}. Backends that can: {', '.join(able)}; or auto.")
    able = [other for other in AUTOMATIC if obstacle(other, facts) is None]
    width = facts.kept if work is not None and work.eager and facts.device == "cpu" and facts.kept else facts.width
    times = {} if work is None else {other: predict(other, work, facts.rows, facts.weight_rows, width) for other in able}
    known = {other: seconds for other, seconds in times.items() if seconds is not None}
    if len(known) == len(able):
        return min(known, key=lambda other: known[other])
    reads = {"folded": facts.weight_rows * facts.width, "dense": facts.experts}
    return min(able, key=lambda other: reads[other])
