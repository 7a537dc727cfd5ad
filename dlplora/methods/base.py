"""The base class of fusion methods: a method decides the routing weights of a prompt, or installs gates that decide them per token.

The bank, the fused layer, generation, scoring and timing are the same for all methods. Shapes: B rows, T tokens, E experts.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dlplora.adapters.files import write_tensors
from dlplora.atomic import filling
from dlplora.config import OMIT_DEFAULT_FROM_HASH, build
from dlplora.errors import MethodError, UnavailableMethodError
from dlplora.methods.fused_protocol import FusedModel
from dlplora.modules.precision import keeping_dtype, unusable
from dlplora.modules.scope import SCOPE_FILE, ScopeThreshold
from dlplora.types import PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dlplora.modules.lora_bank import AdapterBank
    from dlplora.tasks.types import Item

Granularity = Literal["none", "task", "prompt", "sentence", "token"]
Need = Literal["task_id", "labels", "inputs", "few_shot", "all_tasks_adapter", "trained"]
WEIGHTS_NAME = "method.safetensors"
WeightSum = Literal["one", "at_most_one", "zero", "any"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metadata:
    """Facts about a method, printed by ``dlplora methods`` and stored with every result."""

    title: str
    paper: str | None = None
    """URL of the paper, or None for a reference row of our own."""
    granularity: Granularity
    """How often routing weights may change. ``none`` = never (static)."""
    depth: Literal["model", "layer", "module"] = "model"
    combine: Literal["delta", "factor"] = "delta"
    """``delta``: sum of scaling * B @ A. ``factor``: A and B are summed first, which adds cross terms."""
    needs: tuple[Need, ...] = ()
    """What the method must be given beyond prompts. ``inputs``: training prompts of known tasks; ``labels``: their answers, or their task
    where a router learns that; ``few_shot``: a few solved examples at evaluation; ``task_id``: the protocol's task name, which no other
    method sees; ``trained``: a folder that ``LitFusion`` exported, given as ``trained=FOLDER``."""
    trainable: bool = False
    weight_sum: WeightSum = "one"
    """The documented sum of the routing weights of a row (conformance test T8)."""
    heterogeneous: bool = True
    """Whether rows of one batch may be routed differently."""
    exempt: tuple[str, ...] = ()
    """Conformance lines (``"T2"``) that the method breaks by its definition; the suite then checks that it does break them.
    ``combine="factor"`` implies T12 and need not be repeated."""


@dataclass(frozen=True, kw_only=True)
class MethodContext:
    """What a method may use in ``prepare``: the base model's frozen embeddings, the tokenizer, named artifacts."""

    tokenizer: PreTrainedTokenizerBase
    embedding: nn.Module
    """The base model's input embedding; frozen, read by routers."""
    artifacts: Mapping[str, Path] = field(default_factory=dict)
    """Folders by role: ``router``, ``multitask``, or a method's own name for its trained gates."""
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    few_shot: Callable[[str, int], Sequence[Item]] | None = None
    """``few_shot(task, num)``: the first ``num`` training items of a task, for methods that need a few examples or inputs of each
    task; None where no suite is known. Never test items."""

    def examples(self, task: str, num: int, method: str) -> Sequence[Item]:
        """Training items of one task.

        Args:
            task: Name of the task, which is the name of its expert.
            num: How many.
            method: Name of the method, for the error.

        Raises:
            MethodError: If no suite is known, or it has no training items for the task.
        """
        items = () if self.few_shot is None else self.few_shot(task, num)
        if not items:
            reason = f"the suite has no training items for '{task}'. Use a suite with a train split."
            if self.few_shot is None:
                reason = "no suite was given. Pass --suite or --data-root (few_shot in Python)."
            raise MethodError(f"method '{method}' needs {num} training examples per task, but {reason}")
        return items

    def artifact(self, role: str, method: str) -> Path:
        """The folder of one artifact.

        Raises:
            MethodError: If it was not supplied or does not exist.
        """
        path = self.artifacts.get(role)
        if path is None:
            raise MethodError(f"method '{method}' needs a {role}; none was given. Pass {role}=FOLDER (command line: --{role} FOLDER).")
        if not Path(path).is_dir():
            raise MethodError(f"method '{method}': {role} folder not found: {path}.")
        return Path(path)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoConfig:
    """The configuration of a method without settings."""


