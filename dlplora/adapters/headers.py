"""Contents of an adapter folder from its safetensors header: names, shapes and dtypes. No tensor is read and torch is not imported.

A safetensors file is an 8-byte length (little-endian), that many bytes of JSON, then the tensors.
Shapes: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlplora.adapters.config import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, config_problems, load_config, rank_of, scaling_of
from dlplora.adapters.targets import left_out
from dlplora.config import short
from dlplora.documents import parse_json
from dlplora.errors import AdapterError, UnsafeFileError

DTYPES = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Names that torch.compile, FSDP, activation checkpointing and Fabric put into the keys of what they wrap; base models have none."""
AMBIGUOUS_WRAPPER = "module"
"""What DDP and DataParallel put in front of keys; a base model may have a module of that name, but not one that holds ``base_model``."""
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a file; ``start`` and ``end`` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ModuleHeader:
    """The two factors of one adapted module: keys in the file, A (R, I), B (O, R), and the scaling of their product."""

    key_a: str
    key_b: str
    rank: int
    d_in: int
    d_out: int
    dtype: str
    scaling: float


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    """Everything about an adapter but its numbers. ``modules`` is keyed by module path in the base model, sorted."""

    name: str
    path: Path
    config: Mapping[str, Any]
    modules: Mapping[str, ModuleHeader]
    tensors: Mapping[str, TensorHeader]
    wrappers: tuple[str, ...] = ()
    """Names of wrappers that were left out of the keys, because the adapter was saved from a wrapped model."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Last parts of the adapted module paths, sorted."""
        return tuple(sorted({module.rsplit(".", 1)[-1] for module in self.modules}))

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (I, O)."""
        return {path: (module.d_in, module.d_out) for path, module in self.modules.items()}


def unwrapped(key: str) -> tuple[str, tuple[str, ...]]:
    """A key without the names of wrappers, and these names.

    >>> unwrapped("module.base_model.model._orig_mod.model.layers.0.q_proj.lora_A.weight")
    ('base_model.model.model.layers.0.q_proj.lora_A.weight', ('module', '_orig_mod'))
    """
    parts = key.split(".")
    found: list[str] = []
    while len(parts) > 1 and parts[0] == AMBIGUOUS_WRAPPER and parts[1] in (*WRAPPERS, AMBIGUOUS_WRAPPER, "base_model"):
        found.append(parts.pop(0))
    found += [part for part in parts if part in WRAPPERS]
    return ".".join(part for part in parts if part not in WRAPPERS), tuple(dict.fromkeys(found))


def read_tensor_headers(path: Path) -> dict[str, TensorHeader]:
    """The table of contents of a safetensors file; its tensors are not read.

    Raises:
        AdapterError: If the file is not safetensors, or is shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise AdapterError(f"{path} is damaged or truncated: {size} bytes, the header alone needs {length + 8}.")
        text = handle.read(length)
    try:
        entries = parse_json(text, "header", error=AdapterError)
        tensors = {key: _tensor_header(row, 8 + length) for key, row in entries.items() if key != "__metadata__"}
    except (AdapterError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path} is damaged or truncated: its header is not that of a safetensors file ({error}).") from error
    for key, tensor in tensors.items():
        expected = math.prod(tensor.shape) * DTYPES[tensor.dtype][1] if tensor.dtype in DTYPES else tensor.end - tensor.start
        if not 0 <= tensor.start <= tensor.end <= size or tensor.end - tensor.start != expected:
            raise AdapterError(f"{path} is damaged or truncated: '{key}' ends at byte {tensor.end}, the file has {size}.")
    last = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if last != size:
        raise AdapterError(f"{path} is damaged or truncated: the tensors end at byte {last}, the file has {size}.")
    return tensors


