"""Read JSON and YAML through one loader with limits on size, depth, numbers and text, for our files and for others'.

The result is plain data (mappings with text keys, lists, text, finite numbers, booleans, None), or an error on one line. Nothing is
executed and no environment variable is read, so a configuration of unknown origin cannot print a secret.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from dlplora.errors import ConfigError, DLPLoRAError

MAX_BYTES = 64_000_000
MAX_DEPTH = 40
MAX_NODES = 1_000_000
"""Values of one document, after YAML aliases are written out."""
MAX_DIGITS = 20
"""Most digits of whole numbers: enough for 64 bits."""
_REFERENCE = re.compile(r"(?<!\\)\$\{(\.*)([\w-]+(?:\.[\w-]+|\[[\w-]+\])*)\}")
_YAML_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_OTHER_REFERENCE = re.compile(r"(?<!\\)\$\{")


def read_text(path: str | os.PathLike[str], *, error: type[DLPLoRAError] = ConfigError, max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file.

    Raises:
        error: If it cannot be read, is longer than ``max_bytes``, or is not UTF-8.
    """
    path = Path(path)
    try:
        with path.open("rb") as handle:
            content = handle.read(max_bytes + 1)
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}.") from problem
    if len(content) > max_bytes:
        raise error(f"{path}: longer than {max_bytes:,} bytes, which is more than any such file needs.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: cannot be read: not UTF-8 (byte {problem.start + 1}); save the file as UTF-8.") from problem


def read_json(
    path: str | os.PathLike[str], *, error: type[DLPLoRAError] = ConfigError, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH
) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        error: If the file cannot be read, is not JSON, is not an object, or breaks a limit; the message names the file.
    """
    value = parse_json(read_text(path, error=error, max_bytes=max_bytes), str(path), error=error, max_depth=max_depth)
    return require_mapping(value, str(path), error=error)


def parse_json(
    text: str | bytes,
    where: str,
    *,
    error: type[DLPLoRAError] = ConfigError,
    max_depth: int = MAX_DEPTH,
    max_digits: int = MAX_DIGITS,
) -> Any:
    """One JSON value.

    Args:
        text: JSON; bytes are UTF-8.
        where: What to call the source in errors: a file, or a file and a line.
        error: What to raise.
        max_depth: Most brackets inside each other.
        max_digits: Most digits of a whole number.

    Raises:
        error: For text that is not JSON, NaN, infinities, numbers that are too long, NUL, half a surrogate pair, or too deep nesting.
    """
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8"), parse_int=partial(_whole_number, max_digits))
    except json.JSONDecodeError as problem:
        raise error(f"{where}: not JSON ({problem.msg}, line {problem.lineno}, column {problem.colno}).") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not UTF-8 (byte {problem.start + 1}); save the file as UTF-8.") from problem
    except RecursionError as problem:
        raise error(f"{where}: its brackets are nested too deeply; at most {max_depth} levels are read.") from problem
    except ValueError as problem:
        raise error(f"{where}: {problem}.") from problem
    check_plain(value, where, error=error, max_depth=max_depth, max_digits=max_digits)
    return value


def _whole_number(most: int, text: str) -> int:
    if len(text.lstrip("-")) > most:
        raise ValueError(f"the number {text[:12]}... has {len(text)} digits; at most {most} are read")
    return int(text)


def read_yaml(path: str | os.PathLike[str], *, error: type[DLPLoRAError] = ConfigError, max_bytes: int = 1_000_000) -> dict[str, Any]:
    """The mapping of a YAML file, with references such as ``${data.batch_size}`` to other keys of the file filled in.

    Raises:
        error: If the file is missing, is not YAML, is not a mapping, breaks a limit, or asks for anything but its own keys.
    """
    path = Path(path)
    if not path.is_file():
        raise error(f"config file not found: {path}. Pass the path of an existing YAML file.")
    value = parse_yaml(read_text(path, error=error, max_bytes=max_bytes), str(path), error=error)
    if not isinstance(value, dict):
        raise error(f"{path} must hold a mapping of keys to values, found {type(value).__name__}.")
    try:
        filled = _References(value, str(path), error, max_bytes).filled(value, ())
    except RecursionError as problem:
        raise error(f"{path}: a reference leads through too many other references.") from problem
    check_plain(filled, str(path), error=error)
    return {str(key): inner for key, inner in filled.items()}


def parse_yaml(text: str, where: str, *, error: type[DLPLoRAError] = ConfigError, max_depth: int = MAX_DEPTH) -> Any:
    """One YAML value: YAML 1.2's floats (``1e-3`` is a number), no dates, no tags, no key twice; references stay as they are written.

    Raises:
        error: For text that is not YAML, and for what ``parse_json`` refuses.
    """
    import yaml

    try:
        value = yaml.load(text, Loader=_yaml_loader())
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        spot = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise error(f"cannot read {where} as YAML: {getattr(problem, 'problem', None) or str(problem).splitlines()[0]}{spot}.") from problem
    except RecursionError as problem:
        raise error(f"cannot read {where} as YAML: its brackets are nested too deeply; at most {max_depth} levels are read.") from problem
    except (ValueError, OverflowError, LookupError, AttributeError, TypeError) as problem:  # a tag and a value that it does not fit
        raise error(f"cannot read {where} as YAML: a tag or a number does not fit its value: {str(problem)[:100]}.") from problem
    check_plain(value, where, error=error, max_depth=max_depth)
    return value


@cache
def _yaml_loader() -> Any:
    """PyYAML's safe loader, with numbers as YAML 1.2 has them, without dates, and without keys that are given twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key.value}'", key.start_mark)
                    seen.add(key.value)
            return node

        def construct_yaml_int(self, node: Any) -> int:
            if len(node.value) > 5 * MAX_DIGITS:  # numbers of base 60 take quadratic time
                raise yaml.constructor.ConstructorError(None, None, "a whole number of too many digits", node.start_mark)
            return int(super().construct_yaml_int(node))

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)

    kept = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float"}]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.yaml_implicit_resolvers = kept
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _YAML_FLOAT, list("-+0123456789."))
    return Loader


