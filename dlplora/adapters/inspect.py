"""Inspect hundreds of adapter folders without loading them. No deep-learning package is imported.

Configurations and safetensors headers are read, and B factors until one is found that is not all zero (usually the first).
``dlplora pool check`` also checks that values are finite and that the base model has the modules.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dlplora.adapters.config import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, base_name, other_bases
from dlplora.adapters.headers import DTYPES, AdapterHeader, ModuleHeader, examine
from dlplora.errors import PoolError

MAX_DEPTH = 3
"""Folders below the one given: a Trainer's output has its adapters in ``RUN/checkpoint-500``."""
PADDING_HINT = 4
"""Ratio to the median rank above which an adapter's cost to the others is reported."""


@dataclass(slots=True)
class Finding:
    """One adapter folder. ``None`` where a fact cannot be read; ``zero_b`` is true if every B factor is all zero.

    ``num_bytes`` is the size of the weights file, ``bank_bytes`` what the adapter's factors take in a float32 bank without padding.
    """

    name: str
    rank: str | None = None
    alpha: float | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    targets: tuple[str, ...] = ()
    num_modules: int = 0
    base: str | None = None
    zero_b: bool | None = None
    dtype: str | None = None
    num_bytes: int | None = None
    bank_bytes: int | None = None
    usable: bool = False
    hints: list[str] = field(default_factory=list)
    header: AdapterHeader | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """All findings of a folder, sorted by name.

    ``bank_bytes`` is the size of one float32 bank of all usable adapters of the most common base model, padding included;
    ``padding_bytes`` is the part of it that is padding.
    """

    findings: tuple[Finding, ...]
    bank_adapters: int
    bank_bytes: int
    padding_bytes: int


def adapter_folders(root: Path) -> Iterator[tuple[str, Path]]:
    """Names (paths below ``root``) and folders that hold an adapter or pickled adapter weights, sorted; hidden folders are left out."""

    def walk(folder: Path, name: str, depth: int) -> Iterator[tuple[str, Path]]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            yield name, folder  # the finding says why
            return
        if {entry.name for entry in entries} & {CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME}:
            yield name or folder.resolve().name, folder
        for entry in entries:
            if depth < MAX_DEPTH and not entry.name.startswith(".") and entry.is_dir():
                yield from walk(Path(entry.path), f"{name}/{entry.name}".lstrip("/"), depth + 1)

    return walk(root, "", 0)


def inspect_folder(root: str | Path) -> Inspection:
    """Read the headers of every adapter below a folder.

    Raises:
        PoolError: If the folder does not exist or has no adapter.
    """
    root = Path(root)
    if not root.is_dir():
        raise PoolError(f"folder not found: {root}.")
    findings = [inspect_adapter(name, folder) for name, folder in adapter_folders(root)]
    if not findings:
        raise PoolError(f"no PEFT LoRA folders (with {CONFIG_NAME}) in {root} or up to {MAX_DEPTH} folders below it.")
    usable = [finding for finding in findings if finding.usable]
    _compare_bases(usable)
    _compare_sizes(usable)
    together = [finding for finding in usable if finding.usable]
    _point_out_padding(together)
    total, padding = bank_bytes([finding.header for finding in together if finding.header is not None])
    return Inspection(tuple(findings), len(together), total, padding)


