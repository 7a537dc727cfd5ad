"""One profile of a plan: what it evaluates, what it trains for it, and what its numbers depend on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dlplora.config import config_hash, load_yaml
from dlplora.errors import ConfigError
from dlplora.evaluation.protocol import Protocol
from dlplora.methods.registry import hashed_params, load_method_spec
from dlplora.reproduce import artifacts, paper, pipeline
from dlplora.reproduce.recipe import Setting


@dataclass(frozen=True)
class Subject:
    """One profile of a plan, resolved as far as is possible before anything is trained."""

    name: str
    protocol: Protocol
    protocol_name: str
    setting: Setting
    """Tasks and options; of a profile with a base model of its own without it yet, see ``over_backbone``."""
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: Path
    """Folder of the artifacts."""
    job: paper.PaperJob | None
    """None for the nano suite."""
    limit: int | None

    @property
    def trains_backbone(self) -> bool:
        """Whether a base model must be made first."""
        artifact = None if self.job is None else self.job.backbone_artifact()
        return artifact is not None and not artifact.ready

    def over_backbone(self) -> tuple[Protocol, Setting]:
        """Protocol and setting with the base model, which must be there or on a hub.

        Raises:
            ConfigError: If it is not.
        """
        if self.job is None:
            return self.protocol, self.setting
        artifact = self.job.backbone_artifact()
        if artifact is not None and not artifact.ready:
            raise ConfigError(f"the base model is not in {artifact.folder}; was it removed? Plan again.")
        return self.job.over(*paper.backbone_folder(self.job))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What decides the numbers of all cells: base model, protocol, tasks, rows where they are at hand, options."""
        given = None if self.job is None else dataclasses.asdict(self.job.profile)
        at_hand = self.job is None or paper.has_rows(self.protocol)
        return {
            "profile": given,
            "protocol": self.protocol.hash(),
            "rows": self.setting.facts("backbone")["tasks"] if at_hand else self.protocol.suite,
        }

    @property
    def roles(self) -> list[str]:
        """Artifacts of all methods."""
        return pipeline.roles_of(self.methods)

    def hash(self) -> str:
        """Changes whenever a number of the profile may."""
        configs = {role: load_yaml(artifacts.config_path(role, self.setting)) for role in self.roles}
        specs = {method: method_facts(method) for method in self.methods}
        return config_hash([self.facts, configs, specs, self.limit])


def method_facts(method: str) -> list[Any]:
    """Name and parameters of a preset's method, as they enter hashes."""
    spec = load_method_spec(method)
    return [spec.method, hashed_params(spec)]
