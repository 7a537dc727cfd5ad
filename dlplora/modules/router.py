"""The mini-MLP router: it reads a prompt and returns a probability for each expert.

Four linear layers with GELU between them, over pooled token embeddings, in two variants:

* ``backbone`` uses the base model's frozen input embeddings (Figure 1 of the paper). They are looked up, never trained, counted or saved.
* ``table`` has its own 30000 x 128 embedding and corresponds to the paper's "5 M parameters, 4 layers". The split into layers is our
  guess, because the paper gives only the total (4,936,730 at 26 experts).

Shapes: B rows, T tokens, D features, E experts. Source: DLP-LoRA, arXiv:2410.01497. The paper names neither the pooling,
nor the layer sizes, nor a calibration; those are ours. Pooling comes before the first layer (``embeddings``) or after it
(``tokens``, which also takes the maximum): a mean over embeddings blurs the one word that distinguishes two tasks, and wordings
that are not in the training data are then routed worse (``docs/nano_suite.md`` has the numbers).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dlplora.adapters.files import write_tensors
from dlplora.atomic import filling, write_json
from dlplora.config import build, short
from dlplora.documents import read_json
from dlplora.errors import ConfigError, MethodError, RoutingError
from dlplora.modules.known_tokens import KnownTokens
from dlplora.modules.precision import keeping_dtype, unusable
from dlplora.modules.router_confidence import check_metrics
from dlplora.modules.scope import SCOPE_FILE, ScopeThreshold, read_scope, write_scope
from dlplora.modules.token_pooling import max_of_rows, mean_of_rows, select_tokens

MAX_TRAINED_PARAMETERS = 5_000_000
"""The paper's size of the router, taken as an upper bound."""

DEFAULT_HIDDEN: dict[str, tuple[int, ...]] = {"backbone": (256, 512, 256), "table": (768, 768, 512)}
DEFAULT_POOLING: dict[str, Literal["embeddings", "tokens"]] = {"backbone": "tokens", "table": "embeddings"}
TEMPERATURE_RANGE = (0.05, 20.0)
FILE_FORMAT = 2


