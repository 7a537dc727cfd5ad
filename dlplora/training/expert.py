"""Train one adapter, with Lightning around an ordinary PEFT model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlplora.errors import ConfigError
from dlplora.training.adapter_export import save_adapter
from dlplora.training.adapter_module import AdapterModule
from dlplora.training.answer_loss import answer_logits, has_plain_head
from dlplora.training.checkpoints import planned_steps
from dlplora.training.frozen import load_frozen
from dlplora.training.recomputation import recompute_activations
from dlplora.training.settings import LoRASettings, OptimizerSettings, expert_generator, initial_lora_a


class LitExpert(AdapterModule):
    """One LoRA adapter on the task or tasks of the data module; with all tasks it is the multi-task adapter.

    Args:
        backbone: Folder or hub id of the frozen causal LM; None is the embedded nano base model.
        lora: Shape of the adapter.
        optimizer: AdamW and its schedule, which spans the whole run.
        seed: Of the initial weights and of dropout. None: the seed of the run (``seed_everything``), 0 outside the command line.
        adapter_name: Name of the adapter and of its seed. None: the task's name, or ``multitask`` for several tasks.
        export_folder: The adapter's PEFT folder, written when training ends; None writes nothing.
        export_dtype: Stored precision of the adapter.
        base_model_name: What the exported adapter names as its base; None takes the name or path of ``backbone``.
        dtype: Precision of the frozen base model. The adapter itself always trains in float32.
        gradient_checkpointing: Recompute the decoder layers in the backward pass: less memory, more time, the same gradients.
    """

    def __init__(
        self,
        backbone: str | None = None,
        lora: LoRASettings = LoRASettings(),  # noqa: B008 (frozen)
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008 (frozen)
        seed: int | None = None,
        adapter_name: str | None = None,
        export_folder: str | None = None,
        export_dtype: str = "float32",
        base_model_name: str | None = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(backbone, lora, optimizer, seed, export_folder, export_dtype, base_model_name, dtype, gradient_checkpointing)
        self.adapter_name = adapter_name
        self.model: Any = None

    def configure_model(self) -> None:
        """Load the base model, freeze it, and add the adapter with its seeded initial weights."""
        if self.model is not None:
            return
        from peft import get_peft_model
        from peft.tuners.tuners_utils import NoMatchingPeftModuleError

        backbone = load_frozen(self.backbone, self.backbone_dtype)
        self.plain_head = has_plain_head(backbone)
        try:
            self.model = get_peft_model(backbone, self.lora.peft_config())
        except NoMatchingPeftModuleError as error:
            raise ConfigError(f"lora: {error}") from error
        if self.gradient_checkpointing:
            self._recomputed = recompute_activations(backbone)
        names = self.datamodule.task_names
        name = self.adapter_name or (names[0] if len(names) == 1 else "multitask")
        generator = expert_generator(self.seed, name)
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if ".lora_A." in key:
                    parameter.copy_(initial_lora_a((parameter.shape[0], parameter.shape[1]), generator))

    def configure_optimizers(self) -> Any:
        """AdamW on the adapter."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return self.optimizer_settings.build(parameters, planned_steps(self.trainer))

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (S, V) at the supervised positions."""
        return answer_logits(self.model, batch, self.plain_head)

    def evaluation_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """The same; there is only one adapter."""
        return self.logits(batch)

    def export(self) -> list[Path]:
        """Write the adapter as a PEFT folder that ``PeftModel.from_pretrained`` loads, plus ``training.json``."""
        from peft import get_peft_model_state_dict

        assert self.export_folder is not None
        config = self.lora.peft_config(self.base_model_name)
        folder = save_adapter(self.export_folder, config, get_peft_model_state_dict(self.model), self.export_dtype)
        self.describe_run(folder)
        return [folder]
