"""Which modules the settings of an adapter select: ``target_modules``, ``exclude_modules``, ``layers_to_transform``, ``layers_pattern``.

PEFT makes adapters for the selected modules only, and passes over tensors of others without a word. A file with such tensors would mean one
thing there and another here, so it is refused. The rules are PEFT's: text is a regular expression for a whole module path, a list holds
paths or their ends at a dot, layers are chosen by the first number in the path. No deep-learning package is imported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

from dlplora.config import short
from dlplora.errors import AdapterError

MAX_PATTERN_CHARS = 10_000
MATCH_SECONDS = 0.1
"""A pattern that takes longer for one module name is refused; ordinary ones take microseconds."""
_MAX_LAYER_PATTERNS = 100
_ALL_LINEAR = "all-linear"
_OUTPUT_HEADS = frozenset({"lm_head", "embed_out"})
"""The output layer, which ``all-linear`` leaves out, by the names that models give it."""
_INDEX = r".*?\.[^.]*\.(?P<idx>\d+)\."


def pattern_problem(key: str, pattern: str) -> str | None:
    """Why a pattern of a configuration cannot be used; None if it can."""
    try:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise re.error(f"it is longer than {MAX_PATTERN_CHARS:,} characters")
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"'{key}' holds '{pattern[:60]}', which is not a regular expression: {error}"
    return None


def timed_match(rule: str, module: str, shown: str, *, whole: bool = False) -> Any:
    """A match of a rule at the beginning of a module path, or with all of it.

    Raises:
        AdapterError: If matching takes too long, as a pattern can be written to never end; ``shown`` is the pattern in the message.
    """
    import regex

    try:
        return (regex.fullmatch if whole else regex.match)(rule, module, timeout=MATCH_SECONDS)
    except TimeoutError as error:
        raise AdapterError(f"the pattern '{shown[:60]}' takes too long to compare with module names; write it as plain names") from error
    except regex.error as error:
        raise AdapterError(f"the pattern '{shown[:60]}' is not a regular expression: {error}") from error


def target_problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the settings themselves, one line each."""
    found: list[str] = []
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, (str, list)) or not all(isinstance(one, str) for one in value):
            found.append(f"'{key}' must be text or a list of texts, got {short(value)}")
        elif isinstance(value, str) or key == "layers_pattern":
            patterns = [value] if isinstance(value, str) else value
            if len(patterns) > _MAX_LAYER_PATTERNS:
                found.append(f"'{key}' holds {len(patterns)} patterns; at most {_MAX_LAYER_PATTERNS} are read")
            found += [problem for one in patterns[:_MAX_LAYER_PATTERNS] if (problem := pattern_problem(key, one)) is not None]
    layers = config.get("layers_to_transform")
    if layers is not None and not all(type(one) is int for one in (layers if isinstance(layers, list) else [layers])):
        found.append(f"'layers_to_transform' must be a whole number or a list of them, got {short(layers)}")
    elif layers not in (None, []) and isinstance(config.get("target_modules"), str):
        found.append(
            "'layers_to_transform' is set, but 'target_modules' is one text, which already selects layers; PEFT refuses both together"
        )
    return found


class Selection:
    """The modules that a configuration selects.

    Args:
        config: A configuration without ``target_problems``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._targets, self._excluded = (_prepared(config.get(key)) for key in ("target_modules", "exclude_modules"))
        layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
        self._layers = None if layers in (None, []) else frozenset([layers] if isinstance(layers, int) else layers)
        self._patterns = ([patterns] if isinstance(patterns, str) else list(patterns)) if patterns else []

    def left_out_by(self, module: str) -> str | None:
        """The setting that leaves a module out; None if it is selected.

        Raises:
            AdapterError: If a pattern takes too long.
        """
        if self._excluded and _selects(self._excluded, module):
            return "exclude_modules"
        if self._targets is None:  # PEFT then takes the modules that it knows for the kind of base model
            return None
        if isinstance(self._targets, str) and self._targets.lower() == _ALL_LINEAR:
            return "target_modules" if module.rpartition(".")[2] in _OUTPUT_HEADS else None
        if not _selects(self._targets, module):
            return "target_modules"
        if self._layers is None or isinstance(self._targets, str) or module in self._targets:
            return None
        return None if self._layer(module) in self._layers else "layers_to_transform"

    def _layer(self, module: str) -> int | None:
        rules = [(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", pattern) for pattern in self._patterns] or [(_INDEX, _INDEX)]
        for rule, pattern in rules:
            match = timed_match(rule, module, pattern)
            if match is not None:
                return int(match["idx"])
        return None


def _prepared(value: Any) -> str | frozenset[str] | None:
    return frozenset(value) if isinstance(value, list) else value


def _selects(chosen: str | Collection[str], module: str) -> bool:
    if isinstance(chosen, str):
        return _fits_whole(chosen, module)
    return any(end in chosen for end in _ends(module))


def _ends(module: str) -> Iterable[str]:
    """The path and its ends at each dot."""
    parts = module.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


@lru_cache(maxsize=100_000)
def _fits_whole(pattern: str, module: str) -> bool:
    return timed_match(pattern, module, pattern, whole=True) is not None


def left_out(config: Mapping[str, Any], paths: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
    """Modules that have tensors but are not selected, by the setting that leaves them out.

    Args:
        config: A configuration without ``target_problems``.
        paths: Modules, and the paths that each has in the file: the settings of a wrapped model may hold the names of its wrappers.

    Raises:
        AdapterError: If a pattern takes too long.
    """
    selection = Selection(config)
    found: dict[str, list[str]] = {}
    for module, spelled in paths.items():
        reasons = [selection.left_out_by(path) for path in (module, *spelled)]
        if None not in reasons:
            found.setdefault(str(reasons[0]), []).append(module)
    return found