MAX_WIDTH = 1 << 16
MAX_TABLE = 1 << 30
"""Values of an own table: 4 GB. Sizes are checked before memory is taken, since a file may ask for any."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Configuration of the router."""

    variant: Literal["backbone", "table"] = "backbone"
    """Where token features come from: the base model's frozen embeddings, or a table of the router's own."""
    hidden: tuple[int, ...] | None = None
    """Widths between the four linear layers, so three numbers. None: 256-512-256 (base model), 768-768-512 (table)."""
    pooling: Literal["embeddings", "tokens"] | None = None
    """``embeddings``: the mean over a prompt's token embeddings enters the first layer. ``tokens``: the first layer runs on every
    token, and the mean and the maximum over tokens enter the second. None: tokens (base model), embeddings (table)."""
    max_tokens: int = 256
    """Longest input in tokens. Of a longer prompt the router reads the beginning and the end, where instructions usually are."""
    dropout: float = 0.0
    """Dropout after each GELU, in training only."""
    table_rows: int = 30_000
    """Rows of the own table. Token ids beyond it share rows (id modulo rows)."""
    table_width: int = 128
    """Columns of the own table."""

    def __post_init__(self) -> None:
        hidden = DEFAULT_HIDDEN[self.variant] if self.hidden is None else tuple(self.hidden)
        object.__setattr__(self, "hidden", hidden)
        object.__setattr__(self, "pooling", self.pooling or DEFAULT_POOLING[self.variant])
        if len(hidden) != 3 or any(not 1 <= width <= MAX_WIDTH for width in hidden):
            raise ConfigError(f"router: 'hidden' must be three positive widths (four linear layers), got {list(hidden)}.")
        if not 2 <= self.max_tokens < 2**31:
            raise ConfigError(f"router: 'max_tokens' must be at least 2, got {self.max_tokens}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"router: 'dropout' must be in [0, 1), got {self.dropout}.")
        if self.table_rows < 1 or not 1 <= self.table_width <= MAX_WIDTH or self.table_rows * self.table_width > MAX_TABLE:
            raise ConfigError(
                f"router: a table has rows, columns and at most {MAX_TABLE:,} values, got {self.table_rows} x {self.table_width}."
            )


@dataclass(frozen=True, kw_only=True)
class _Description:
    """The content of ``router.json``."""

    format: int
    names: list[str]
    config: RouterConfig
    embedding_shape: tuple[int, int] | None
    temperature: Annotated[float, Field(gt=0)]
    num_trained_parameters: int | None = None
    metrics: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_metrics(self.metrics or {})


class MiniMLPRouter(nn.Module):
    """Token ids -> logits over experts.

    Args:
        names: Class order; the name of an expert is the name of its task.
        config: Sizes and variant of the network.
        embedding: The base model's input embedding, for ``variant="backbone"`` only. It is called but not registered, so it is not
            among this module's parameters and is not moved.

    Raises:
        ConfigError: If names repeat, the embedding is missing, or more than 5 M parameters would be trained.
    """

    temperature: Tensor

    def __init__(self, names: Sequence[str], config: RouterConfig | None = None, *, embedding: nn.Module | None = None) -> None:
        super().__init__()
        if config is not None and not isinstance(config, RouterConfig):
            raise ConfigError(f"router: config must be a RouterConfig, got {type(config).__name__}.")
        if isinstance(names, str):
            raise ConfigError(f"router: class names must be a list, got the text '{names}'.")
        self.config = RouterConfig() if config is None else config
        self.names = tuple(names)
        if not self.names or len(set(self.names)) != len(self.names):
            raise ConfigError(f"router: class names must be given and distinct, got {list(self.names)}.")
        self.table: nn.Embedding | None = None
        if self.config.variant == "table":
            width = self.config.table_width
            self.table = nn.Embedding(self.config.table_rows, width)
            self._borrowed: tuple[nn.Module, ...] = ()
            self.embedding_shape: tuple[int, int] | None = None
        else:
            if embedding is None:
                raise ConfigError(
                    "router: variant 'backbone' needs the base model's input embedding; pass embedding=model.get_input_embeddings()."
                )
            weight: Any = embedding.weight
            self.embedding_shape = (int(weight.shape[0]), int(weight.shape[1]))
            width = self.embedding_shape[1]
            self._borrowed = (embedding,)  # inside a tuple, so that nn.Module does not register it
        first = (self.config.hidden or ())[0]
        by_token = self.config.pooling == "tokens"
        self.token_layer = nn.Sequential(nn.Linear(width, first), nn.GELU()) if by_token else None
        self.mlp = self._build_mlp(2 * first, 1) if by_token else self._build_mlp(width, 0)
        self.register_buffer("temperature", torch.ones(()))
        self._known = KnownTokens()
        self.metrics: dict[str, Any] = {}
        self.scope: ScopeThreshold | None = None
        """Below it a prompt is out of scope; None if it was never chosen (`dlplora scope`)."""
        if self.num_trained_parameters > MAX_TRAINED_PARAMETERS:
            raise ConfigError(
                f"router: {self.num_trained_parameters:,} trained parameters, at most {MAX_TRAINED_PARAMETERS:,} are allowed "
                f"(input width {width}, hidden {list(self.config.hidden or ())}). Choose smaller 'hidden' widths."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> MiniMLPRouter:
        """A router computes in float32, even if the model that it belongs to is cast to another dtype."""
        self._known = KnownTokens()
        return super()._apply(keeping_dtype(fn), recurse)

    def _build_mlp(self, width: int, start: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for hidden in (self.config.hidden or ())[start:]:
            layers += [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(self.config.dropout)]
            width = hidden
        return nn.Sequential(*layers, nn.Linear(width, len(self.names)))

    @property
    def num_trained_parameters(self) -> int:
        """Trained parameters; the borrowed embedding is not one of them."""
        return sum(parameter.numel() for parameter in self.parameters())

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled token features, float32 (B, D); independent of padding to the last bit.

        The scale of embeddings differs by a factor of a hundred between base models, hence the parameter-free layer normalisation of the
        ``backbone`` variant; the ``table`` variant learns its own scale. With ``pooling="tokens"`` D is twice the first width.

        Args:
            input_ids: Ids of the base model's tokenizer, int64 (B, T).
            attention_mask: Non-zero for real tokens, (B, T); padding on either side.

        Raises:
            RoutingError: If a row holds no real token.
        """
        keep = select_tokens(attention_mask, self.config.max_tokens)
        lengths = keep.sum(dim=1)
        if int(lengths.min()) == 0:
            row = int(lengths.argmin())
            raise RoutingError(f"router: prompt {row} of the batch has no tokens; a prompt needs at least one, for instance the bos token.")
        device = self.temperature.device
        packed, lengths = input_ids[keep].to(device), lengths.to(device)
        if self.token_layer is None:
            tokens = self._embedded(packed)
            pooled = mean_of_rows(tokens, lengths)
            return pooled if self.table is not None else F.layer_norm(pooled, pooled.shape[-1:])
        places = None
        if self.training:
            hidden = self._hidden(packed)
        elif torch.is_grad_enabled():  # the first layer sees a token once, however often the rows repeat it
            packed, places = torch.unique(packed, return_inverse=True)
            hidden = self._hidden(packed)
        else:
            places, hidden = self._remembered(packed)
        return torch.cat([mean_of_rows(hidden, lengths, places), max_of_rows(hidden, lengths, places)], dim=-1)

    def _embedded(self, ids: Tensor) -> Tensor:
        """Embeddings (N, D) of token ids (N,), float32, on the device of the router."""
        if self.table is not None:
            return self.table(ids % self.config.table_rows)  # type: ignore[no-any-return]
        embedding = self._borrowed[0]
        weight: Any = embedding.weight
        with torch.no_grad():
            return embedding(ids.to(weight.device)).to(device=self.temperature.device, dtype=torch.float32)  # type: ignore[no-any-return]

    def _hidden(self, ids: Tensor) -> Tensor:
        """What the first layer makes of token ids (N,)."""
        assert self.token_layer is not None
        tokens = self._embedded(ids)
        return self.token_layer(tokens if self.table is not None else F.layer_norm(tokens, tokens.shape[-1:]))  # type: ignore[no-any-return]

    def _remembered(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The same of tokens that may have been seen before: places (N,) in a table (M, D)."""
        embedding: Any = self._borrowed[0] if self.table is None else self.table
        assert self.token_layer is not None
        ids = ids if self.table is None else ids % self.config.table_rows
        return self._known.look_up(ids, len(embedding.weight), [embedding.weight, *self.token_layer.parameters()], self._hidden)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, E) in the order of ``names``, before the temperature."""
        return self.mlp(self.features(input_ids, attention_mask))

    def probabilities(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Calibrated ``(probabilities, logits)``, each float32 (B, E): logits divided by the temperature, then softmax."""
        logits = self(input_ids, attention_mask).float() / self.temperature
        return logits.softmax(dim=-1), logits

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean cross-entropy of ``batch["labels"]`` (int64 (B,), index into ``names``).

        Also reads ``input_ids`` and ``attention_mask`` (B, T). The temperature is left out: it is fitted afterwards.
        """
        return F.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    @torch.no_grad()
    def calibrate(self, logits: Tensor, labels: Tensor) -> float:
        """Set the temperature that minimises the negative log-likelihood of held-out logits.

        The likelihood has one optimum in 1/T, so a golden-section search over log T finds it, without start value or step size,
        and with the same bits every time. The search stays within 0.05..20; otherwise T would go to zero for a router without
        mistakes on the held-out data.

        Args:
            logits: Validation logits (n, E), before any temperature.
            labels: Class indices (n,).

        Returns:
            The temperature.

        Source: Guo et al., arXiv:1706.04599 (temperature scaling). Top-p selection depends on calibration, hence ours.
        """
        if logits.ndim != 2 or logits.shape[0] != labels.shape[0] or logits.shape[0] == 0:
            raise ConfigError(
                f"router: calibration needs logits (n, E) and labels (n,), got {tuple(logits.shape)} and {tuple(labels.shape)}."
            )
        scores, gold = logits.double(), labels.long()

        def negative_log_likelihood(log_temperature: float) -> float:
            return float(F.cross_entropy(scores / math.exp(log_temperature), gold))

        temperature = math.exp(golden_section(negative_log_likelihood, math.log(TEMPERATURE_RANGE[0]), math.log(TEMPERATURE_RANGE[1])))
        self.temperature.fill_(temperature)
        return float(self.temperature)

    def column_order(self, names: Sequence[str]) -> Tensor:
        """Columns of the logits in the order of ``names``: ``logits[:, order][:, j]`` belongs to ``names[j]``.

        Raises:
            MethodError: If the two sets of names differ; both differences are named.
        """
        unknown_to_router = sorted(set(names) - set(self.names))
        without_adapter = sorted(set(self.names) - set(names))
        if unknown_to_router or without_adapter:
            raise MethodError(
                f"the router and the adapter pool disagree: adapters without a router class {unknown_to_router}, "
                f"router classes without an adapter {without_adapter}. Train a router for this pool or load the pool it was trained for."
            )
        position = {name: column for column, name in enumerate(self.names)}
        return torch.tensor([position[name] for name in names], dtype=torch.long)

    def save(self, folder: str | os.PathLike[str], metrics: Mapping[str, Any] | None = None) -> None:
        """Write ``router.safetensors``, ``router.json`` and, if there is a threshold, ``scope.json``, atomically together.

        Args:
            folder: Made if it does not exist.
            metrics: Measurements on held-out data (JSON values); for readers and for the warning of ``router_confidence``, not used in
                routing.
        """
        if metrics is not None:
            self.metrics = dict(metrics)
        description = {
            "format": FILE_FORMAT,
            "names": list(self.names),
            "config": {**asdict(self.config), "hidden": list(self.config.hidden or ())},
            "embedding_shape": None if self.embedding_shape is None else list(self.embedding_shape),
            "temperature": float(self.temperature),
            "num_trained_parameters": self.num_trained_parameters,
            "metrics": self.metrics,
        }
        tensors = {key: value.detach().contiguous().cpu() for key, value in self.state_dict().items()}
        (Path(folder) / SCOPE_FILE).unlink(missing_ok=True)  # of the router that was here
        with filling(folder, "router.json") as temporary:
            write_tensors(temporary / "router.safetensors", tensors)
            if self.scope is not None:
                write_scope(temporary, self.scope)
            write_json(temporary / "router.json", description)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], embedding: nn.Module | None = None) -> MiniMLPRouter:
        """Read a router, in evaluation mode, on the CPU.

        Args:
            folder: What ``save`` wrote.
            embedding: The base model's input embedding; ignored by the ``table`` variant.

        Raises:
            MethodError: If a file is missing or damaged, or the router was trained on embeddings of another shape.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        for file in ("router.json", "router.safetensors"):
            if not (folder / file).is_file():
                raise MethodError(f"no router in {folder}: {file} is missing. Point to a folder written by router training.")
        path = folder / "router.json"
        content = read_json(path, error=MethodError)
        if content.get("format") != FILE_FORMAT:
            raise MethodError(f"{path} has format {short(content.get('format'))}, expected {FILE_FORMAT}. Train the router again.")
        description = build(_Description, content, str(path), error=MethodError)
        router = cls(description.names, description.config, embedding=embedding)
        shape = description.embedding_shape
        if shape is not None and shape != router.embedding_shape:
            raise MethodError(
                f"the router in {folder} was trained on base model embeddings of shape {shape}, this base model has "
                f"{router.embedding_shape}. Train a router for this base model."
            )
        try:
            tensors = load_file(folder / "router.safetensors")
            router.load_state_dict(tensors)
        except (SafetensorError, RuntimeError) as error:
            first_line = str(error).splitlines()[0]
            raise MethodError(f"cannot read {folder / 'router.safetensors'}: {first_line} Train the router again.") from error
        reason = unusable(tensors, router.state_dict())
        if reason is None and float(router.temperature) <= 0:
            reason = f"a temperature of {float(router.temperature)}"
        if reason is not None:
            raise MethodError(f"{folder / 'router.safetensors'}: {reason}. Train the router again.")
        precision = max(1e-6, torch.finfo(tensors["temperature"].dtype).eps)
        if not math.isclose(description.temperature, float(router.temperature), rel_tol=precision):
            raise MethodError(
                f"{path}: 'temperature' is {description.temperature}, but router.safetensors, which is used, holds "
                f"{float(router.temperature):.6g}. Restore the file that belongs to the tensors, or train the router again."
            )
        router.metrics = dict(description.metrics or {})
        router.scope = read_scope(folder)
        return router.eval()


def golden_section(function: Any, low: float, high: float, tolerance: float = 1e-6) -> float:
    """Minimum of a unimodal function in [low, high], to within ``tolerance``.

    >>> round(golden_section(lambda x: (x - 2.0) ** 2, -5.0, 5.0), 4)
    2.0
    """
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2.0
