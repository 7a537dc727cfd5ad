"""Train, route, fuse and benchmark LoRA adapters on one base model.

The public names are imported when they are first used, so that ``import dlplora`` costs nothing:

>>> import dlplora
>>> sorted(dlplora.__all__)[:3]
['AdapterBank', 'DLPLoRAError', 'FusedAdapter']
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from dlplora.adapters.pool import load_pool
    from dlplora.errors import DLPLoRAError
    from dlplora.evaluation.api import evaluate
    from dlplora.export.fused_adapter import FusedAdapter
    from dlplora.export.gguf_file import export_gguf
    from dlplora.export.merged_checkpoint import export_merged
    from dlplora.export.peft_folder import export_peft
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
    "FusedAdapter",
    "FusedCausalLM",
    "FusionMethod",
    "Metadata",
    "MethodContext",
    "PromptBatch",
    "Record",
    "Router",
    "RouterConfig",
    "evaluate",
    "export_gguf",
    "export_merged",
    "export_peft",
    "load_pool",
]

_HOMES = {
    "AdapterBank": "modules.lora_bank",
    "DLPLoRAError": "errors",
    "FusedAdapter": "export.fused_adapter",
    "FusedCausalLM": "inference.fused_model",
    "FusionMethod": "methods.base",
    "Metadata": "methods.base",
    "MethodContext": "methods.base",
    "PromptBatch": "types",
    "Record": "reporting.schema",
    "Router": "modules.router:MiniMLPRouter",
    "RouterConfig": "modules.router",
    "evaluate": "evaluation.api",
    "export_gguf": "export.gguf_file",
    "export_merged": "export.merged_checkpoint",
    "export_peft": "export.peft_folder",
    "load_pool": "adapters.pool",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    home = _HOMES.get(name)
    if home is None:
        from dlplora.errors import nearest

        hint = "" if name.startswith("_") else nearest(name, __all__)
        # without an object of ours, Python's traceback adds no second hint
        raise AttributeError(f"module 'dlplora' has no attribute '{name}'.{hint}", name=name, obj=None)
    from importlib import import_module

    module, _, attribute = home.partition(":")
    value = getattr(import_module(f"dlplora.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
