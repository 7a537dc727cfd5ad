"""Seeded mutations of sound documents: JSON and YAML values, lines of text, bytes, and safetensors headers."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

WRONG_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 10**9, 2**63, -(2**63), 10**19, 0.5, -0.5, 1e308, 1e-320, "", " ", "\t\n", "x", "0", "1e3", "null",
    "../../etc/passwd", "/dev/zero", "a" * 5_000, "ä\u202eß\u0301\U0001f600", "\ufeff", "${oc.env:DLPLORA_SECRET}", "${HOME}",
    "{{ ''.__class__ }}", "<script>alert(1)</script>", "!!python/object/apply:os.system ['touch EXECUTED']", "(a+)+$", "*", "-", "--help",
    "%s%n", "\\", "a/b", "a\nb", [], {}, [None], [[]], [1, "a"], {"": 0}, {"a": {"b": []}}, [0] * 2_000, ["a", "a"],
)  # fmt: skip
RAW_VALUES = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 400, '"\\u0000"', '"\\ud800"', "[" * 200 + "]" * 200)
"""JSON that a parsed value cannot stand for."""
_RAW = "@@RAW@@"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a document, its root included."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:20]):
            yield from places(inner, (*path, number))


def changed(document: Any, path: tuple[Any, ...], change: Callable[[Any, Any], Any]) -> Any:
    """A copy of a document in which ``change(container, key)`` was applied to the place; the root is replaced by its result."""
    if not path:
        return change(None, None)
    whole = copy.deepcopy(document)
    container = whole
    for key in path[:-1]:
        container = container[key]
    change(container, path[-1])
    return whole


def document(value: Any, rng: random.Random) -> tuple[str, str]:
    """One mutated JSON text (which is YAML as well) and what was done to it."""
    path = rng.choice(list(places(value)))
    where = ".".join(map(str, path)) or "root"
    kind = rng.choice(["value", "value", "value", "raw", "remove", "rename", "add", "twice", "cut"])
    if kind in {"remove", "rename", "add", "twice"} and not path:
        kind = "value"
    if kind == "value":
        wrong = rng.choice(WRONG_VALUES)

        def put(container: Any, key: Any) -> Any:
            if container is None:
                return wrong
            container[key] = wrong
            return None

        return json.dumps(changed(value, path, put)), f"{where} = {str(wrong)[:30]!r}"
    if kind == "raw":
        raw = rng.choice(RAW_VALUES)

        def mark(container: Any, key: Any) -> Any:
            if container is None:
                return _RAW
            container[key] = _RAW
            return None

        return json.dumps(changed(value, path, mark)).replace(f'"{_RAW}"', raw), f"{where} = {raw[:20]}"
    if kind == "remove":
        return json.dumps(changed(value, path, lambda container, key: container.pop(key))), f"{where} removed"
    if kind in {"rename", "add"}:
        new = rng.choice(["x", "", "__class__", "r_", "É", "a" * 300, "-1", "method", "name"])

        def rename(container: Any, key: Any) -> None:
            if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            else:
                container[new] = container.pop(key) if kind == "rename" else copy.deepcopy(container[key])

        return json.dumps(changed(value, path, rename)), f"{where} {kind} {new[:10]!r}"
    text = json.dumps(value)
    if kind == "twice":
        return text[:-1] + f', "{path[0]}": null}}' if isinstance(value, dict) else text + text, f"{path[0]} twice"
    position = rng.randrange(len(text))
    return text[:position], f"cut at {position} of {len(text)}"


def spoilt_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Bytes cut, changed, repeated, or put into another encoding."""
    kind = rng.choice(["cut", "flip", "zero", "repeat", "utf16", "latin", "bom", "noise", "empty"])
    position = rng.randrange(max(1, min(len(content), 4_000)))
    if kind == "cut":
        return content[:position], f"cut at {position}"
    if kind == "flip":
        return content[:position] + bytes([content[position] ^ (1 << rng.randrange(8))]) + content[
            position + 1 :
        ], f"bit of byte {position}"
    if kind == "zero":
        return content[:position] + b"\0" * 8 + content[position + 8 :], f"zeros at {position}"
    if kind == "repeat":
        return content + content[position:], f"repeated from {position}"
    if kind == "utf16":
        return content.decode("latin-1").encode("utf-16"), "UTF-16"
    if kind == "latin":
        return content[:position] + "ä".encode("latin-1") + content[position:], f"Latin-1 at {position}"
    if kind == "bom":
        return b"\xef\xbb\xbf" + content, "byte order mark"
    if kind == "noise":
        return rng.randbytes(1_000), "noise"
    return b"", "empty"


def safetensors(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file with a mutated header, or with a header length that is not true."""
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    if rng.random() < 0.2:
        wrong = rng.choice([0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", wrong) + content[8:], f"header length {wrong}"
    if rng.random() < 0.3:
        name = rng.choice([key for key in header if key != "__metadata__"])
        key, value = rng.choice(
            [
                ("dtype", rng.choice(["F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "X", "U8"])),
                ("shape", rng.choice([[0, 8], [1], [2**40, 2**40], [-1, 4], [], [4, 8, 1], ["4", 8]])),
                ("data_offsets", rng.choice([[0, 0], [8, 0], [0, 2**60], [-4, 4], [0], [0, 1, 2]])),
            ]
        )
        header[name][key] = value
        text, what = json.dumps(header), f"{name[-20:]}.{key} = {value}"
    else:
        text, what = document(header, rng)
    encoded = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + body, f"header: {what}"