def inspect_adapter(name: str, folder: Path) -> Finding:
    """What configuration and header of one adapter say."""
    try:
        header, problems = examine(folder, name)
    except OSError as error:
        return Finding(name, hints=[f"cannot be read: {error.strerror}: {error.filename}"])
    prefix = f"adapter '{name}': "
    finding = Finding(name, usable=not problems, hints=[str(problem).removeprefix(prefix) for problem in problems], header=header)
    if (folder / WEIGHTS_NAME).is_file():
        finding.num_bytes = (folder / WEIGHTS_NAME).stat().st_size
    if header is None:
        return finding
    config, modules = header.config, header.modules
    finding.base = base_name(config)
    finding.alpha = config.get("lora_alpha")
    finding.use_rslora, finding.use_dora = bool(config.get("use_rslora")), bool(config.get("use_dora"))
    finding.targets, finding.num_modules = header.targets, len(modules)
    ranks = sorted({module.rank for module in modules.values()})
    finding.rank = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0] if ranks else config.get("r"))
    dtypes = {module.dtype for module in modules.values()}
    finding.dtype = dtypes.pop() if len(dtypes) == 1 else "mixed" if dtypes else None
    finding.bank_bytes = sum(4 * module.rank * (module.d_in + module.d_out) for module in modules.values()) or None
    if modules:
        finding.zero_b = _all_zero(header)
    if finding.zero_b:
        finding.hints.append("every B factor is zero, so the adapter changes nothing: it was never trained, or saved before its training")
    if header.wrappers:
        names = ", ".join(f"'{name}.'" for name in header.wrappers)
        finding.hints.append(f"saved from a wrapped model: its keys hold {names}, which is left out here; PEFT would load none of them")
    absent = _targets_without_weights(config.get("target_modules"), header)
    if absent and modules and not problems:
        finding.hints.append(f"target_modules names {', '.join(absent)}, but there are no such weights; ignored, as PEFT does")
    return finding


def _targets_without_weights(named: object, header: AdapterHeader) -> list[str]:
    if not isinstance(named, Sequence) or isinstance(named, str):
        return []
    return [str(target) for target in named if not any(path == target or path.endswith(f".{target}") for path in header.modules)]


def _all_zero(header: AdapterHeader) -> bool:
    """Whether all B factors are zero (+0 or -0); reading stops at the first that is not."""
    import numpy as np

    path = header.path / WEIGHTS_NAME
    with path.open("rb") as handle:
        for module in header.modules.values():
            tensor = header.tensors[module.key_b]
            width = DTYPES[tensor.dtype][1]
            handle.seek(tensor.start)
            raw = np.frombuffer(handle.read(tensor.end - tensor.start), dtype=f"<u{width}")
            if np.any(raw & raw.dtype.type((1 << (8 * width - 1)) - 1)):
                return False
    return True


def _compare_bases(findings: Sequence[Finding]) -> None:
    """Leave out adapters that name another base model than most do."""
    common, others = other_bases({finding.name: finding.base for finding in findings})
    for finding in findings:
        if finding.name in others:
            finding.usable = False
            finding.hints.append(f"trained on {finding.base}, most here on {common}: a pool has one base model")


def _compare_sizes(findings: Sequence[Finding]) -> None:
    """Leave out adapters with module sizes that differ from those of most adapters."""
    sizes: dict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
    fitting = [finding for finding in findings if finding.usable and finding.header is not None]
    for finding in fitting:
        assert finding.header is not None
        for path, size in finding.header.sizes.items():
            sizes[path][size] += 1
    for finding in fitting:
        assert finding.header is not None
        for path, size in finding.header.sizes.items():
            expected = sizes[path].most_common(1)[0][0]
            if size != expected:
                finding.usable = False
                finding.hints.append(f"{path} maps {size[0]} -> {size[1]}, most here {expected[0]} -> {expected[1]}: another base model")
                break


def _point_out_padding(findings: Sequence[Finding]) -> None:
    ranks = sorted(max(module.rank for module in finding.header.modules.values()) for finding in findings if finding.header)
    if not ranks:
        return
    median = ranks[len(ranks) // 2]
    for finding in findings:
        assert finding.header is not None
        mine = max(module.rank for module in finding.header.modules.values())
        if mine >= PADDING_HINT * median:
            finding.hints.append(f"rank {mine} (median {median}): the bank pads every other adapter to it, module by module")


def bank_bytes(headers: Sequence[AdapterHeader]) -> tuple[int, int]:
    """Bytes of a float32 bank of these adapters, and how many of them are padding.

    The bank holds, for each module that any adapter adapts, all E experts at the largest rank there.
    """
    modules: dict[str, list[ModuleHeader]] = defaultdict(list)
    for header in headers:
        for path, module in header.modules.items():
            modules[path].append(module)
    total = used = 0
    for experts in modules.values():
        width = 4 * (experts[0].d_in + experts[0].d_out)
        total += width * max(module.rank for module in experts) * len(headers)
        used += width * sum(module.rank for module in experts)
    return total, total - used
