"""Train, route, fuse and benchmark LoRA adapters on one base model.

The public names are imported when they are first used, so that ``import dlplora`` costs nothing:

>>> import dlplora
>>> sorted(dlplora.__all__)[:3]
['AdapterBank', 'DLPLoRAError', 'FusedCausalLM']
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from dlplora.adapters.pool import load_pool
    from dlplora.errors import DLPLoRAError
    from dlplora.evaluation.api import evaluate
    from dlplora.inference.fused_model import FusedCausalLM
    from dlplora.methods.base import FusionMethod, Metadata, MethodContext
    from dlplora.modules.lora_bank import AdapterBank
    from dlplora.modules.router import MiniMLPRouter as Router
    from dlplora.modules.router import RouterConfig
    from dlplora.reporting.schema import Record
    from dlplora.types import PromptBatch

__all__ = [
    "AdapterBank",
    "DLPLoRAError",
    "FusedCausalLM",
    "FusionMethod",
    "Metadata",
    "MethodContext",
    "PromptBatch",
    "Record",
    "Router",
    "RouterConfig",
    "evaluate",
    "load_pool",
]

_HOMES = {
    "AdapterBank": "modules.lora_bank",
    "DLPLoRAError": "errors",
    "FusedCausalLM": "inference.fused_model",
    "FusionMethod": "methods.base",
    "Metadata": "methods.base",
    "MethodContext": "methods.base",
    "PromptBatch": "types",
    "Record": "reporting.schema",
    "Router": "modules.router:MiniMLPRouter",
    "RouterConfig": "modules.router",
    "evaluate": "evaluation.api",
    "load_pool": "adapters.pool",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    home = _HOMES.get(name)
    if home is None:
        from dlplora.errors import nearest

        hint = "" if name.startswith("_") else nearest(name, __all__)
        raise AttributeError(f"module 'dlplora' has no attribute '{name}'.{hint}")
    from importlib import import_module

    module, _, attribute = home.partition(":")
    value = getattr(import_module(f"dlplora.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
