"""The grid of a method: ``configs/tune/<preset>.yaml``, or settings given on the command line.

A grid file has up to two keys. ``params`` varies parameters of the method, ``training`` varies settings of its training::

    params:
      top_k: [1, 2, 3]
    training:
      lr: [1.0e-3, 1.0e-2]

Every combination is a trial; the preset's own settings are always one of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dlplora.config import build, configs_root, find_config, load_yaml, short
from dlplora.errors import ConfigError, nearest
from dlplora.methods.registry import MethodSpec, method_class
from dlplora.reporting.tuning import MAX_TRIALS

TRAINING_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "lr": ("model", "init_args", "optimizer", "lr"),
    "num_steps": ("data", "init_args", "num_steps"),
    "batch_size": ("data", "init_args", "batch_size"),
}
"""Settings of a training and their keys in its configuration."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values by setting."""

    params: dict[str, list[Any]] = field(default_factory=dict)
    """Parameters of the method's ``Config``."""
    training: dict[str, list[Any]] = field(default_factory=dict)
    """Those of ``TRAINING_SETTINGS``."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The settings of one trial."""

    params: Mapping[str, Any]
    training: Mapping[str, Any]
    default: bool

    @property
    def settings(self) -> dict[str, Any]:
        """Both in one mapping, as a record shows them."""
        return {**self.params, **self.training}


def grid_of(spec: MethodSpec, given: Sequence[tuple[str, Any]] = ()) -> Grid:
    """The grid of a method: the given settings, else its file.

    Args:
        spec: The preset.
        given: Settings of the command line with their lists of values; they replace the file.

    Raises:
        ConfigError: If there is neither, or a setting is unknown (with the nearest valid one) or has no list of values.
    """
    if given:
        values: dict[str, Any] = {"params": {}, "training": {}}
        for name, options in given:
            part = "training" if name in TRAINING_SETTINGS and name not in asdict(spec.config) else "params"
            values[part][name] = options if isinstance(options, list) else [options]
        grid, where = Grid(**values), "--setting"
    else:
        path = configs_root() / "tune" / f"{spec.name}.yaml"
        if not path.is_file():
            raise ConfigError(f"no grid for '{spec.name}': {path} is missing. Write it, or pass --setting NAME=VALUE,VALUE.")
        grid, where = build(Grid, load_yaml(find_config("tune", spec.name)), str(path)), str(path)
    return _checked(grid, spec, where)


def _checked(grid: Grid, spec: MethodSpec, where: str) -> Grid:
    trained = "trained" in method_class(spec.method).metadata.needs
    known = {"params": list(asdict(spec.config)), "training": list(TRAINING_SETTINGS) if trained else []}
    for part, names in known.items():
        for name, values in getattr(grid, part).items():
            if name not in names:
                valid = ", ".join([*known["params"], *known["training"]]) or "none"
                raise ConfigError(f"{where}: '{name}' is not a setting of '{spec.name}'.{nearest(name, names)} Settings: {valid}.")
            if not values:
                raise ConfigError(f"{where}: '{name}' needs at least one value.")
            if len({repr(value) for value in values}) < len(values):
                raise ConfigError(f"{where}: '{name}' has a value twice: {short(values)}.")
    return grid


def choices(grid: Grid, spec: MethodSpec, training_defaults: Mapping[str, Any]) -> list[Choice]:
    """The trials of a grid, the preset's own settings first.

    Args:
        grid: Of ``grid_of``.
        spec: The preset.
        training_defaults: Values of the training settings in the training configuration.

    Raises:
        ConfigError: If there are more than ``MAX_TRIALS``.
    """
    own = asdict(spec.config)
    names = [*grid.params, *grid.training]
    default = [own[name] for name in grid.params] + [training_defaults[name] for name in grid.training]
    found = [default]
    found += [list(values) for values in itertools.product(*grid.params.values(), *grid.training.values()) if list(values) != default]
    if len(found) > MAX_TRIALS:
        raise ConfigError(
            f"'{spec.name}' would have {len(found)} trials, the default included; every method has at most {MAX_TRIALS}. Name fewer values."
        )
    cut = len(grid.params)
    return [
        Choice(
            params=dict(zip(names[:cut], one[:cut], strict=True)),
            training=dict(zip(names[cut:], one[cut:], strict=True)),
            default=one is default,
        )
        for one in found
    ]
