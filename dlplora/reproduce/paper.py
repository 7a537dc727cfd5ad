"""A comparison on one base model: ``dlplora reproduce paper --backbone NAME``, ``reproduce real``, ``nano_linear``, ``confusable``.

A profile (``configs/reproduce``) names the protocol, the base model and the budgets. A hub id is resolved once to a folder of the cache, so
that training and evaluation use the same weights.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlplora.config import config_label, configs_root, load_yaml
from dlplora.errors import ConfigError, TaskError, nearest
from dlplora.evaluation.protocol import Protocol, load_protocol
from dlplora.inference.backbones import NAMED, is_local_name, resolve_backbone
from dlplora.inference.shapes import ModelShape, find_shape
from dlplora.methods.registry import available_presets
from dlplora.reporting.columns import REFERENCE_ROWS
from dlplora.reproduce import artifacts, estimate
from dlplora.reproduce.pipeline import ReproduceJob, make_job, roles_of
from dlplora.reproduce.profile import Profile, load_profile
from dlplora.reproduce.recipe import Setting, kind_of
from dlplora.reproduce.training import train
from dlplora.tasks.local import ENV_ROOT
from dlplora.tasks.registry import get_suite, suite_names

CONFIGS = {
    "backbone": "paper_backbone",
    "pool": "paper_experts",
    "multitask": "paper_multitask",
    "router": "paper_router",
    "router_paper5m": "paper_router",
    "trained": "paper_fusion",
}
"""Kind of role -> training configuration."""
RANKS = {"multitask_r64": 64, "multitask_r208": 208}
"""Adapters on all tasks of other ranks; otherwise they are trained as ``multitask`` is, with alpha twice the rank."""


RECIPE_TASKS = 26
"""Tasks that the recipes of adapters on all tasks were written for."""
STEPS = "--data.init_args.num_steps="


def resolved_backbone(source: str, revision: str | None) -> tuple[str, str | None]:
    """The folder of a base model, and its commit if it is a hub id; a folder wins.

    Raises:
        ConfigError: If it is neither here, nor in the cache, nor reachable.
    """
    if is_local_name(source):
        return resolve_backbone(source), None
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from requests.exceptions import RequestException

    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.model"]
    try:
        found = snapshot_download(source, revision=revision, allow_patterns=wanted)
    except (LocalEntryNotFoundError, HfHubHTTPError, RequestException, OSError) as error:
        state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else str(error).splitlines()[0]
        raise ConfigError(
            f"base model '{source}' (revision {revision or 'newest'}) is no folder, not in {constants.HF_HUB_CACHE}, and {state}. "
            "Run once with a connection (unset HF_HUB_OFFLINE), or pass --backbone FOLDER."
        ) from error
    return found, Path(found).name


@dataclass(frozen=True, kw_only=True)
class PaperJob:
    """A comparison on one base model, resolved as far as is possible before anything is trained."""

    name: str
    profile: Profile
    protocol: Protocol
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: Path
    """Folder of the artifacts."""

    @property
    def protocol_name(self) -> str:
        """Of the records: one protocol over several base models is as many protocols."""
        stem = config_label(self.profile.protocol)
        own = stem == self.name or stem.startswith(f"{self.name}_")
        return stem if own or self.profile.train_backbone else f"{stem}_{self.name}"

    @property
    def setting(self) -> Setting:
        """Tasks and options, without a base model yet."""
        configs = {**CONFIGS, **self.profile.configs}
        multitask = self._multitask()
        return Setting(
            suite=self.protocol.suite,
            data_root=None if self.protocol.data_root is None else str(Path(self.protocol.data_root).resolve()),
            tasks=None if self.protocol.tasks is None else tuple(self.protocol.tasks),
            configs={**configs, **dict.fromkeys(RANKS, configs["multitask"])},
            options={
                **self.profile.fit_options,
                "multitask": multitask,
                **{role: [*multitask, *_ranked(role, rank)] for role, rank in RANKS.items()},
                "router_paper5m": self._with_table(),
            },
            processes=self.profile.processes,
        )

    def _multitask(self) -> list[str]:
        """Options of the adapter on all tasks. Over fewer tasks than its recipe was written for it sees fewer rows, as the experts do."""
        given = self.profile.fit_options.get("multitask", [])
        count = len(self.protocol.tasks or suite_names(self.protocol.suite))
        if count >= RECIPE_TASKS or any(option.startswith(STEPS) for option in given):
            return given
        recipe = load_yaml(configs_root() / "train" / f"{self.profile.configs.get('multitask', CONFIGS['multitask'])}.yaml")
        return [*given, f"{STEPS}{round(recipe['data']['init_args']['num_steps'] * count / RECIPE_TASKS)}"]

    def _with_table(self) -> list[str]:
        """The router's options, and an embedding table of its own."""
        return [*self.profile.fit_options.get("router", ()), "--model.init_args.router.variant=table"]

    def backbone_artifact(self) -> artifacts.Artifact | None:
        """The base model that is pretrained here, or None if it comes from elsewhere."""
        return artifacts.locate("backbone", self.runs, fresh=False, setting=self.setting) if self.profile.train_backbone else None

    def over(self, folder: str, commit: str | None) -> tuple[Protocol, Setting]:
        """The same over a base model that is there."""
        if self.profile.backbone is None and not self.profile.train_backbone:
            return self.protocol, self.setting
        named = str(self.profile.backbone)
        label = self.name if commit is None else named
        # Hashes and records hold a short name rather than the folder that it stands for on this machine.
        backbone = named if named in NAMED else folder if commit is None else label
        base = NAMED[named].hub_id if named in NAMED else label
        return dataclasses.replace(self.protocol, backbone=backbone, revision=commit), dataclasses.replace(
            self.setting, backbone=folder, base_model_name=base
        )