def require_mapping(value: Any, where: str, *, error: type[DLPLoRAError] = ConfigError) -> dict[str, Any]:
    """``value`` if it is a mapping.

    Raises:
        error: If it is anything else.
    """
    if not isinstance(value, dict):
        raise error(f"{where}: expected an object, got {type(value).__name__}.")
    return value


def check_plain(
    value: Any, where: str, *, error: type[DLPLoRAError] = ConfigError, max_depth: int = MAX_DEPTH, max_digits: int = MAX_DIGITS
) -> None:
    """Walk through a parsed document without recursion; values that one YAML alias names several times count each time.

    Raises:
        error: For nesting beyond ``max_depth``, too many values, numbers that are not finite or too long, NUL, half a surrogate
            pair, and values that JSON does not have.
    """
    pending: list[tuple[Any, int, Any]] = [(value, 0, None)]  # a value, its depth, and its key with those above
    count = 0
    while pending:
        one, depth, place = pending.pop()
        count += 1
        if depth > max_depth:
            raise error(f"{where}: its brackets are nested too deeply; at most {max_depth} levels are read.")
        if count > MAX_NODES:
            raise error(f"{where}: more than {MAX_NODES:,} values.")
        if isinstance(one, dict):
            for key, inner in one.items():
                if not isinstance(key, str):
                    pending.append((key, depth + 1, place))
                elif (problem := _problem(key, max_digits)) is not None:
                    raise error(f"{where}: a key {problem}.")
                pending.append((inner, depth + 1, (place, key)))
        elif isinstance(one, list):
            pending += [(inner, depth + 1, (place, number)) for number, inner in enumerate(one)]
        elif (problem := _problem(one, max_digits)) is not None:
            raise error(f"{where}: {_field(place)}{problem}.")


