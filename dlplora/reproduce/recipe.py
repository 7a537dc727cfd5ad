"""What artifacts are trained for: a base model, a suite of tasks, and the options that adapt the training recipes to both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlplora.adapters.files import file_sha256
from dlplora.config import config_hash
from dlplora.errors import ConfigError
from dlplora.inference.loading import nano_asset
from dlplora.tasks.registry import get_suite
from dlplora.tasks.types import Suite

ROUTERS = ("router", "router_paper5m")
TRAINED = "trained/"
"""Prefix of the roles of trained methods."""
BACKBONE_OPTIONS = {"pool": "backbone", **dict.fromkeys(ROUTERS, "backbone"), "trained": "pretrained"}
"""Kind of role -> the training module's name for its base model; adapters on all tasks have the pool's."""


def kind_of(role: str) -> str:
    """The role without the method it belongs to."""
    return "trained" if role.startswith(TRAINED) else role


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One base model and one suite; the default is the embedded nano base model, whose artifacts are shipped."""

    backbone: str | None = None
    """Folder of the base model; None is the embedded one."""
    base_model_name: str | None = None
    """What adapters name as their base."""
    suite: str = "nano"
    data_root: str | None = None
    tasks: tuple[str, ...] | None = None
    """Some tasks of the suite; None takes all."""
    configs: Mapping[str, str] = field(default_factory=dict)
    """Kind of role -> training configuration, where it is not the nano suite's."""
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Role or its kind (``all`` for every one) -> further options of ``dlplora fit``."""
    processes: int | None = None
    """Processes that the experts of a pool are dealt out to; None takes the number of cores, at most four."""

    @property
    def shipped(self) -> bool:
        """Whether the package may hold artifacts of this setting."""
        return self.backbone is None and self.suite == "nano" and not self.options

    def chosen(self) -> Suite:
        """The tasks that are trained on."""
        return get_suite(self.suite, self.data_root).select(self.tasks)

    def extra(self, role: str) -> list[str]:
        """The further options of a role: those of ``all`` first, then those of its kind, its own last."""
        return [option for key in dict.fromkeys(("all", kind_of(role), role)) for option in self.options.get(key, ())]

    def arguments(self, role: str) -> list[str]:
        """Options of ``dlplora fit`` that make a recipe train over this base model and these tasks."""
        kind = kind_of(role)
        if self.shipped:
            return self.extra(role)
        told = ["--data.init_args.suite=" + self.suite]
        if self.data_root is not None:
            told.append(f"--data.init_args.data_root={self.data_root}")
        if self.tasks is not None:
            named = ",".join(self.tasks)
            told.append(f"--data.init_args.tasks={f'[{named}]' if kind == 'backbone' else named}")
        if kind != "backbone" and self.backbone is not None:
            told.append(f"--model.init_args.{BACKBONE_OPTIONS.get(kind, 'backbone')}={self.backbone}")
        if kind not in {"backbone", "trained", *ROUTERS} and self.base_model_name is not None:
            told.append(f"--model.init_args.base_model_name={self.base_model_name}")
        return [*told, *self.extra(role)]

    def facts(self, role: str) -> dict[str, Any]:
        """What an artifact is a function of, besides its configuration: the base model's weights and the tasks' rows."""
        described: dict[str, Any] = {}
        if role != "backbone":
            described["backbone_sha256"] = self.backbone_sha256()
        described["tasks"] = {
            task.name: task.facts["sha256"]
            if task.facts
            else config_hash([task.version, task.phrasings, [[item.prompt, item.answer] for item in task.items("train", 20)]])
            for task in self.chosen().tasks
        }
        if not self.shipped:
            described["options"] = self.extra(role)
        return described

    def backbone_sha256(self) -> str:
        """Checksum of the base model's weights.

        Raises:
            ConfigError: If the folder holds none.
        """
        folder = nano_asset("backbone") if self.backbone is None else Path(self.backbone)
        files = sorted(folder.glob("*.safetensors"))
        if not files and self.backbone is None:
            raise ConfigError(f"the embedded base model is missing ({folder / 'model.safetensors'}); this installation is incomplete.")
        if not files:
            raise ConfigError(f"base model folder {folder} holds no safetensors file.")
        sums = [file_sha256(path) for path in files]
        return sums[0] if len(sums) == 1 else config_hash(sums)


NANO = Setting()
