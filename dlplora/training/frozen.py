"""The frozen base model of a training run: found by name and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dlplora.config import ASSETS_ROOT
from dlplora.errors import ConfigError
from dlplora.inference.backbones import NAMED, resolve_backbone
from dlplora.inference.model_files import ReadingModel, check_sizes

NANO_NAME = "dlplora/nano"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def backbone_source(backbone: str | None) -> str:
    """Folder or hub id of a base model, as ``resolve_backbone`` finds it; None is the embedded nano model.

    Raises:
        ConfigError: If a local folder is meant and missing, or the package holds no nano base model.
    """
    if backbone is None:
        folder = ASSETS_ROOT / "nano" / "backbone"
        if not folder.is_dir():
            raise ConfigError(
                f"the embedded nano base model is not installed ({folder}). Set model.init_args.backbone to a folder or a hub id."
            )
        return str(folder)
    if backbone.startswith("runs/") and not Path(backbone).is_dir():  # one slash, as in a hub id
        raise ConfigError(f"base model folder not found: {backbone}. Set model.init_args.backbone to a folder or a hub id.")
    return resolve_backbone(backbone)


def base_name_of(backbone: str | None, given: str | None = None) -> str:
    """What an adapter names as its base model: the given name, else the hub id, or the absolute path of a local model.

    The name of the embedded model is no name of another one.
    """
    if backbone is None or given not in (None, NANO_NAME):
        return given or NANO_NAME
    if backbone in NAMED and not Path(backbone).exists():
        return NAMED[backbone].hub_id
    local = Path(backbone).expanduser()
    return str(local.absolute()) if local.exists() else backbone


def load_tokenizer(backbone: str | None) -> Any:
    """The base model's tokenizer."""
    from transformers import AutoTokenizer

    source = backbone_source(backbone)
    with ReadingModel(source):
        return AutoTokenizer.from_pretrained(source)


def load_frozen(backbone: str | None, dtype: str = "float32") -> Any:
    """The base model in evaluation mode, with no parameter that trains."""
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    source = backbone_source(backbone)
    with ReadingModel(source):
        check_sizes(PreTrainedConfig.get_config_dict(source)[0], source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype])
    return model.requires_grad_(False).eval()
