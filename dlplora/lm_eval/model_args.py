"""Strict parsing of ``--model_args`` of ``lm_eval --model dlplora``, and the model that they describe.

lm-eval turns ``key=value,key2=value2`` into keyword arguments, with numbers, booleans and bracketed lists already converted. Settings of
the method are dotted keys, ``method.threshold=0.3``, or one mapping, ``method_params={"threshold":0.3}``; folders of trained gates and
other artifacts are ``artifact.ROLE=FOLDER``; a list of experts is ``names=[a,b]`` or ``names=a+b``. lm-eval's own parsers do not support
mappings, so a text with braces is split here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from dlplora.config import build, check_keys, short
from dlplora.documents import parse_json
from dlplora.errors import ConfigError
from dlplora.lm_eval.harness_options import HARNESS_OPTIONS, parse_harness_options
from dlplora.tasks.registry import local_training_items, training_items

if TYPE_CHECKING:
    import torch

    from dlplora.inference.fused_model import FusedCausalLM

logger = logging.getLogger(__name__)

METHOD_PREFIX = "method."
ARTIFACT_PREFIX = "artifact."


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelArgs:
    """The model to evaluate. Without any argument: the embedded nano base model, its pool and router, method ``dlp``."""

    method: str = "dlp"
    """Name of a method configuration, or the path of a YAML file."""
    method_params: dict[str, Any] = field(default_factory=dict)
    """Settings that override the method file's."""
    pretrained: str | None = None
    """Folder, GGUF file, short name (``smollm2-135m``) or hub id of the base model."""
    pool: str | None = None
    """Folder of the adapters."""
    router: str | None = None
    """Folder of the trained router."""
    multitask: str | None = None
    """Folder of the adapter trained on all tasks, for the methods that need it."""
    trained: str | None = None
    """Folder of the method's own trained gates, as ``LitFusion`` exports it."""
    artifacts: dict[str, Any] = field(default_factory=dict)
    """Folders of other artifacts of a method, by role; given as ``artifact.ROLE=FOLDER``."""
    names: tuple[str, ...] | None = None
    """Experts to keep, in this order; None keeps the pool's."""
    backend: str = "auto"
    """Kernel backend."""
    dtype: str = "auto"
    """Type of base and adapter weights; ``auto`` takes the checkpoint's, or float32 on a CPU where that is slow."""
    device: str | None = None
    """Torch device. ``cuda`` becomes ``cpu`` where there is no CUDA device: lm-eval itself always passes ``cuda:0``."""
    revision: str | None = None
    """Revision of the base model on the hub."""
    seed: int = 0
    """Seed of methods that draw random numbers."""
    share_prefix: Literal["auto", "always", "never"] = "auto"
    """Whether the options of a question share one reading of their context. ``auto``: where the base model's cache allows it."""
    trust_remote_code: bool = False
    """Whether the base model's repository may run its own code."""
    load_in_4bit: bool = False
    """Load the base model in 4 bits with bitsandbytes."""
    load_in_8bit: bool = False
    """Load the base model in 8 bits with bitsandbytes."""
    bnb_4bit_quant_type: str = "nf4"
    """``nf4`` or ``fp4``."""
    bnb_4bit_compute_dtype: str | None = None
    """Dtype of 4-bit products; None takes ``dtype``."""
    bnb_4bit_use_double_quant: bool = False
    """Whether the scales of 4-bit blocks are quantised too."""
    attn_implementation: str | None = None
    """Attention of transformers; None leaves the choice to transformers."""

    def loading(self) -> dict[str, Any]:
        """Arguments of the base model's loader besides its name and dtype."""
        keys = ("revision", "trust_remote_code", "load_in_4bit", "load_in_8bit", "attn_implementation")
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name in keys or item.name.startswith("bnb_4bit_")}