def _ranked(name: str, rank: int) -> list[str]:
    """Options of an adapter of another rank."""
    settings = {"lora.rank": rank, "lora.lora_alpha": 2 * rank, "adapter_name": name}
    return [f"--model.init_args.{key}={value}" for key, value in settings.items()]


def resolve(
    backbone: str,
    overrides: Mapping[str, Any],
    methods: Sequence[str] | None,
    seeds: Sequence[int] | None,
    runs: Path | None,
    *,
    also: Sequence[str] = (),
) -> PaperJob:
    """Check every name before anything starts.

    Args:
        backbone: Name of a profile, folder, or hub id.
        overrides: Of the protocol: ``tasks``, ``data_root``.
        methods: Methods; None takes the profile's.
        seeds: Seeds; None takes the protocol's.
        runs: Folder of artifacts; None is ``runs/paper/NAME``, or ``runs/PROTOCOL`` of a profile with a suite of its own.
        also: Further names that the caller knows, for the error about an unknown one.

    Raises:
        DLPLoRAError: For an unknown base model, method or task, or rows that are missing or malformed.
    """
    name, profile = load_profile(backbone, also)
    protocol = load_protocol(profile.protocol, overrides)
    if profile.without_rows is not None and not has_rows(protocol) and not _hub_answers(protocol):
        profile = dataclasses.replace(profile, protocol=profile.without_rows)
        protocol = load_protocol(profile.protocol, overrides)
    chosen = list(methods or profile.methods)
    if chosen == ["all"]:
        chosen = list(dict.fromkeys([*REFERENCE_ROWS, *available_presets()]))
    roles_of(chosen)
    _require_tasks(protocol)
    job = PaperJob(
        name=name,
        profile=profile,
        protocol=protocol,
        methods=tuple(chosen),
        seeds=tuple(seeds if seeds is not None else protocol.seeds),
        runs=runs or (Path("runs") / config_label(profile.protocol) if profile.configs else Path("runs") / "paper" / name),
    )
    for role in roles_of(chosen):
        artifacts.config_path(role, job.setting)
    return job


def announced(job: PaperJob) -> Iterator[str]:
    """What will be done and what it needs; reads rows if they lie here, loads no weights."""
    artifact = job.backbone_artifact()
    source = job.profile.backbone
    if artifact is not None:
        yield f"base model: {artifact.source} ({artifact.folder})"
        source = str(artifact.folder) if artifact.ready else None
    else:
        here = source is None or is_local_name(source)
        yield f"base model: {source or 'nano'}" + ("" if here else f" (revision {job.profile.revision or 'newest; the records say which'})")
        source = resolve_backbone(source) if here else source
    if artifact is None or artifact.ready:
        known = source is not None and Path(source).is_dir()
        yield from job_over(job, job.over(str(source), None)[1]).lines() if known else _roles(job)
    else:
        yield from _roles(job)
    rows, count = rows_at_hand(job)
    lora = lora_of(job)
    shape = estimate.shape_of(source, known_shape(job), rank=lora["rank"], targets=lora["target_modules"])
    wanted = {"batch_size": job.protocol.batch_size, "max_length": job.protocol.max_length}
    yield from estimate.lines(shape, num_experts=count, training=budgets(job), rows=rows, protocol=wanted, dtype=job.protocol.dtype)


def _roles(job: PaperJob) -> Iterator[str]:
    for seed in job.seeds:
        for role in roles_of(job.methods):
            yield f"{role}, seed {seed}: to be trained, unless a finished one of the same recipe lies in {job.runs}"
    yield f"evaluate {', '.join(job.methods)} with seed(s) {', '.join(map(str, job.seeds))}; finished cells are reused"


