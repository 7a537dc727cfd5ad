"""Parts of a conformance check: one method on one tiny model, forced routing weights, and strict comparisons.

Shapes: B rows, T tokens, E experts, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from dlplora.methods.base import FusionMethod, Metadata, MethodContext
from dlplora.tasks.types import Item
from dlplora.types import PromptBatch

if TYPE_CHECKING:
    from dlplora.inference.fused_model import FusedCausalLM
    from dlplora.modules.lora_bank import AdapterBank

PROMPTS = (
    "Mia sees the red box. Leo sees the tree. What sees Mia?",
    "the cat",
    "yes or no: is the plum blue?",
    "Ann likes a dog and Tom likes a pear. Who likes the pear? Answer:",
)


def _training_items(task: str, num: int) -> list[Item]:
    """Training items of a task for methods that need some: words that depend on the task's name, the same each time."""
    words = " ".join(PROMPTS).split()
    start = sum(map(ord, task))
    return [Item(task, f"{words[(start + i) % len(words)]} {words[(2 * start + 3 * i) % len(words)]} ?", words[i % 5]) for i in range(num)]


class ConformanceError(AssertionError):
    """A method fails a check of the list."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method on one tiny model.

    Args:
        build: Makes the method, unbound; called again for every model.
        make_model: Makes a fresh copy of one and the same float32 causal LM, in evaluation mode.
        tokenizer: Its tokenizer.
        pool: Folder of PEFT adapter folders; their names are the experts, sorted.
        workdir: An empty folder to write into.
        artifacts: Folders by role. What the method itself can make (``example_artifacts``) need not be given.
    """

    build: Callable[[], FusionMethod]
    make_model: Callable[[], Any]
    tokenizer: Any
    pool: Path
    workdir: Path
    artifacts: Mapping[str, Path] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Experts of the pool."""
        return tuple(sorted(path.name for path in self.pool.iterdir() if path.is_dir()))

    def context(self, model: Any) -> MethodContext:
        """The context of a method bound to ``model``, with replacements for missing artifacts written, the same each time."""
        bare = MethodContext(
            tokenizer=self.tokenizer, embedding=model.get_input_embeddings(), artifacts=dict(self.artifacts), few_shot=_training_items
        )
        made = type(self.build()).example_artifacts(self.workdir / "artifacts", self.bank(), bare)
        return dataclasses.replace(bare, artifacts={**made, **self.artifacts})

    def bank(self, pool: Path | None = None) -> AdapterBank:
        """The adapters of a pool folder, names sorted."""
        from dlplora.modules.lora_bank import AdapterBank

        folder = self.pool if pool is None else pool
        return AdapterBank.from_peft({name: folder / name for name in self.names})

    @contextlib.contextmanager
    def fused(
        self, *, bank: AdapterBank | None = None, method: FusionMethod | None = None, artifacts: Mapping[str, Path] | None = None
    ) -> Iterator[FusedCausalLM]:
        """A fused model on a fresh base model, closed afterwards."""
        from dlplora.inference.fused_model import FusedCausalLM

        model = self.make_model()
        context = self.context(model)
        if artifacts:
            context = dataclasses.replace(context, artifacts={**context.artifacts, **artifacts})
        fused = FusedCausalLM(model, self.tokenizer, bank or self.bank(), method or self.build(), context=context)
        fused.eval()
        try:
            yield fused
        finally:
            fused.close()

    def prompts(self, rows: Sequence[int] = range(len(PROMPTS)), *, left: int = 0, right: int = 0) -> PromptBatch:
        """Test prompts, right-padded, with ``left``/``right`` more padding columns, task names given in turn."""
        names = [self.names[row % len(self.names)] for row in rows]
        plain = PromptBatch.from_texts([PROMPTS[row] for row in rows], self.tokenizer, task_names=names)
        pad = int(self.tokenizer.pad_token_id)
        ids = nn.functional.pad(plain.input_ids, (left, right), value=pad)
        return PromptBatch(ids, nn.functional.pad(plain.attention_mask, (left, right)), plain.texts, plain.task_names)

    def expert_folder(self, name: str, fused: FusedCausalLM) -> Path:
        """The PEFT folder of an expert of the bank that runs."""
        folder = self.pool / name
        if not folder.is_dir():
            folder = self.context(fused.model).artifacts[name]
        return Path(folder)


class _Fixed(FusionMethod):
    """Runs a bank of one merged expert; replaces a static method, with weights chosen by a check."""

    metadata = Metadata(title="Merged by a check", granularity="none")

    def __init__(self, name: str) -> None:
        super().__init__()
        self.__dict__["name"] = name

    def route(self, prompts: PromptBatch) -> Tensor:
        return torch.ones(len(prompts), 1)


class _ConstantGate(nn.Module):
    """A gate that answers the same weights for every token."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return self.weights.to(x.device).expand(*x.shape[:2], -1)