def split_text(text: str) -> dict[str, Any]:
    """``key=value`` pairs, split at commas outside of brackets, braces and quotes.

    Mappings are read as JSON, everything else as lm-eval reads it. The whole text may also be one JSON object.

    Raises:
        ConfigError: If a pair has no ``=``, or a mapping is not JSON.
    """
    from lm_eval.utils import handle_arg_string

    if text.strip().startswith("{"):
        return _json_object(text.strip(), "a text in braces")
    pieces, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[({":
            depth += 1
        elif character in "])}":
            depth -= 1
        elif character == "," and depth == 0:
            pieces.append("")
            continue
        pieces[-1] += character
    found: dict[str, Any] = {}
    for piece in filter(None, map(str.strip, pieces)):
        key, sign, value = piece.partition("=")
        if not sign:
            raise ConfigError(f"--model_args: expected key=value, got {piece!r}.")
        found[key] = _json_object(value, f"'{key}'") if value.startswith("{") else handle_arg_string(value)
    return found


def _json_object(text: str, what: str) -> dict[str, Any]:
    try:
        value = parse_json(text, f"--model_args: {what}")
    except ConfigError as error:
        raise ConfigError(f"--model_args: {what} must be a JSON object with double quotes, got {text!r} ({error}).") from error
    if not isinstance(value, dict):
        raise ConfigError(f"--model_args: {what} must be a JSON object, got {text!r}.")
    return value


def with_mappings_as_json(arguments: Sequence[str]) -> list[str]:
    """A command line with braces in ``--model_args``; all of them become one JSON object, which lm-eval's parser reads.

    Raises:
        ConfigError: As ``split_text``.
    """
    result: list[str] = []
    position = 0
    while position < len(arguments):
        name, sign, value = arguments[position].partition("=")
        position += 1
        if name not in {"--model_args", "-a"}:
            result.append(arguments[position - 1])
            continue
        values = [value] if sign else []
        while not sign and position < len(arguments) and not arguments[position].startswith("-"):
            values.append(arguments[position])
            position += 1
        if any("{" in one for one in values):
            merged = {key: item for one in values for key, item in split_text(one).items()}
            values = [json.dumps(merged)]
        result += [name, *values]
    return result


def parse_model_args(values: Mapping[str, Any]) -> tuple[ModelArgs, dict[str, Any]]:
    """Split keyword arguments into the model's and the harness's.

    Args:
        values: Keyword arguments as lm-eval parsed them.

    Returns:
        The model's arguments, and the options of ``HARNESS_OPTIONS`` that were given.

    Raises:
        ConfigError: For an unknown key (with the nearest valid one) or a value of the wrong type.
    """
    harness = parse_harness_options(values)
    model: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    artifacts: dict[str, str] = {}
    for key, value in values.items():
        if key in HARNESS_OPTIONS or value is None:
            continue
        if key.startswith(METHOD_PREFIX):
            overrides[key.removeprefix(METHOD_PREFIX)] = value
        elif key.startswith(ARTIFACT_PREFIX):
            artifacts[key.removeprefix(ARTIFACT_PREFIX)] = str(value)
        else:
            model[key] = value
    known = [option.name for option in fields(ModelArgs) if option.name != "artifacts"]
    options = [*known, *HARNESS_OPTIONS, f"{METHOD_PREFIX}KEY", f"{ARTIFACT_PREFIX}ROLE"]
    check_keys({key: None for key in model if key not in {*known, "adapters"}}, options, "--model_args")
    model["method_params"] = _mapping(model.get("method_params")) | overrides
    model["artifacts"] = artifacts
    chosen = _chosen_names(model)
    if chosen is not None:
        model["names"] = chosen
    for key in ("method", "pretrained", "pool", "router", "multitask", "trained", "revision", "device", "dtype", "bnb_4bit_compute_dtype"):
        if key in model:
            model[key] = str(model[key]).removeprefix("torch.")  # lm-eval turns a folder named 42 into a number
    return build(ModelArgs, model, "--model_args"), harness


def _mapping(value: Any) -> dict[str, Any]:
    """``method_params`` as a mapping; text must be JSON."""
    if value is None:
        return {}
    if isinstance(value, str):
        value = parse_json(value, f"--model_args: method_params must be a JSON object, got {short(value)}")
    if not isinstance(value, Mapping):
        raise ConfigError(f"--model_args: method_params must map settings to values, got {value!r}.")
    return {str(key): setting for key, setting in value.items()}


def _chosen_names(model: dict[str, Any]) -> tuple[str, ...] | None:
    """``names`` (or its other name ``adapters``, removed from ``model``) as expert names in order."""
    other = model.pop("adapters", None)
    if other is not None and model.get("names") is not None:
        raise ConfigError("--model_args: names and adapters are the same option; give one of them.")
    value = other if other is not None else model.get("names")
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return tuple(str(name) for name in value)
    bare = str(value).strip().removeprefix("[").removesuffix("]").replace(",", "+")
    names = tuple(name.strip().strip("\"'") for name in bare.split("+"))
    if not all(names):
        raise ConfigError(f"--model_args: names must be experts joined by '+', like names=alpha+beta, got {value!r}.")
    return names


def load_model(args: ModelArgs, device: torch.device) -> FusedCausalLM:
    """The model that the arguments describe. An lm-eval that the tests do not cover is warned about; it may still work."""
    from dlplora.inference.fused_model import FusedCausalLM
    from dlplora.lm_eval.versions import untested_version

    note = untested_version()
    if note is not None:
        logger.warning(note)
    return FusedCausalLM.from_pretrained(
        args.pretrained,
        pool=args.pool,
        method=args.method,
        router=args.router,
        multitask=args.multitask,
        method_params=args.method_params or None,
        artifacts=args.artifacts | ({"trained": args.trained} if args.trained else {}),
        dtype=args.dtype,
        device=device,
        backend=args.backend,
        **args.loading(),
        names=args.names,
        seed=args.seed,
        few_shot=training_items("nano") if args.pool is None else local_training_items(),  # nano's rows belong to its own pool
    )