def known_shape(job: PaperJob) -> ModelShape | None:
    """Sizes of the base model that are known without looking at it: the profile's, or those of the one that is pretrained here."""
    if job.profile.shape is not None:
        return find_shape(job.profile.shape)
    if not job.profile.train_backbone:
        return None
    config = load_yaml(artifacts.config_path("backbone", job.setting))
    model = overridden(config["model"]["init_args"], job.setting.extra("backbone"), "--model.init_args.")
    return ModelShape(
        model_type="llama",
        vocab_size=config["data"]["init_args"].get("vocab_size", 4096),
        hidden_size=model["hidden_size"],
        intermediate_size=model["intermediate_size"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_heads"],
        num_key_value_heads=model["num_heads"],
        tie_word_embeddings=True,
    )


def overridden(values: Mapping[str, Any], options: Sequence[str], prefix: str) -> dict[str, Any]:
    """Whole numbers of a configuration after the options that change them."""
    given = dict(option.removeprefix(prefix).split("=", 1) for option in options if option.startswith(prefix))
    return {**values, **{key: int(value) for key, value in given.items() if value.isdigit()}}


def lora_of(job: PaperJob) -> dict[str, Any]:
    """Rank, targets and the other settings of the experts' adapters."""
    lora = load_yaml(artifacts.config_path("pool", job.setting))["model"]["init_args"]["lora"]
    changed = job.profile.options.get("pool", {}).get("model", {}).get("init_args", {}).get("lora", {})
    return {**lora, **changed}


def budgets(job: PaperJob) -> dict[str, dict[str, int]]:
    """Steps and rows of what is trained, and how many of it there are; a role with a budget of its own stands apart."""
    setting = job.setting
    rank = lora_of(job)["rank"]
    found: dict[str, dict[str, int]] = {}
    for kind in ("pool", "multitask", *RANKS, "trained"):
        recipe = load_yaml(artifacts.config_path(kind, setting))["data"]["init_args"]
        runs = len(job.seeds) * (rows_at_hand(job)[1] if kind == "pool" else 1)
        for role in (role for role in roles_of(job.methods) if kind_of(role) == kind):
            common, own = (overridden(recipe, setting.extra(name), "--data.init_args.") for name in (kind, role))
            name = role if own != common else "gates" if kind == "trained" else kind
            sizes = {key: int(own.get(key, 512)) for key in ("batch_size", "num_steps", "max_length")}
            found[name] = {**sizes, "size": RANKS.get(kind, rank) // rank, "runs": found.get(name, {"runs": 0})["runs"] + runs}
    return found


def has_rows(protocol: Protocol) -> bool:
    """Whether rows are read from a folder; else they come from the hub, and nothing of them is known before."""
    return (
        protocol.suite in {"nano", "paper_local", "real26_skills", "skills_confusable"}
        or protocol.data_root is not None
        or bool(os.environ.get(ENV_ROOT))
    )


def _hub_answers(protocol: Protocol) -> bool:
    """Whether the suite's rows can be had from it."""
    try:
        get_suite(protocol.suite, None)
    except TaskError:
        return False
    return True


def _require_tasks(protocol: Protocol) -> None:
    """Refuse tasks that the suite does not have, also where its rows are still on the hub.

    Raises:
        TaskError: With the nearest name.
    """
    if has_rows(protocol):
        get_suite(protocol.suite, protocol.data_root).select(protocol.tasks)
        return
    known = suite_names(protocol.suite)
    for name in protocol.tasks or ():
        if name not in known:
            raise TaskError(f"suite '{protocol.suite}' has no task '{name}'.{nearest(name, known)} Known: {', '.join(known)}.")


def rows_at_hand(job: PaperJob) -> tuple[list[int], int]:
    """Characters of the training rows under the data root, none if they would have to come from the hub; and the number of tasks."""
    if not has_rows(job.protocol):
        return [], len(job.protocol.tasks or suite_names(job.protocol.suite))
    suite = job.setting.chosen()
    return [len(item.prompt) + len(item.answer) for task in suite.tasks for item in task.rows.get("train", ())], len(suite.tasks)


def backbone_folder(job: PaperJob) -> tuple[str, str | None]:
    """The base model's folder and commit; pretrains it first if it is our own and not there yet."""
    artifact = job.backbone_artifact()
    if artifact is None:
        return (
            (resolve_backbone(None), None)
            if job.profile.backbone is None
            else resolved_backbone(job.profile.backbone, job.profile.revision)
        )
    if not artifact.ready:
        train("backbone", job.runs, setting=job.setting)
    return str(artifact.folder), None


def job_over(job: PaperJob, setting: Setting) -> ReproduceJob:
    """What has to be trained and evaluated over a base model that is there."""
    return make_job(job.methods, job.seeds, job.runs, fresh=False, setting=setting)
