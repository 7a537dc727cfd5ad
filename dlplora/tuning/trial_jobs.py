"""The trials of one method before they run: settings, budget and run of each, all checked together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dlplora.config import config_hash, configs_root, find_config, list_configs, load_yaml
from dlplora.documents import parse_yaml
from dlplora.errors import ConfigError
from dlplora.evaluation.runner import Artifacts, Run, prepare
from dlplora.methods.registry import MethodSpec, hashed_params, method_class
from dlplora.reporting.tuning import protocol_folder, spelled
from dlplora.reproduce.paper import CONFIGS
from dlplora.reproduce.profile import profile_of_protocol
from dlplora.reproduce.recipe import TRAINED
from dlplora.tuning.grid import TRAINING_SETTINGS, Choice, Grid, choices

if TYPE_CHECKING:
    from dlplora.evaluation.protocol import Protocol

TOKEN_CAP = 1_911_450
"""Most tokens that a trial may train on, unless another number is given: what the shipped router of the nano suite saw."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Budget of every trained trial, the same for all methods."""

    max_tokens: int = TOKEN_CAP
    config: str = "fusion"
    """Training configuration."""
    options: tuple[str, ...] = ()
    """Further options of ``dlplora fit``: what a profile changes in the configuration for the method."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"--tokens must be at least 1, got {self.max_tokens}.")

    def defaults(self, names: list[str]) -> dict[str, Any]:
        """Values that the training configuration has for some of ``TRAINING_SETTINGS``.

        Raises:
            ConfigError: If the configuration is unknown or does not name one of them.
        """
        path = find_config("train", self.config)
        changed = dict(option.removeprefix("--").split("=", 1) for option in self.options)
        found = {}
        for name in names:
            dotted = ".".join(TRAINING_SETTINGS[name])
            value: Any = load_yaml(path)
            for key in TRAINING_SETTINGS[name]:
                value = value.get(key) if isinstance(value, dict) else None
            if dotted in changed:
                value = parse_yaml(changed[dotted], f"{path}: {dotted}")
            if value is None:
                raise ConfigError(f"{path}: '{dotted}' is missing; '{name}' has no default to start from.")
            found[name] = value
        return found


def budget_of(protocol: str, method: str, max_tokens: int, config: str | None = None) -> Budget:
    """The budget of a method's trials: what the protocol's profile trains gates with, so that the default trial is the row of the table.

    Args:
        protocol: Name of a protocol; one without a profile (nano) takes ``configs/train/fusion.yaml``.
        method: Preset.
        max_tokens: Cap for every trial.
        config: Training configuration in place of the profile's, without its options.
    """
    profile = None if config is not None else profile_of_protocol(protocol)
    if profile is None:
        return Budget(max_tokens=max_tokens, config=config or "fusion")
    options = [option for role in ("trained", f"{TRAINED}{method}") for option in profile.fit_options.get(role, ())]
    return Budget(max_tokens=max_tokens, config=profile.configs.get("trained", CONFIGS["trained"]), options=tuple(options))


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """One trial before it is run."""

    choice: Choice
    run: Run
    """Under the validation protocol; of a trial that trains, with the artifacts of the preset until it has its own."""
    trains: bool
    budget: Budget

    def cell(self) -> str:
        """Hash of everything the score depends on."""
        described = self.run.description()
        if self.trains:
            config = load_yaml(find_config("train", self.budget.config))
            described |= {"artifacts": {}, "training": dict(self.choice.training), "max_tokens": self.budget.max_tokens, "config": config}
            described |= {"options": list(self.budget.options)} if self.budget.options else {}
        return config_hash(described)


def trial_jobs(
    spec: MethodSpec,
    grid: Grid,
    protocol: Protocol,
    protocol_name: str,
    seed: int,
    *,
    artifacts: Artifacts | None = None,
    limit: int | None = None,
    device: str | None = None,
    budget: Budget | None = None,
) -> list[TrialJob]:
    """All trials of a method, checked before the first one starts; arguments as for ``evaluation.runner.prepare``.

    Args:
        spec: The preset.
        grid: Of ``grid.grid_of``.
        protocol: Its split is replaced by ``validation``.
        protocol_name: For the records.
        seed: Of methods that draw random numbers, and of trainings.
        artifacts: Folders.
        limit: Validation questions per task.
        device: Where to run.
        budget: Of trials that train.

    Raises:
        DLPLoRAError: If a value does not fit its setting, or a run is refused.
    """
    budget = budget or Budget()
    cls = method_class(spec.method)
    needs_training = bool(grid.training) or any(name not in cls.evaluation_params for name in grid.params)
    trains = "trained" in cls.metadata.needs and needs_training
    validation = replace(protocol, split="validation")
    shipped = spec.path in (None, configs_root() / "method" / f"{spec.name}.yaml")
    method = spec.name if shipped else str(spec.path)
    jobs = []
    for choice in choices(grid, spec, budget.defaults(list(grid.training))):
        common: dict[str, Any] = {"artifacts": artifacts, "limit": limit, "device": device}
        run = prepare(validation, protocol_name, method, seed, method_params=choice.params, **common)
        jobs.append(TrialJob(choice=choice, run=run, trains=trains, budget=budget))
    seen: dict[str, Choice] = {}
    for one in jobs:
        varied = [hashed_params(one.run.spec), dict(one.choice.training) if one.trains else {}]  # all else in the cells is equal
        same = seen.setdefault(config_hash(varied), one.choice)
        if same is not one.choice:
            raise ConfigError(
                f"'{spec.name}' reads no difference between {spelled(same.settings)} and {spelled(one.choice.settings)}: "
                "another setting of the preset turns the varied one off."
            )
    return jobs


def folder_of(run: Run) -> str:
    """Folder of a run's trials below ``tuning/``."""
    shipped = run.protocol_name in list_configs("protocol")
    own = not shipped or load_yaml(find_config("protocol", run.protocol_name)).get("backbone") == run.protocol.backbone
    return protocol_folder(run.protocol_name, own, run.backbone_name)
