"""Read ``adapter_config.json``: which PEFT settings the bank supports and which it refuses. No deep-learning package is imported.

Settings are checked against an allow-list. A key is accepted if its effect is known (it scales, it selects modules, or it only mattered
during training), if its value is empty, or if its value is the default of the installed PEFT. Any other key may change the computation,
so the adapter is refused and the error names the key. Settings that a later PEFT adds are therefore never ignored.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from dlplora.adapters.targets import pattern_problem, target_problems, timed_match
from dlplora.config import short
from dlplora.documents import is_unicode, read_json
from dlplora.errors import AdapterError

CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

UNDERSTOOD = frozenset(
    "r lora_alpha use_rslora rank_pattern alpha_pattern".split()  # the scaling of each module
    + "target_modules exclude_modules layers_to_transform layers_pattern".split()  # must agree with the weights (``targets``)
    + "fan_in_fan_out".split()  # the layout of the base model's weights
    + "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode".split()  # facts
    + "lora_dropout init_lora_weights eva_config corda_config lora_ga_config loftq_config runtime_config".split()  # training only
    + "megatron_core qalora_group_size ensure_weight_tying bias".split()  # nothing without a key that is checked below
)
UNSUPPORTED = {
    "use_dora": "DoRA scales by the norm of the merged weight, which is not a sum of deltas",
    "modules_to_save": "fully trained modules are not low-rank deltas",
    "lora_bias": "biases on the LoRA matrices are not part of the bank",
    "trainable_token_indices": "trained token embeddings are not low-rank deltas",
    "target_parameters": "LoRA on bare parameters is not supported",
    "layer_replication": "replicated layers change the base model",
    "megatron_config": "Megatron layers are not supported",
    "alora_invocation_tokens": "activated LoRA switches by token",
    "arrow_config": "an Arrow router is not an adapter",
    "use_qalora": "QA-LoRA pools the input in groups",
    "use_bdlora": "block-diagonal factors are stored in another form",
    "kasa_config": "KaSA puts singular values between the factors",
    "monteclora_config": "MonteCLoRA draws its factors at random",
    "velora_config": "VeLoRA layers have a forward of their own",
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Initialisations that subtract the first factors from the base model's weights (or, MiCA, replace the layer's forward)."""

MAX_CONFIG_BYTES = 10_000_000
_LARGEST_SCALE = 3e38
"""About the largest float32: no product with a larger number is finite."""
_PLAIN_PATTERN = re.compile(r"[\w.-]+")
_STORAGE = re.compile(r"[-_.](unsloth|bnb|4bit|8bit|gptq|awq|int4|int8|fp8|bf16|fp16|hf)\b")
"""Storage suffixes in a model's name; they mark another format of the same base model."""


