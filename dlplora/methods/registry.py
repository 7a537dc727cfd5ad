"""Find methods by name and build them from YAML. No list has to be maintained.

A method is a ``FusionMethod`` subclass with a ``name`` in a module of ``dlplora.methods`` or ``dlplora.baselines``, or a class named by an
entry point of the group ``dlplora.methods``. A *preset* is a file ``configs/method/<preset>.yaml`` with the two keys ``method`` and
``params``; several presets may share one class.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

from dlplora.config import build, find_config, list_configs, load_yaml
from dlplora.errors import ConfigError, MethodError, nearest
from dlplora.methods.base import FusionMethod, Metadata

ENTRY_POINT_GROUP = "dlplora.methods"
SCANNED_PACKAGES = ("dlplora.methods", "dlplora.baselines")
SPEC_KEYS = ("method", "params")
PROTOCOL_KEYS = frozenset(
    (
        "model",
        "pretrained",
        "backbone",
        "revision",
        "dtype",
        "load_in_4bit",
        "load_in_8bit",
        "attn_implementation",
        "trust_remote_code",
        "device",
        "suite",
        "tasks",
        "num_fewshot",
        "fewshot_seed",
        "batch_size",
        "max_length",
        "max_new_tokens",
        "max_gen_toks",
        "seed",
        "seeds",
        "limit",
        "gen_kwargs",
        "do_sample",
        "num_beams",
        "apply_chat_template",
        "system_instruction",
        "backend",
        "pool",
    )
)
"""Settings that must be identical for every method of a comparison; they live in ``configs/protocol``."""


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A method with its parameters, read once and checked by ``load_method_spec``; methods are built from it.

    Args:
        name: Name of the preset (stem of its file), shown in tables.
        method: Name of the class.
        params: Parameters as given; what is not given keeps the default of the class.
        path: The YAML file, or None if a method without a preset was named.
        config: The class's ``Config`` with these parameters.
    """

    name: str
    method: str
    params: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    config: Any = field(default=None, compare=False, repr=False)

    @property
    def where(self) -> str:
        """How errors call the source of this spec."""
        return str(self.path) if self.path is not None else f"method '{self.name}'"


def available_methods() -> dict[str, type[FusionMethod]]:
    """All methods that can be found, by name, sorted.

    Raises:
        MethodError: If two classes share a name, a class lacks its metadata, or a third-party entry point cannot be loaded.
    """
    found: dict[str, type[FusionMethod]] = {}
    for package in SCANNED_PACKAGES:
        for module in _modules_of(package):
            for cls in _methods_in(module):
                _add(found, cls.name, cls, module.__name__)
    for entry_point in _third_party(importlib.metadata.entry_points, tuple(sys.path)):
        _add(found, entry_point.name, _load_entry_point(entry_point), f"entry point {entry_point.value}")
    return dict(sorted(found.items()))