def is_unicode(text: str) -> bool:
    """Whether text holds no half of a surrogate pair, as names of files that are not UTF-8 do."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _problem(value: Any, max_digits: int) -> str | None:
    """What is wrong with one scalar value; None if nothing is."""
    if isinstance(value, str):
        if not is_unicode(value):
            return f"holds half of a surrogate pair, which is not text: {value[:40]!r}"
        return f"holds a NUL character: {value[:40]!r}" if "\0" in value else None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"is {value}, which is not a number; a missing value is null"
    if isinstance(value, int):
        return None if abs(value) < 10**max_digits else f"is a number of more than {max_digits} digits"
    return None if value is None else f"is a {type(value).__name__}, which is neither text nor number, list or mapping"


def _field(place: Any) -> str:
    keys: list[Any] = []
    while place is not None:
        place, key = place
        keys.append(f"[{key}]" if isinstance(key, int) else f".{key}")
    return f"field '{''.join(reversed(keys)).lstrip('.')}' " if keys else "it "


def refuse_resolvers(text: str, where: str, *, error: type[DLPLoRAError] = ConfigError) -> None:
    """Refuse ``${oc.env:NAME}`` and the like; ``${other.key}``, a reference to a key of the same file, is allowed, also inside another.

    Raises:
        error: If anything else is between ``${`` and ``}``.
    """
    bare = text
    for _ in range(MAX_DEPTH):
        bare, count = _REFERENCE.subn("x", bare)
        if not count:
            break
    if _OTHER_REFERENCE.search(bare):
        shown = text[text.find("${") :].split("}")[0][:40]
        raise error(f"{where}: '{shown}}}' is not filled in: a configuration may refer to its own keys only. Write the value itself.")


class _References:
    """The references of one document; each key is resolved once, and texts that grow beyond the limit are refused."""

    def __init__(self, root: Mapping[str, Any], where: str, error: type[DLPLoRAError], max_chars: int) -> None:
        self.root, self.where, self.error, self.max_chars = root, where, error, max_chars
        self.num_chars = 0
        self.found: dict[tuple[Any, ...], Any] = {}
        self.open: set[tuple[Any, ...]] = set()

    def filled(self, value: Any, place: tuple[Any, ...]) -> Any:
        """``value`` at ``place``, with its references filled in."""
        if isinstance(value, dict):
            return {key: self.filled(inner, (*place, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.filled(inner, (*place, number)) for number, inner in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        while True:  # once per level of references inside each other; refuse_resolvers bounds the levels
            refuse_resolvers(value, self.where, error=self.error)
            if match := _REFERENCE.fullmatch(value):
                return self._target(match, place)
            value, count = _REFERENCE.subn(partial(self._text, place), value)
            if not count:
                return value.replace("\\${", "${")

    def _text(self, place: tuple[Any, ...], match: re.Match[str]) -> str:
        target = self._target(match, place)
        if isinstance(target, (dict, list)):
            raise self.error(f"{self.where}: '{match[0]}' is part of a text but refers to more than one value.")
        text = str(target)
        self.num_chars += len(text)
        if self.num_chars > self.max_chars:
            raise self.error(f"{self.where}: '{match[0]}' grows beyond {self.max_chars:,} characters.")
        return text

    def _target(self, match: re.Match[str], place: tuple[Any, ...]) -> Any:
        keys = tuple(re.findall(r"[\w-]+", match[2]))
        path: tuple[Any, ...] = place[: -len(match[1])] if match[1] else ()
        value: Any = self.root
        for key in (*path, *keys):
            inner = int(key) if isinstance(value, list) and str(key).isdecimal() else key
            try:
                value = value[inner]
            except (KeyError, IndexError, TypeError) as problem:
                raise self.error(f"{self.where}: '{match[0]}' refers to a missing key.") from problem
        full = (*path, *keys)
        if full in self.open:
            raise self.error(f"{self.where}: '{match[0]}' refers to itself.")
        if full not in self.found:
            self.open.add(full)
            self.found[full] = self.filled(value, full)
            self.open.discard(full)
        return self.found[full]