def _tensor_header(row: Mapping[str, Any], offset: int) -> TensorHeader:
    """One entry of the table of contents; its positions count from ``offset``."""
    shape, (start, end) = row["shape"], row["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, start, end)):
        raise ValueError("sizes and positions must be whole numbers from 0")
    return TensorHeader(str(row["dtype"]), tuple(shape), offset + start, offset + end)


def weights_file(folder: Path, name: str) -> Path:
    """The adapter's safetensors file.

    Raises:
        UnsafeFileError: If there are pickled weights only.
        AdapterError: If there are none.
    """
    path = folder / WEIGHTS_NAME
    if path.is_file():
        return path
    if (folder / PICKLE_NAME).is_file() or list(folder.glob("*.pt")):
        raise UnsafeFileError(
            f"adapter '{name}': {folder} holds pickled weights only, which can run code when read; save it again with "
            f"safe_serialization=True, or let `dlplora pool add --allow-pickle` convert {PICKLE_NAME}."
        )
    raise AdapterError(f"adapter '{name}': {WEIGHTS_NAME} is missing in {folder}.")


def read_header(folder: Path, name: str) -> AdapterHeader:
    """Configuration and table of contents of one adapter folder.

    Raises:
        UnsafeFileError: If there are pickled weights only.
        AdapterError: For the first thing that is missing, damaged, or impossible to fuse exactly.
    """
    header, problems = examine(folder, name)
    if problems:
        raise problems[0]
    assert header is not None
    return header


def examine(folder: Path, name: str) -> tuple[AdapterHeader | None, list[AdapterError]]:
    """As ``read_header``, but everything wrong is listed instead of the first thing being raised.

    Returns:
        The header, None if configuration or weights cannot be read; and what keeps the adapter from being fused.
    """
    try:
        config = load_config(folder, name)
    except AdapterError as error:
        return None, [error]
    problems = [AdapterError(f"adapter '{name}': {text} ({folder / CONFIG_NAME}).") for text in config_problems(config)]
    try:
        path = weights_file(folder, name)
        tensors = read_tensor_headers(path)
    except UnsafeFileError as error:
        return AdapterHeader(name, folder, config, {}, {}), [*problems, error]
    except AdapterError as error:
        text = str(error)
        return None, [*problems, error if text.startswith("adapter ") else AdapterError(f"adapter '{name}': {text}")]
    pairs: dict[str, dict[str, str]] = {}
    wrappers: dict[str, None] = {}
    spelled: dict[str, set[str]] = {}
    for key in sorted(tensors, key=lambda key: "lora_" not in key):  # the telling names first
        plain, found = unwrapped(key)
        wrappers |= dict.fromkeys(found)
        match = _KEY.match(plain)
        if match is None:
            problems.append(AdapterError(f"adapter '{name}': '{key}' in {path} is {_what_is(key)}; it cannot be fused."))
        elif pairs.setdefault(match["module"], {}).setdefault(match["side"], key) != key:
            first = pairs[match["module"]][match["side"]]
            problems.append(AdapterError(f"adapter '{name}': '{first}' and '{key}' in {path} are one factor; save the adapter again."))
        if match is not None and plain != key and (raw := _KEY.match(key)):
            spelled.setdefault(match["module"], set()).add(raw["module"].split("base_model.model.")[-1])
    if not pairs:
        problems.append(AdapterError(f"adapter '{name}': no LoRA weights in {path}."))
    if not problems:
        problems += _not_selected(config, {module: spelled.get(module, set()) for module in sorted(pairs)}, name, path)
    modules: dict[str, ModuleHeader] = {}
    for module in sorted(pairs):
        try:
            modules[module] = _module_header(module, pairs[module], tensors, config, bool(problems))
        except AdapterError as error:
            problems.append(AdapterError(f"adapter '{name}': {error} ({path})."))
    return AdapterHeader(name, folder, config, modules, tensors, tuple(wrappers)), problems


def _not_selected(config: Mapping[str, Any], modules: Mapping[str, set[str]], name: str, path: Path) -> list[AdapterError]:
    """Tensors of modules that the configuration leaves out: PEFT passes over them without a word."""
    try:
        found = left_out(config, modules)
    except AdapterError as error:
        return [AdapterError(f"adapter '{name}': {error} ({path.with_name(CONFIG_NAME)}).")]
    return [
        AdapterError(
            f"adapter '{name}': '{setting}' in {CONFIG_NAME} leaves out '{these[0]}'{_and_more(len(these) - 1)}: {short(config[setting])}. "
            f"{path} holds tensors of such modules, which PEFT would not use; correct the setting, or remove the tensors."
        )
        for setting, these in found.items()
    ]


def _and_more(number: int) -> str:
    return f" and {number} more" if number else ""


def _what_is(key: str) -> str:
    for part, kind in (
        ("lora_embedding", "a trained embedding"),
        (".base_layer.", "a copy of the base model's own weight (PEFT leaves it out with save_embedding_layers=False)"),
        ("embed_tokens", "a trained embedding"),
        ("token_adapter", "a trained embedding"),
        ("lora_magnitude_vector", "the magnitude of a DoRA layer"),
        ("modules_to_save", "a fully trained module"),
    ):
        if part in key:
            return kind
    return "a trained bias" if key.endswith(".bias") else "a tensor that is not a LoRA factor"


def _module_header(
    module: str, pair: Mapping[str, str], tensors: Mapping[str, TensorHeader], config: Mapping[str, Any], unchecked: bool
) -> ModuleHeader:
    """The two factors of a module; ``unchecked``: the configuration is already refused, so its ranks and scalings are not asked for."""
    if set(pair) != {"A", "B"}:
        raise AdapterError(f"module '{module}' has only lora_{next(iter(pair))}; both factors are needed")
    factor_a, factor_b = tensors[pair["A"]], tensors[pair["B"]]
    shapes = f"{factor_a.shape} and {factor_b.shape}"
    if len(factor_a.shape) != 2 or len(factor_b.shape) != 2 or factor_a.shape[0] != factor_b.shape[1] or 0 in factor_a.shape:
        raise AdapterError(f"factors of '{module}' have shapes {shapes}; expected (R, I) and (O, R)")
    for factor in (factor_a, factor_b):
        if factor.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise AdapterError(f"factors of '{module}' are stored as {factor.dtype}; only {known} are read, save it again in one of them")
    rank = factor_a.shape[0]
    if not unchecked and rank_of(config, module) != rank:
        raise AdapterError(f"{CONFIG_NAME} declares rank {rank_of(config, module)} for '{module}', the weights have rank {rank}")
    scaling = math.nan if unchecked else scaling_of(config, module, rank)
    dtype = DTYPES[factor_a.dtype][0] if factor_a.dtype == factor_b.dtype else "mixed"
    return ModuleHeader(pair["A"], pair["B"], rank, factor_a.shape[1], factor_b.shape[0], dtype, scaling)
