"""DLP-LoRA with a router of the paper's size: "5 M parameters, 4 layers", 4,936,730 for 26 experts.

As ``dlp``, but the router has an embedding table of its own (30000 x 128) instead of the base model's embeddings. It is a separate
artifact, ``router_paper5m``: ``dlplora fit --config router_paper5m`` trains it on the same rows for as many steps as the shipped router,
and ``dlplora reproduce nano --methods dlp_paper5m`` does both. It is not shipped (20 MB). The widths are our choice
(``modules/router.py``).

Source: DLP-LoRA, arXiv:2410.01497.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dlplora.methods.base import MethodContext
from dlplora.methods.dlp import DLP
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.router import MiniMLPRouter, RouterConfig


class DLPPaper5M(DLP):
    """DLP with a router that has its own embedding table."""

    name = "dlp_paper5m"
    metadata = replace(DLP.metadata, title="DLP-LoRA, router of 4.94 M")
    router_role = "router_paper5m"

    @classmethod
    def example_artifacts(cls, folder: Path, bank: AdapterBank, context: MethodContext) -> dict[str, Path]:
        """A random router of the true size, so that counts of parameters and operations are true; written once."""
        path = folder / cls.router_role
        if not (path / "router.json").is_file():
            generator = torch.Generator().manual_seed(context.seed)
            router = MiniMLPRouter(bank.names, RouterConfig(variant="table"))
            with torch.no_grad():
                for name, parameter in router.named_parameters():
                    wide = 1.0 if name.startswith("table") else 2.0 * parameter.shape[-1] ** -0.5
                    parameter.normal_(0.0, wide if parameter.ndim == 2 else 1e-6, generator=generator)
            router.save(path)
        return {cls.router_role: path}
