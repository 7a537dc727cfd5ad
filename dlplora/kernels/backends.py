"""Which backend serves a plan. The choice is recorded by name with every result."""

from __future__ import annotations

from torch import Tensor

from dlplora.errors import RoutingError, nearest
from dlplora.kernels.folded import kept_width

BACKENDS: dict[str, str] = {
    "reference": "loop over experts in float32; the definition",
    "dense": "all experts concatenated, two matrix products; any granularity",
    "folded": "kept experts gathered once per plan; static, prompt and sentence level",
}


def select_backend(name: str, weights: Tensor | None, num_experts: int, rank: int) -> str:
    """Resolve ``auto`` and check that a named backend can serve the plan.

    Args:
        name: ``auto`` or a key of ``BACKENDS``.
        weights: Routing weights (E,), (B, E) or (B, T, E); None when gates inside the layers decide.
        num_experts: E.
        rank: R.

    Raises:
        RoutingError: For an unknown name, or a backend that cannot serve such weights; names those that can.
    """
    if name != "auto" and name not in BACKENDS:
        raise RoutingError(f"unknown backend '{name}'.{nearest(name, BACKENDS)} Known: auto, {', '.join(BACKENDS)}.")
    per_token = weights is None or weights.ndim == 3
    if per_token:
        if name == "folded":
            raise RoutingError("backend 'folded' cannot serve routing weights that change per token; use dense, reference or auto.")
        return "dense" if name == "auto" else name
    if name != "auto":
        return name
    assert weights is not None
    # Folding reads K of E experts; once a plan keeps most of them the gathered copy is no smaller than the bank.
    return "folded" if 2 * kept_width(weights.reshape(-1, num_experts)) <= num_experts or num_experts == 1 else "dense"