@dataclass(frozen=True, kw_only=True)
class _Description:
    """The content of ``method.json``."""

    method: str
    params: dict[str, Any]
    experts: list[str]
    pool_sha256: str | None = None


class FusionMethod(nn.Module):
    """Base class of every method. A method author overrides ``route`` (or ``attach``) and, where needed, the rest.

    Life cycle: ``Method(config)`` -> ``prepare(bank, context)`` -> ``attach(model)`` -> ``route(prompts)`` per request.
    A loaded method is prepared a second time by the fused model, so ``prepare`` must keep parameters it already has.
    """

    name: ClassVar[str]
    metadata: ClassVar[Metadata]
    Config: ClassVar[type] = NoConfig
    evaluation_params: ClassVar[tuple[str, ...]] = ()
    """Parameters that may differ between training and evaluation, a temperature for instance."""
    stand_in_params: ClassVar[Mapping[str, Any]] = {}
    """Parameters under which conformance checks and counts of operations run, where the preset's own need a package or much time: an
    encoder that needs nothing, for instance. What is checked, the routing, is the same."""

    unread_files: tuple[str, ...] = (SCOPE_FILE,)
    """Names of files in artifact folders that this configuration does not read, so that they are not part of a run's identity."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config = self.Config() if config is None else config
        self.expert_names: tuple[str, ...] = ()
        self.pool_checksum: str | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> FusionMethod:
        """A method computes in float32, whatever the fused model is cast to."""
        return super()._apply(keeping_dtype(fn), recurse)

    @property
    def granularity(self) -> Granularity:
        """Granularity of this instance; overridden if it depends on the configuration."""
        return self.metadata.granularity

    @property
    def view(self) -> str:
        """What a sentence-level method reads at a sentence end: ``tail``, ``window``, ``whole`` or ``segment``."""
        return "tail"

    @property
    def prompt_routing(self) -> str:
        """How a sentence-level method routes the prompt itself: ``whole``, ``question`` or ``sentence`` (``inference.prompt_routing``)."""
        return "whole"

    @property
    def kv_policy(self) -> str:
        """Cached keys and values after a re-route: ``stale``, ``recompute`` or ``prompt_frozen`` (``inference.kv_policy``)."""
        return "stale"

    @property
    def weight_sum(self) -> WeightSum:
        """Documented sum of a row of routing weights; overridden if it depends on the configuration."""
        return self.metadata.weight_sum

    @property
    def max_kept(self) -> int | None:
        """The most experts ``route`` may keep for a row, for which buffers have room; None if not known, and then all."""
        return None

    @property
    def artifact_roles(self) -> tuple[str, ...]:
        """Roles of the folders that this instance reads; a record names the hashes of these only."""
        return ("trained",) if "trained" in self.metadata.needs else ()

    @property
    def optional_packages(self) -> Mapping[str, str]:
        """Packages this instance needs beyond the installation, by import name, with how to install or avoid each; checked before a run."""
        return {}

    def require_packages(self) -> None:
        """Check that the optional packages are installed, without importing them.

        Raises:
            UnavailableMethodError: If one is missing; the message says how to install or avoid it.
        """
        for package, how in self.optional_packages.items():
            if importlib.util.find_spec(package) is None:
                raise UnavailableMethodError(f"method '{self.name}' needs the package {package}, which is not installed: {how}.")

    @property
    def reported(self) -> Mapping[str, float | int | None]:
        """Numbers of an evaluation that a record keeps beside its routing statistics, for instance the budget of a search."""
        return {}

    @property
    def num_trained_parameters(self) -> int:
        """Parameters that are trained for this method beyond the experts of the pool."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        """Bind to a pool's bank and return the bank to run, which for static methods may be a merged one.

        ``expert_names`` are the names of the pool, in its order; ``route`` uses the order of the returned bank.
        """
        self.expert_names = tuple(bank.names)
        if "trained" in self.metadata.needs:
            self.pool_checksum = bank.checksum()
        return bank

    def merge(self, bank: AdapterBank, weights: Tensor) -> AdapterBank:
        """Static methods that combine more than deltas: the bank of one expert that replaces ``weights`` (E,).

        Such a method calls it from ``prepare``; the conformance suite calls it with other weights.

        Raises:
            MethodError: If the method routes at run time and merges nothing.
        """
        raise MethodError(f"method '{self.name}' merges nothing; its weights are applied at run time.")

    @classmethod
    def example_artifacts(cls, folder: Path, bank: AdapterBank, context: MethodContext) -> dict[str, Path]:
        """Write untrained stand-ins for the artifacts the method needs and return their folders by role.

        For the conformance suite and for timing, which do not depend on training. Default: nothing is needed.
        """
        return {}

    def fit(self, context: MethodContext) -> None:
        """Gradient-free search, before evaluation. Default: nothing to do."""

    def step_statistics(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Statistics of the whole optimiser step for a loss that is not a mean over rows or tokens; None otherwise.

        Called without gradients, and only if a step has several parts (accumulated batches, processes). ``loss`` finds the average over the
        parts under ``step_statistics``.
        """
        return None

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Scalar training loss of one batch; the LightningModule does the rest.

        Args:
            batch: ``prompts`` (``PromptBatch`` with the task names of the training rows), ``expert_idx`` (B,) the index of each row's own
                expert; ``input_ids``, ``attention_mask``, ``labels`` (B, T), -100 where there is no target; ``answer_loss(weights)``, the
                mean cross-entropy of the answers under routing weights, or under the gates if None; ``model``, the fused model;
                ``row_share`` and ``token_share``, by which a mean over the batch's rows or real tokens must be multiplied
                (``answer_loss`` includes it), absent or 1 if the batch is the whole optimiser step; ``step_statistics`` if it is
                not and the method has them. A method reads what it needs.

        Raises:
            MethodError: If the method is not trained by gradients.
        """
        raise MethodError(f"method '{self.name}' has no trained parameters; there is nothing to fit.")

    def route(self, prompts: PromptBatch) -> Tensor | None:
        """Routing weights (B, E), float32, from the context only; None if gates inside the layers decide."""
        return None

    def route_with_confidence(self, prompts: PromptBatch) -> tuple[Tensor | None, Tensor | None]:
        """What ``route`` returns, and the largest probability of each prompt's experts (B,), float32.

        The confidence is None for methods that have no probabilities, as by default. Methods with probabilities compute both in one pass.
        """
        return self.route(prompts), None

    @property
    def scope(self) -> ScopeThreshold | None:
        """Threshold below which a prompt is out of scope, if one was chosen on validation prompts."""
        return None

    def scope_scores(self, prompts: PromptBatch) -> Mapping[str, Tensor]:
        """Scores (B,), float, by name; larger values mean that a prompt is more similar to those of the experts' tasks. Default: none."""
        return {}

    def attach(self, model: FusedModel) -> None:
        """Install token-level gates on the fused layers. Default: nothing to install."""

    def saved_state(self) -> Mapping[str, Tensor]:
        """Tensors that ``save`` writes; a method that stores a part in separate files leaves that part out."""
        return self.state_dict()

    def save(self, folder: str | Path) -> None:
        """Write atomically what ``load`` reads; see ``write_files``.

        Raises:
            MethodError: If a trained tensor is NaN or infinite: the training diverged, and nothing is written.
        """
        with filling(folder, "method.json") as temporary:
            self.write_files(temporary)
            if not (temporary / WEIGHTS_NAME).exists():
                (Path(folder) / WEIGHTS_NAME).unlink(missing_ok=True)  # of an earlier save; it would be loaded

    def write_files(self, folder: Path) -> None:
        """Write ``method.json`` and, if anything is trained, ``method.safetensors`` into an empty folder."""
        state = {key: value.detach().contiguous().cpu() for key, value in self.saved_state().items()}
        _require_usable(state, state, f"method '{self.name}'", "the training diverged. Lower the learning rate.")
        if state:
            write_tensors(folder / WEIGHTS_NAME, state)
        description = {
            "method": self.name, "params": asdict(self.config), "experts": list(self.expert_names), "pool_sha256": self.pool_checksum,
        }  # fmt: skip
        (folder / "method.json").write_text(json.dumps(description, indent=2) + "\n")

    @classmethod
    def saved_config(cls, folder: str | Path, bank: AdapterBank) -> Any:
        """The configuration that ``save`` wrote, after checking that the folder belongs to this method and this pool.

        Raises:
            MethodError: If the folder is missing, or belongs to another method or to another pool.
        """
        from dlplora.documents import read_json

        file = Path(folder) / "method.json"
        if not file.is_file():
            raise MethodError(f"no saved method in {folder}: method.json is missing. Point to a folder written by save().")
        description = build(_Description, read_json(file, error=MethodError), str(file), error=MethodError)
        if description.method != cls.name:
            raise MethodError(f"{folder} holds method '{description.method}', expected '{cls.name}'.")
        if tuple(description.experts) != tuple(bank.names):
            raise MethodError(
                f"{folder} was made for experts {description.experts}, the bank has {list(bank.names)}. Retrain it for this pool."
            )
        made_for = description.pool_sha256
        if made_for is not None and made_for != bank.checksum():
            raise MethodError(
                f"{folder} was made for a pool with checksum {made_for[:12]}, this pool has {bank.checksum()[:12]}: the same names, other "
                "adapters. Retrain it for this pool."
            )
        return build(cls.Config, cls.upgrade_params(description.params, {}), str(file), error=MethodError)

    @classmethod
    def upgrade_params(cls, params: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters under their present names; a method that renamed one still reads the old name.

        Args:
            params: From a file or a command line.
            base: The parameters they override.
        """
        return dict(params)

    @classmethod
    def hashed_params(cls, config: Any) -> dict[str, Any]:
        """Parameters as hashes cover them; a method that renamed one keeps the old name here."""
        return cls.recorded_params(config)

    @classmethod
    def recorded_params(cls, config: Any) -> dict[str, Any]:
        """All parameters, those marked ``OMIT_DEFAULT_FROM_HASH`` only where they differ from their default."""
        later = {one.name: one.default for one in fields(config) if one.metadata == OMIT_DEFAULT_FROM_HASH}
        return {name: value for name, value in asdict(config).items() if name not in later or value != later[name]}

    @classmethod
    def load(cls, folder: str | Path, bank: AdapterBank, context: MethodContext) -> FusionMethod:
        """Rebuild what ``save`` wrote, bound to ``bank``.

        Raises:
            MethodError: As ``saved_config``; and if the trained tensors are missing or damaged, have other names or shapes, or are not
            finite.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        method = cls(cls.saved_config(folder, bank))
        method.prepare(bank, context)
        expected, weights = method.saved_state(), Path(folder) / WEIGHTS_NAME
        if not weights.is_file():
            if expected:
                raise MethodError(f"{folder} has no {WEIGHTS_NAME}, the trained tensors of '{cls.name}'. Restore it or train again.")
            return method
        try:
            tensors = load_file(weights)
            method.load_state_dict(tensors)
        except (SafetensorError, RuntimeError) as error:
            first = " ".join(str(error).split())[:200]
            raise MethodError(f"{weights} is damaged or belongs to another method: {first}. Restore it or train again.") from error
        _require_usable(tensors, method.saved_state(), str(weights), "restore the file or train again.")
        return method


def _require_usable(stored: Mapping[str, Tensor], loaded: Mapping[str, Tensor], where: str, advice: str) -> None:
    reason = unusable(stored, loaded)
    if reason is not None:
        raise MethodError(f"{where}: {reason}; {advice}")
