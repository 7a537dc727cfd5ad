"""Train many adapters over one frozen base model in one process, and write them as a pool of PEFT folders.

``sequential`` trains one expert after another, ``joint`` several in one batch. In both modes every expert has the rows, initial weights,
clipping and schedule that it would have alone, so (without dropout) the results differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from dlplora.documents import read_json
from dlplora.errors import ConfigError, PoolError
from dlplora.training.adapter_export import save_adapter
from dlplora.training.adapter_module import AdapterModule
from dlplora.training.answer_loss import answer_logits, has_plain_head
from dlplora.training.frozen import load_frozen
from dlplora.training.grouped_lora import ExpertGroup, GroupedLoRA
from dlplora.training.recomputation import recompute_activations
from dlplora.training.settings import LoRASettings, OptimizerSettings

Mode = Literal["joint", "sequential", "auto"]


def plan_groups(mean_lengths: Mapping[str, float], mode: Mode, group_size: int, device_type: str) -> tuple[tuple[str, ...], ...]:
    """Which experts share a batch.

    ``joint`` groups experts with sequences of similar length, which keeps padding small. ``auto`` is ``sequential`` on a CPU,
    where the arithmetic of the base model decides the speed, and ``joint`` elsewhere, where the number of kernel launches does.

    Args:
        mean_lengths: Expert name -> mean length of its training sequences in tokens, in the order of the pool.
        mode: As above.
        group_size: Most experts in a joint batch.
        device_type: Of the device trained on.
    """
    if mode == "sequential" or (mode == "auto" and device_type == "cpu"):
        return tuple((name,) for name in mean_lengths)
    ordered = sorted(mean_lengths, key=lambda name: mean_lengths[name])
    return tuple(tuple(ordered[start : start + group_size]) for start in range(0, len(ordered), group_size))


class LitExpertPool(AdapterModule):
    """One LoRA adapter per task of an ``ExpertPoolDataModule``.

    The trainer's ``gradient_clip_val`` bounds the gradient norm of every expert by itself, and the schedule spans every
    expert's own steps. With ``accumulate_grad_batches`` an expert takes ``num_steps`` divided by it steps.

    Args:
        base model, lora, optimizer, seed, export_dtype, base_model_name, dtype, gradient_checkpointing: As for ``LitExpert``.
        mode: ``joint``, ``sequential``, or ``auto`` (by device).
        group_size: Most experts in a joint batch.
        export_folder: The pool's folder: one PEFT folder per expert, the manifest ``pool.json``, and ``training.json``.
            Training a part of a suite's tasks adds to, or replaces in, a pool that is already there.
    """

    multi_process_strategy = "ddp_find_unused_parameters_true"
    """What ``lightning run`` takes for several devices: one group of experts trains at a time, the others are unused in a step."""

    def __init__(
        self,
        backbone: str | None = None,
        lora: LoRASettings = LoRASettings(),  # noqa: B008 (frozen)
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008 (frozen)
        seed: int | None = None,
        mode: Mode = "auto",
        group_size: int = 5,
        export_folder: str | None = None,
        export_dtype: str = "float32",
        base_model_name: str | None = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(backbone, lora, optimizer, seed, export_folder, export_dtype, base_model_name, dtype, gradient_checkpointing)
        if lora.bias != "none":
            raise ConfigError(f"lora: a pool needs bias 'none', got {lora.bias!r}: biases of several adapters cannot be fused.")
        if group_size < 1:
            raise ConfigError(f"model: 'group_size' must be at least 1, got {group_size}.")
        self.mode: Mode = mode
        self.group_size = group_size
        self.groups: tuple[tuple[str, ...], ...] = ()
        self.model: Any = None
        self.patch: GroupedLoRA | None = None
        self.fingerprint: dict[str, Any] = {}
        self.experts = nn.ModuleList()

    def setup(self, stage: str) -> None:
        """Decide which experts train together."""
        super().setup(stage)
        if self.groups:
            return
        lengths = {name: sum(one.lengths) / len(one) for name, one in self.datamodule.encoded("train").items()}
        device = self.trainer.strategy.root_device.type
        self.groups = plan_groups(lengths, self.mode, self.group_size, device)

    def configure_model(self) -> None:
        """Load the base model, freeze it, put the grouped layers in, and draw every expert's initial weights."""
        if self.model is not None:
            return
        from dlplora.adapters.fingerprint import base_fingerprint

        self.model = load_frozen(self.backbone, self.backbone_dtype)
        self.fingerprint = base_fingerprint(self.model)  # before the layers are wrapped
        self.plain_head = has_plain_head(self.model)
        patch = self.patch = GroupedLoRA(self.model, self.lora)
        if self.gradient_checkpointing:  # a layer runs again after `use` has ended, and needs the factors it ran with
            self._recomputed = recompute_activations(self.model, lambda: patch.use(patch.active.factors))
        self.experts.extend(ExpertGroup(names, patch.shapes, self.lora, self.seed) for names in self.groups)

    def on_fit_start(self) -> None:
        """Refuse trainer settings under which the experts would not be trained as if alone.

        Raises:
            ConfigError: For gradients accumulated across two groups, more than one epoch, or DDP that cannot skip the inactive experts.
        """
        trainer = self.trainer
        steps = int(self.datamodule.hparams["num_steps"])
        if steps % trainer.accumulate_grad_batches:
            raise ConfigError(
                f"trainer: num_steps of a pool {steps} must be a multiple of accumulate_grad_batches ({trainer.accumulate_grad_batches}): "
                "a step must not mix two groups of experts. Change one of them."
            )
        if trainer.max_epochs != 1 and trainer.max_steps == -1:
            raise ConfigError(
                f"trainer: a pool trains in one epoch (num_steps for every group), max_epochs is {trainer.max_epochs}. Set max_epochs: 1."
            )
        options = getattr(trainer.strategy, "_ddp_kwargs", None)
        if options is not None and len(self.groups) > 1 and not options.get("find_unused_parameters"):
            raise ConfigError(
                f"a pool trains one group of experts at a time; with several processes use --strategy {self.multi_process_strategy}."
            )

    def configure_optimizers(self) -> Any:
        """One AdamW; experts outside the active group have no gradient, so neither their weights nor their moments move."""
        steps = int(self.datamodule.hparams["num_steps"]) // self.trainer.accumulate_grad_batches
        return self.optimizer_settings.build(self.experts.parameters(), steps, period=steps)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip every expert's gradient by itself."""
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm not in (None, "norm"):
            raise ConfigError(f"trainer: a pool clips by norm, gradient_clip_algorithm is '{gradient_clip_algorithm}'.")
        for group in self.experts:
            if group.lora_a[0].grad is not None:  # type: ignore[union-attr, index]
                group.clip_gradients(float(gradient_clip_val))  # type: ignore[operator]

    def _forward(self, batch: Mapping[str, Any], factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        assert self.patch is not None
        with self.patch.use(factors):
            return answer_logits(self.model, batch, self.plain_head)

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (S, V) of a batch that holds rows of every expert of one group."""
        return self._forward(batch, self._group(batch["group"]).factors())

    def evaluation_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (S, V) of rows of one task under that task's expert."""
        name = batch["task"]
        index = next(i for i, names in enumerate(self.groups) if name in names)
        return self._forward(batch, self._group(index).factors(name))

    def _group(self, index: int) -> ExpertGroup:
        group = self.experts[index]
        assert isinstance(group, ExpertGroup)
        return group

    def logged_loss(self, loss: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Mean over the experts of the group; the training loss is their sum."""
        return loss / len(self.groups[batch["group"]])

    def export(self) -> list[Path]:
        """Write every expert as a PEFT folder, then the manifest of the pool."""
        from dlplora.adapters.pool import write_manifest

        assert self.export_folder is not None
        assert self.patch is not None
        root = Path(self.export_folder)
        names = self._manifest_names(root)
        folders: list[Path] = []
        for index, group_names in enumerate(self.groups):
            for name in group_names:
                config = self.lora.peft_config(self.base_model_name)
                folders.append(save_adapter(root / name, config, self.patch.peft_tensors(self._group(index), name), self.export_dtype))
        described = {task.name: task.description for task in self.datamodule.suite.tasks}
        write_manifest(root, names, self.fingerprint, descriptions=described)
        self.describe_run(root)
        return folders

    def _manifest_names(self, root: Path) -> list[str]:
        """Experts of the pool after this run: exactly the suite's if all were trained, otherwise those already there too."""
        trained = list(self.datamodule.task_names)
        manifest = root / "pool.json"
        if self.datamodule.is_whole_suite or not manifest.is_file():
            return trained
        known = read_json(manifest, error=PoolError)
        if known["base_model"] != self.fingerprint:
            raise PoolError(f"the pool in {root} was trained on another base model; export these experts to another folder.")
        names = [adapter["name"] for adapter in known["adapters"]]
        return names + [name for name in trained if name not in names]