def base_name(config: Mapping[str, Any]) -> str | None:
    """The base model the adapter names, None where it names none."""
    value = config.get("base_model_name_or_path")
    return str(value) if value else None


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The adapter's configuration, refused if it asks for something the bank cannot fuse exactly.

    Raises:
        AdapterError: If the file is missing, is not JSON, or names an unsupported feature.
    """
    config = load_config(folder, name)
    for problem in config_problems(config):
        raise AdapterError(f"adapter '{name}': {problem} ({folder / CONFIG_NAME}).")
    return config


def load_config(folder: Path, name: str) -> dict[str, Any]:
    """The adapter's configuration as it is written.

    Raises:
        AdapterError: If the file is missing or is not a JSON object.
    """
    path = folder / CONFIG_NAME
    if not is_unicode(str(folder)):  # safetensors opens no such file
        raise AdapterError(f"adapter '{name}': the path {folder} is not UTF-8; rename it.")
    if not folder.is_dir():
        raise AdapterError(f"adapter '{name}': folder not found: {folder}.")
    if not path.is_file():
        raise AdapterError(f"adapter '{name}': {CONFIG_NAME} is missing in {folder}; expected a PEFT LoRA folder.")
    try:
        return read_json(path, error=AdapterError, max_bytes=MAX_CONFIG_BYTES)
    except AdapterError as error:
        raise AdapterError(f"adapter '{name}': {error}") from error


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Why the bank cannot fuse an adapter with this configuration, one line each; empty if it can."""
    if config.get("peft_type") != "LORA":
        return [f"peft_type is {config.get('peft_type')!r}, only 'LORA' can be fused"]
    advice = "Train it without, or merge it into the base model"
    found = [f"'{key}' is set; {reason}. {advice}" for key, reason in UNSUPPORTED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append(f"bias is {config['bias']!r}; only adapters with bias='none' can be fused")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        found.append(
            f"init_lora_weights is {start!r}, which changes the base model's own weights; save it again as a plain LoRA with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    found += _type_problems(config) + _number_problems(config) + target_problems(config)
    unknown = [key for key, value in config.items() if key not in UNDERSTOOD and key not in UNSUPPORTED and value not in _EMPTY]
    found += [
        f"'{key}' is set to {config[key]!r}, a setting that this version does not know and that may change the result. {advice}"
        for key in unknown
        if not _is_pefts_default(key, config[key])
    ]
    return found


_EMPTY: tuple[Any, ...] = (None, False, {}, [], "", "none")


_TYPES: dict[str, tuple[type, ...]] = {
    "use_rslora": (bool,),
    "base_model_name_or_path": (str,),
    "init_lora_weights": (bool, str),
    "bias": (str,),
}
"""Types of the settings that are used; null means that it is not set."""


def _type_problems(config: Mapping[str, Any]) -> list[str]:
    return [
        f"'{key}' must be {' or '.join(one.__name__ for one in kinds)}, got {short(config[key])}"
        for key, kinds in _TYPES.items()
        if config.get(key) is not None and not isinstance(config[key], kinds)
    ]


def _number_problems(config: Mapping[str, Any]) -> list[str]:
    found = []
    if not _whole(config.get("r")):
        found.append(f"'r' must be a positive number, a whole one, got {config.get('r')!r}")
    if not _positive(config.get("lora_alpha")):
        found.append(f"'lora_alpha' must be a positive number, got {config.get('lora_alpha')!r}")
    for key, fits, kind in (("rank_pattern", _whole, "positive whole"), ("alpha_pattern", _positive, "positive")):
        pattern = config.get(key) or {}
        if not isinstance(pattern, Mapping):
            found.append(f"'{key}' must map module names to numbers, got {type(pattern).__name__}")
            continue
        for module, value in pattern.items():
            if (problem := pattern_problem(key, module)) is not None:
                found.append(problem)
            if not fits(value):
                found.append(f"'{key}' gives '{module}' the value {value!r}; expected a {kind} number")
    return found


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _LARGEST_SCALE


def _whole(value: Any) -> bool:
    return _positive(value) and value == int(value)


def _is_pefts_default(key: str, value: Any) -> bool:
    """Whether the installed PEFT has this key with this default; asked only about keys that are not known here."""
    import dataclasses

    from peft import LoraConfig

    for field in dataclasses.fields(LoraConfig):
        if field.name == key:
            return field.default is not dataclasses.MISSING and bool(field.default == value)
    return False


def pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module path, at a dot, wins.

    Raises:
        AdapterError: If matching a pattern takes too long; it may have been written to never end.
    """
    for key, value in (pattern or {}).items():
        if _matches(key, module):
            return value
    return default


@lru_cache(maxsize=100_000)
def _matches(pattern: str, module: str) -> bool:
    rule = rf"(.*\.)?({pattern})$"
    if _PLAIN_PATTERN.fullmatch(pattern):  # a module's name or path, which is what nearly all patterns are
        return re.match(rule, module) is not None
    return timed_match(rule, module, pattern) is not None


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What the delta of a module is multiplied by: alpha / R, or alpha / sqrt(R) with rsLoRA; R is the module's own rank."""
    alpha = float(pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank that the configuration declares for a module."""
    return int(pattern_value(config.get("rank_pattern"), module, config["r"]))


def same_base(first: str | None, second: str | None) -> bool:
    """Whether two names may mean one base model; a missing name fits any, and so does the path of a local folder.

    The last parts are compared, without case and without storage suffixes: ``unsloth/llama-3-8b-bnb-4bit`` and
    ``org/Llama-3-8B`` are one.
    """

    one, other = _bare(first), _bare(second)
    return one is None or other is None or one == other


def other_bases(bases: Mapping[str, str | None]) -> tuple[str, dict[str, str]]:
    """The base model that most adapters name, and the adapters (name -> base) that name another one.

    Args:
        bases: Adapter -> the base model that it names.
    """
    named = {name: str(base) for name, base in bases.items() if _bare(base) is not None}
    if not named:
        return "", {}
    most = Counter(map(_bare, named.values())).most_common(1)[0][0]
    common = next(base for base in named.values() if _bare(base) == most)
    return common, {name: base for name, base in named.items() if _bare(base) != most}


def _bare(name: str | None) -> str | None:
    """What is compared of a base model's name; None of a missing one and of a path, which say nothing."""
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        return None
    return _STORAGE.sub("", name.rsplit("/", 1)[-1].lower())