def fail(message: str) -> NoReturn:
    """Raise ``ConformanceError``."""
    raise ConformanceError(message)


def require_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Largest difference within ``tolerance`` times the largest expected value (at least one)."""
    if actual.shape != expected.shape:
        fail(f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    bound = tolerance * max(1.0, float(expected.detach().abs().max()))
    difference = float((actual.detach().double() - expected.detach().double()).abs().max())
    if not difference <= bound:
        fail(f"{what}: differs by {difference:.3g}, allowed {bound:.3g}")


def require_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal to the last bit."""
    if not torch.equal(actual, expected):
        fail(f"{what}: not equal bit for bit")


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position ids that ignore padding on the left."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def logits_of(model: Any, prompts: PromptBatch) -> Tensor:
    """Logits (B, T, V) of one teacher-forced pass; positions count real tokens."""
    mask = prompts.attention_mask
    return model(input_ids=prompts.input_ids, attention_mask=mask, position_ids=positions_of(mask)).logits


def own_routing(fused: FusedCausalLM, prompts: PromptBatch) -> contextlib.AbstractContextManager[Any]:
    """Bind what the method itself decides for the prompts; nothing if gates decide inside."""
    state = fused.route(prompts)
    return contextlib.nullcontext() if state is None else fused.routing(state)


def weights_of(fused: FusedCausalLM, prompts: PromptBatch) -> Tensor | None:
    """The method's own routing weights, mean over layers where these differ; None if gates decide."""
    state = fused.route(prompts)
    return None if state is None else fused.request_router.per_expert(state.weights)


def routed_logits(fused: FusedCausalLM, prompts: PromptBatch) -> Tensor:
    """Logits (B, T, V) under the method's own routing."""
    with own_routing(fused, prompts):
        return logits_of(fused, prompts)


def fused_linears(fused: FusedCausalLM) -> list[Any]:
    """The patched layers, in order of the model."""
    from dlplora.modules.fused_linear import FusedLinear

    return [module for module in fused.model.modules() if isinstance(module, FusedLinear)]


def merges(method: FusionMethod) -> bool:
    """Whether the method combines experts ahead of time by rules of its own."""
    return type(method).merge is not FusionMethod.merge


@contextlib.contextmanager
def forced(case: Case, weights: Tensor, *, bank: AdapterBank | None = None) -> Iterator[FusedCausalLM]:
    """The method's model under routing weights (E,) of the check's choice: bound, put into its gates, or merged by it."""
    method = case.build()
    if merges(method):
        merged = method.merge(case.bank() if bank is None else bank, weights)
        with case.fused(bank=merged, method=_Fixed(method.name)) as fused, fused.routing(torch.ones(merged.num_experts)):
            yield fused
        return
    with case.fused(bank=bank, method=method) as fused:
        gated = [layer for layer in fused_linears(fused) if layer.gate is not None]
        kept = [layer.gate for layer in gated]
        for layer in gated:
            layer.gate = _ConstantGate(weights)
        with contextlib.nullcontext() if gated else fused.routing(weights):
            yield fused
        for layer, gate in zip(gated, kept, strict=True):
            layer.gate = gate


def forced_names(case: Case) -> tuple[str, ...]:
    """Experts that weights given to ``forced`` refer to."""
    if merges(case.build()):
        return case.names
    with case.fused() as fused:
        return tuple(fused.bank.names)


def single_adapter_logits(case: Case, folder: Path, prompts: PromptBatch) -> Tensor:
    """PEFT's own answer with one adapter."""
    from peft import PeftModel

    return logits_of(PeftModel.from_pretrained(case.make_model(), str(folder), autocast_adapter_dtype=False).eval(), prompts)


def folder_of(case: Case, name: str) -> Path:
    """The PEFT folder of an expert of the case."""
    with case.fused() as fused:
        return case.expert_folder(name, fused)
