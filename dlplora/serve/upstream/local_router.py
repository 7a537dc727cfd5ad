"""A method that routes without the whole base model: only tokenizer, input embedding and adapters are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from dlplora.adapters.fingerprint import check_backbone
from dlplora.adapters.pool import load_pool
from dlplora.errors import ConfigError
from dlplora.inference import saving
from dlplora.inference.backbones import nano_asset, resolve_backbone
from dlplora.inference.embedding_only import embedding_backbone
from dlplora.inference.prompting import context_length
from dlplora.inference.request_router import RequestRouter
from dlplora.methods.base import FusionMethod, MethodContext
from dlplora.modules.lora_bank import AdapterBank

if TYPE_CHECKING:
    from dlplora.tasks.types import Item


class LocalRouter:
    """What a ``Decider`` needs of a fused model, without layers.

    Args:
        pretrained: Base model as for ``FusedCausalLM.from_pretrained``; None is the embedded nano base model with its pool.
        pool: Folder of PEFT LoRA folders.
        method: Name of a method configuration, or a YAML file.
        method_params: Overrides of its parameters.
        artifacts: Artifact folders by role: ``router``, ``multitask``, ``trained``.
        few_shot: Training items of a task, for methods that need some.

    Raises:
        ConfigError: If the method reads layers of the base model, or makes adapters of its own that the other server does not have.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        pool: str | Path | None = None,
        method: str = "dlp",
        method_params: Mapping[str, Any] | None = None,
        artifacts: Mapping[str, str | Path | None] | None = None,
        few_shot: Callable[[str, int], Sequence[Item]] | None = None,
    ) -> None:
        from transformers import AutoTokenizer

        source = resolve_backbone(pretrained)
        roles = dict(artifacts or {})
        if pretrained is None:
            pool = pool or nano_asset("pool")
            roles |= {role: path or nano_asset(role) for role, path in roles.items() if role != "trained"}
        if pool is None:
            raise ConfigError("--pool is missing: the names of its adapters are those that the upstream server loaded.")
        opened = load_pool(pool)
        model = embedding_backbone(source)
        check_backbone(opened, model, source)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load the tokenizer of '{source}': {str(error).splitlines()[0]}") from error
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.config: Any = model.config
        self.device = torch.device("cpu")
        self.max_length = context_length(model.config, self.tokenizer)
        context = MethodContext(
            tokenizer=self.tokenizer,
            embedding=model.get_input_embeddings(),
            artifacts={role: Path(path) for role, path in roles.items() if path is not None},
            few_shot=few_shot,
        )
        bank = AdapterBank.from_pool(opened.path)
        self.method = saving.choose_method(None, method, method_params, bank, context, untrained=False)
        self.method.require_packages()
        _require_layerless(self.method)
        prepared = self.method.prepare(bank, context)
        if self.method.name != "base" and tuple(prepared.names) != tuple(bank.names):
            raise ConfigError(
                f"method '{self.method.name}' makes a new adapter; write it with `dlplora export`, load it into the "
                "upstream server, and add it with --upstream-adapter."
            )
        self.bank = AdapterBank(bank.names, {}, bank.specs)  # the factors are not needed any more
        self.patched = SimpleNamespace(hooks=[], layers={})
        self.request_router = RequestRouter(self.method, self.bank, {}, "auto")


def _require_layerless(method: FusionMethod) -> None:
    if method.granularity == "token" or type(method).attach is not FusionMethod.attach:
        raise ConfigError(
            f"method '{method.name}' reads layers of the base model and cannot route for another server; try dlp or lorauter."
        )
