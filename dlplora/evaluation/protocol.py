"""Evaluation protocols: all settings that must be equal for two methods to be comparable. They contain nothing about a method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dlplora.config import OMIT_DEFAULT_FROM_HASH, build, config_hash, find_config, load_yaml
from dlplora.errors import ConfigError, TaskError
from dlplora.tasks.composite import not_drawable
from dlplora.tasks.registry import GENERATED, get_suite

RETIRED: Mapping[str, int] = {"latency_prompt_tokens": 32, "latency_new_tokens": 24, "latency_repeats": 9}
"""Settings of a latency measurement that an evaluation no longer makes (``dlplora bench latency`` does), with their defaults. They have no
effect, but stay in the hash with the values they had: a record's cell contains the hash of its protocol, and without them no record made
before would be recognised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Settings shared by all methods of a table."""

    suite: str = "nano"
    """Suite of tasks; their lm-eval names are ``dlplora_<suite>_<task>``."""
    data_root: str | None = None
    """Folder of the rows of a ``local:`` suite; null reads ``DLPLORA_DATA``. Records name the rows by checksum, not by place."""
    tasks: list[str] | None = None
    """Tasks of the suite; null takes all of them. A table is made from complete suites only."""
    backbone: str | None = None
    """Model folder or hub id; null is the embedded nano base model."""
    revision: str | None = None
    """Revision of a hub id: branch, tag or commit; null is the default branch. Records keep the commit that was loaded."""
    dtype: str = "float32"
    """Dtype of base model and bank."""
    load_in_4bit: bool = dataclasses.field(default=False, metadata=OMIT_DEFAULT_FROM_HASH)
    """Load the base model in 4 bits (NF4, bitsandbytes); products and bank keep ``dtype``."""
    load_in_8bit: bool = dataclasses.field(default=False, metadata=OMIT_DEFAULT_FROM_HASH)
    """Load the base model in 8 bits (bitsandbytes)."""
    attn_implementation: str | None = dataclasses.field(default=None, metadata=OMIT_DEFAULT_FROM_HASH)
    """Attention of transformers: ``eager``, ``sdpa`` or ``flash_attention_2``; null leaves the choice to transformers."""
    trust_remote_code: bool = dataclasses.field(default=False, metadata=OMIT_DEFAULT_FROM_HASH)
    """Whether Python code of the base model's repository may run."""
    split: Literal["test", "validation"] = dataclasses.field(default="test", metadata=OMIT_DEFAULT_FROM_HASH)
    """Questions that are asked. ``validation`` is for the choice of settings (``dlplora tune``); its records are in no table."""
    num_fewshot: int = 0
    """Worked examples in each prompt."""
    batch_size: int = 64
    """Rows per forward pass; fixed, because reduced-precision results depend on it."""
    max_length: int | None = None
    """Context in tokens; null takes the base model's."""
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    """Seeds a complete table needs."""
    bootstrap_iters: int = 1000
    """Resamples for the standard error of BLEU."""
    apply_chat_template: bool = False
    """Wrap prompts in the tokenizer's chat template."""
    retired: dict[str, int] = dataclasses.field(default_factory=lambda: dict(RETIRED))
    """Values of the keys of ``RETIRED``, from files that still name them; only the hash reads them."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "bootstrap_iters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"'{name}' must be at least 1, got {getattr(self, name)}.")
        if self.num_fewshot < 0:
            raise ConfigError(f"'num_fewshot' cannot be negative, got {self.num_fewshot}.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("'load_in_4bit' and 'load_in_8bit' exclude each other; give one of them.")
        if not self.seeds:
            raise ConfigError("'seeds' must name at least one seed.")

    def resolved(self) -> dict[str, Any]:
        """All settings that have an effect as plain values; those added later only where they differ from their default."""
        later = {item.name: item.default for item in dataclasses.fields(self) if item.metadata == OMIT_DEFAULT_FROM_HASH}
        values = dataclasses.asdict(self)
        del values["retired"]
        return {key: value for key, value in values.items() if key not in later or value != later[key]}

    def hash(self) -> str:
        """Hash of the settings that decide a run and of the retired ones, without the list of seeds and the place of the rows."""
        values = {**self.resolved(), **self.retired}
        return config_hash({key: value for key, value in values.items() if key not in {"seeds", "data_root"}})

    def loading(self) -> dict[str, Any]:
        """Arguments of the base model's loader besides its name and dtype."""
        keys = ("revision", "load_in_4bit", "load_in_8bit", "attn_implementation", "trust_remote_code")
        return {key: getattr(self, key) for key in keys}


def load_protocol(name: str, overrides: Mapping[str, Any] | None = None) -> Protocol:
    """A protocol by name or path, with overrides for single runs.

    Raises:
        ConfigError: If it is unknown, or holds a key that no protocol has.
    """
    path = find_config("protocol", name)
    values = load_yaml(path)
    if "method" in values:
        raise ConfigError(f"{path}: 'method' is not a protocol key; a protocol is the same for all methods. Pass --method.")
    given = dict(overrides or {})
    if given.get("backbone", values.get("backbone")) != values.get("backbone"):
        given.setdefault("revision", None)  # the file's commit is one of the file's base model
    return build(Protocol, _with_retired({**values, **given}, str(path)), str(path))


def _with_retired(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values with the retired keys moved to where only the hash finds them.

    Raises:
        ConfigError: If one of them is not a whole number.
    """
    kept = {key: value for key, value in values.items() if key not in RETIRED}
    old = {key: value for key, value in values.items() if key in RETIRED}
    for key, value in old.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{where}: '{key}' must be int, got {value!r}. It has no effect any more; leave it out.")
    return {**kept, "retired": {**RETIRED, **old}}


def require_rows_read(suite: str, data_root: str | None) -> None:
    """Refuse a folder of rows for a suite that is generated: its questions would be asked instead of the user's.

    Raises:
        ConfigError: Naming the suites that read the folder.
    """
    if data_root is not None and suite in GENERATED:
        raise ConfigError(
            f"the data root {data_root} is not read: suite '{suite}' is generated. Name the suite: local:all or local:TASK,TASK."
        )


def fitted_to_suite(protocol: Protocol) -> tuple[Protocol, list[str]]:
    """A protocol with a list of composites for another suite, reduced to those for which its own suite has enough tasks.

    Returns:
        The protocol, and what was left out of its tasks; the record lists those that stayed.

    Raises:
        TaskError: If none stays, or the suite cannot be read.
    """
    named = protocol.tasks or []
    left_out = not_drawable(get_suite(protocol.suite, protocol.data_root), named)
    if not left_out:
        return protocol, []
    kept = [name for name in named if name not in left_out]
    if not kept:
        raise TaskError(f"suite '{protocol.suite}' has too few tasks with rows for {', '.join(left_out)}; name others with --tasks.")
    return dataclasses.replace(protocol, tasks=kept), left_out
