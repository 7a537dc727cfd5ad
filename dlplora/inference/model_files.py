"""One-line errors for damaged files of a base model, and checks of settings that transformers reads unchecked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dlplora.adapters.hub import hub_failure
from dlplora.errors import ConfigError, DLPLoRAError
from dlplora.inference.backbones import near_name

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
MAX_JSON_BYTES = 128_000_000
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
MAX_LAYERS = 10_000
"""Most layers of a base model. Making a model takes time for every layer, before absent weights are noticed."""
_SWITCHES = ("do_sample", "use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits", "renormalize_logits")


class ReadingModel:
    """A block that reads the files of a base model. What a file can cause becomes a ``ConfigError``.

    A wrong type in ``config.json`` or ``tokenizer.json`` surfaces as almost any exception; tokenizers raises ``Exception`` itself.

    Args:
        source: Model folder or hub id.
        revision: Of a hub id.
    """

    def __init__(self, source: str, revision: str | None = None) -> None:
        self.source, self.revision = source, revision

    def __enter__(self) -> ReadingModel:
        for path in Path(self.source).glob("*.json"):  # transformers reads them completely, without a size limit
            if path.exists() and (not path.is_file() or path.stat().st_size > MAX_JSON_BYTES):
                raise ConfigError(f"base model '{self.source}': {path.name} is not a file, or longer than {MAX_JSON_BYTES:,} bytes.")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception) or isinstance(error, (DLPLoRAError, MemoryError)):
            return
        if kind is Exception or isinstance(error, _causes()):
            raise ConfigError(_why_not(self.source, self.revision, error)) from error


def _causes() -> tuple[type[Exception], ...]:
    """Exceptions that the content of a file can cause."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    builtin = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, ArithmeticError, AssertionError, RuntimeError)
    return (*builtin, SafetensorError, StrictDataclassError)


def _why_not(source: str, revision: str | None, error: Exception) -> str:
    """One line for what transformers says over several."""
    from huggingface_hub import constants

    text = str(error).strip()
    reason = _reason(error)
    if "trust_remote_code" in text:
        return (
            f"base model '{source}' brings Python code of its own (auto_map in config.json), which is not run unless asked for: "
            "pass trust_remote_code=True if you trust its author, or a model of an architecture that transformers knows."
        )
    if Path(source).is_dir():
        return f"cannot load base model '{source}': {reason}"
    if isinstance(error, OSError):
        looked = hub_failure(source, revision, constants.HF_HUB_OFFLINE, reason)
        return (
            f"cannot load base model '{source}': there is no such folder, and {looked}{near_name(source)} "
            f"Pass a local model folder, or fetch it once with a connection: hf download {source}."
        )
    return f"cannot load base model '{source}': {reason}"


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if "ignore_mismatched_sizes" in text:
        return "its weights do not have the sizes that config.json asks for."
    first = " ".join(text.split("\n")[:2]) if text.startswith("Validation error") else text.split("\n")[0]
    named = f"{type(error).__name__}: {first}" if isinstance(error, (LookupError, AttributeError, TypeError, AssertionError)) else first
    return (named or type(error).__name__)[:400]


def check_sizes(config: Mapping[str, Any], source: str) -> None:
    """Refuse a ``config.json`` that asks for more layers than any model has, before they are made.

    Raises:
        ConfigError: Naming the key.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for name in _LAYERS:
            value = part.get(name)
            if isinstance(value, (int, float)) and not value <= MAX_LAYERS:
                raise ConfigError(f"base model '{source}': '{name}' in config.json is {value!r:.40}; at most {MAX_LAYERS} layers are made.")


def check_settings(model: Any, tokenizer: Any, source: str) -> None:
    """Check what ``generation_config.json`` and ``tokenizer_config.json`` may hold in any type: token ids, switches and a length.

    Raises:
        ConfigError: Naming file and key.
    """
    found = getattr(model, "generation_config", None)
    for name in _TOKENS:
        value = getattr(found, name, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(one, int) or isinstance(one, bool) or abs(one) >= 2**63 for one in ids):
            raise ConfigError(f"base model '{source}': '{name}' of its generation settings must be a token id, got {value!r:.60}.")
    for name in _SWITCHES:
        value = getattr(found, name, None)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"base model '{source}': '{name}' of its generation settings must be true or false, got {value!r:.60}.")
    length = tokenizer.model_max_length
    if not isinstance(length, (int, float)) or isinstance(length, bool) or not length >= 1:
        raise ConfigError(
            f"base model '{source}': 'model_max_length' in tokenizer_config.json must be a number of tokens, got {length!r:.60}."
        )