@functools.lru_cache(maxsize=1)
def _third_party(read: Callable[..., Iterable[EntryPoint]], path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Entry points of other packages, sorted. Reading them takes 15 ms and a listing asks a hundred times, so they are cached by path."""
    return tuple(sorted(read(group=ENTRY_POINT_GROUP), key=lambda entry: (entry.name, entry.value)))


def _modules_of(package_name: str) -> Iterator[ModuleType]:
    package = importlib.import_module(package_name)
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        if not info.name.startswith("_"):
            yield importlib.import_module(f"{package_name}.{info.name}")


def _methods_in(module: ModuleType) -> Iterator[type[FusionMethod]]:
    """Classes defined in the module itself; helper base classes have no ``name`` and are skipped."""
    for _, cls in inspect.getmembers(module, inspect.isclass):
        if issubclass(cls, FusionMethod) and cls.__module__ == module.__name__ and "name" in vars(cls):
            yield cls


def _load_entry_point(entry_point: importlib.metadata.EntryPoint) -> type[FusionMethod]:
    try:
        cls = entry_point.load()
    except (ImportError, AttributeError) as error:
        raise MethodError(
            f"the third-party method '{entry_point.name}' ({entry_point.value}) cannot be imported: {error}. Repair or remove its package."
        ) from error
    if not (inspect.isclass(cls) and issubclass(cls, FusionMethod)):
        raise MethodError(
            f"entry point '{entry_point.name}' must name a FusionMethod subclass, {entry_point.value} is {type(cls).__name__}."
        )
    if getattr(cls, "name", None) != entry_point.name:
        raise MethodError(
            f"entry point '{entry_point.name}' names {entry_point.value}, whose name is '{getattr(cls, 'name', None)}'. Use one name."
        )
    return cls


def _add(found: dict[str, type[FusionMethod]], name: str, cls: type[FusionMethod], source: str) -> None:
    if name in found and found[name] is not cls:
        other = f"{found[name].__module__}.{found[name].__qualname__}"
        raise MethodError(f"two methods are called '{name}': {other} and {cls.__qualname__} ({source}). Rename one.")
    if not isinstance(getattr(cls, "metadata", None), Metadata):
        raise MethodError(f"method '{name}' ({source}) has no metadata; set metadata = Metadata(...).")
    if not is_dataclass(cls.Config):
        raise MethodError(f"method '{name}' ({source}): Config must be a dataclass.")
    found[name] = cls


def method_class(name: str) -> type[FusionMethod]:
    """The class of one method.

    Raises:
        MethodError: If no method has this name; near matches and all names are listed.
    """
    methods = available_methods()
    if name not in methods:
        raise MethodError(f"unknown method '{name}'.{nearest(name, methods)} Known methods: {', '.join(methods)}.")
    return methods[name]


def available_presets() -> dict[str, MethodSpec]:
    """Every shipped preset by name, sorted."""
    return {name: load_method_spec(name) for name in list_configs("method")}


def load_method_spec(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> MethodSpec:
    """Read a preset by name, a YAML file by path, or take a method without a preset by its own name.

    Args:
        name_or_path: ``dlp``, ``path/to/mine.yaml``, or the name of a third-party method.
        overrides: Parameters that replace those of the file.

    Raises:
        MethodError: If the preset or the method in the file is unknown.
        ConfigError: If the file is missing or malformed, sets a key that the evaluation protocol owns, or a parameter is
            unknown (with the nearest valid one) or of a wrong type.
    """
    methods = available_methods()
    name = str(name_or_path)
    is_path = Path(name).suffix in {".yaml", ".yml"}
    presets = list_configs("method")
    if is_path or name in presets:
        path = find_config("method", name)
        method, params = _read_spec_file(path, methods)
        return _checked(MethodSpec(path.stem, method, _merged(methods[method], params, overrides), path), methods[method])
    if name in methods:
        return _checked(MethodSpec(name, name, _merged(methods[name], {}, overrides)), methods[name])
    known = sorted({*presets, *methods})
    raise MethodError(f"unknown method '{name}'.{nearest(name, known)} Known: {', '.join(known)}; or give the path of a YAML file.")


def _checked(spec: MethodSpec, cls: type[FusionMethod]) -> MethodSpec:
    """The spec with its ``Config``."""
    _refuse_protocol_keys(spec.params, f"{spec.where}: params", _parameters(cls))
    return replace(spec, config=build(cls.Config, spec.params, spec.where))


def _merged(cls: type[FusionMethod], params: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Parameters with overrides, both under their present names."""
    base = cls.upgrade_params(params, {})
    return {**base, **cls.upgrade_params(overrides or {}, base)}


def _read_spec_file(path: Path, methods: Mapping[str, type[FusionMethod]]) -> tuple[str, dict[str, Any]]:
    content = load_yaml(path)
    _refuse_protocol_keys(content, str(path), SPEC_KEYS)
    for key in content:
        if key not in SPEC_KEYS:
            # a parameter one level too high is the most likely mistake
            method = methods.get(str(content.get("method")))
            parameters = _parameters(method) if method is not None else []
            advice = " It is a parameter: indent it under 'params'." if key in parameters else nearest(key, SPEC_KEYS)
            raise ConfigError(f"{path}: unknown key '{key}'.{advice} Valid keys: {', '.join(SPEC_KEYS)}.")
    method_name = content.get("method")
    if not isinstance(method_name, str):
        raise ConfigError(f"{path}: 'method' must name a method, got {method_name!r}.")
    if method_name not in methods:
        raise MethodError(f"{path}: unknown method '{method_name}'.{nearest(method_name, methods)} Known methods: {', '.join(methods)}.")
    params = content.get("params")
    if params is None:
        params = {}
    if not isinstance(params, dict):
        raise ConfigError(f"{path}: 'params' must be a mapping, got {params!r}.")
    return method_name, {str(key): value for key, value in params.items()}


def _parameters(cls: type[FusionMethod]) -> list[str]:
    return [f.name for f in fields(cls.Config)]


def _refuse_protocol_keys(values: Mapping[str, Any], where: str, valid: Sequence[str]) -> None:
    for key in values:
        if key in PROTOCOL_KEYS:
            raise ConfigError(
                f"{where}: '{key}' belongs to the evaluation protocol, which is the same for all methods. Set it in configs/protocol or on "
                f"the command line, not in a method file.{nearest(key, valid)} Valid keys here: {', '.join(valid) or 'none'}."
            )


def resolved_params(spec: MethodSpec) -> dict[str, Any]:
    """All parameters of a spec with the defaults filled in, as a record shows them."""
    return method_class(spec.method).recorded_params(spec.config)


def hashed_params(spec: MethodSpec) -> dict[str, Any]:
    """``resolved_params`` as hashes cover them."""
    return method_class(spec.method).hashed_params(spec.config)


def build_method(spec: MethodSpec | str, overrides: Mapping[str, Any] | None = None) -> FusionMethod:
    """Make the method of a spec (or of a preset name or path), not yet bound to a bank.

    Raises:
        MethodError, ConfigError: As ``load_method_spec``.
    """
    if isinstance(spec, str):
        spec = load_method_spec(spec, overrides)
    cls = method_class(spec.method)
    if spec.config is None or overrides:
        spec = _checked(replace(spec, params=_merged(cls, spec.params, overrides)), cls)
    return cls(spec.config)


def build_stand_in(spec: MethodSpec | str) -> FusionMethod:
    """As ``build_method``, under the parameters for checks and counts (``FusionMethod.stand_in_params``)."""
    spec = load_method_spec(spec) if isinstance(spec, str) else spec
    return build_method(spec, method_class(spec.method).stand_in_params)


def discovered_specs() -> dict[str, MethodSpec]:
    """What ``method=NAME`` may name: every preset, then every method without a preset, each group sorted."""
    presets = available_presets()
    covered = {spec.method for spec in presets.values()}
    return presets | {name: load_method_spec(name) for name in available_methods() if name not in covered}


def describe_methods() -> list[dict[str, Any]]:
    """One row per preset, read from its class and configuration: what ``dlplora methods`` prints, without the parameter counts."""
    rows = []
    for name, spec in discovered_specs().items():
        method = build_method(spec)
        facts = method.metadata
        rows.append(
            {
                "name": name,
                "title": facts.title,
                "paper": facts.paper,
                "granularity": method.granularity,
                "depth": facts.depth,
                "fusion": "factor" if facts.combine == "factor" else "output",
                "needs": list(facts.needs),
                "heterogeneous": facts.heterogeneous,
            }
        )
    return rows
