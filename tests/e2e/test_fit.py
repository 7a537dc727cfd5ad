"""``dlplora fit``, ``validate`` and ``test`` from the command line: good runs leave everything, bad ones nothing."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from dlplora.cli.fit import main as fit
from dlplora.cli.fit import with_config_files
from dlplora.config import configs_root
from dlplora.errors import MethodError
from dlplora.inference.fused_model import FusedCausalLM
from dlplora.methods import registry
from dlplora.methods.base import FusionMethod, Metadata, MethodContext
from dlplora.modules.lora_bank import AdapterBank
from dlplora.training import other_base
from dlplora.training.frozen import base_name_of
from dlplora.types import PromptBatch
from tests.toy_tasks import NAMES, write_tasks


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("rows"))


def arguments(command: str, config: str, backbone: Path, rows: Path, out: Path, *more: str) -> list[str]:
    base = [command, "--config", f"configs/train/{config}.yaml", "--model.init_args.backbone", str(backbone)]
    base += ["--data.init_args.suite", "local:" + ",".join(NAMES), "--data.init_args.data_root", str(rows)]
    return [*base, "--model.init_args.export_folder", str(out / "export"), "--trainer.default_root_dir", str(out / "logs"), *more]


def test_fit_then_validate_then_test(tiny_llama_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data.init_args.num_steps", "6", "--data.init_args.batch_size", "4", "--trainer.log_every_n_steps", "1"]
    assert fit(arguments("fit", "experts", tiny_llama_folder, rows, tmp_path, *small)) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (done["command"], done["steps"]) == ("fit", 18)
    for name in NAMES:  # not the nano model, which the recipe is for
        config = json.loads((tmp_path / "export" / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tiny_llama_folder)
    (log,) = (tmp_path / "logs").rglob("metrics.csv")
    with log.open() as handle:
        logged = list(csv.DictReader(handle))
    assert any(row.get("val_loss") for row in logged)
    assert len([row for row in logged if row.get("train_loss")]) >= 3
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
    for command, key in (("validate", "val_loss"), ("test", "test_loss")):
        assert fit(arguments(command, "experts", tiny_llama_folder, rows, tmp_path, *small)) == 0
        again = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert again["command"] == command
        assert again["metrics"][key] > 0
        if command == "validate":
            assert again["metrics"][key] == pytest.approx(done["metrics"][key], rel=1e-4)


def test_print_config_can_be_run_again(tiny_llama_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        fit(arguments("fit", "router", tiny_llama_folder, rows, tmp_path, "--trainer.max_epochs", "2", "--print_config"))
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["max_epochs"] == 2
    assert config["data"]["init_args"]["data_root"] == str(rows)
    assert not (tmp_path / "export").exists()


def test_what_depends_on_the_base_model(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe of nano gets a rate for the size of another base model; options, later files and recipes of one's own keep theirs."""
    monkeypatch.setattr(other_base, "RATES", ((100, 1.0), (1e6, 2e-3), (1e12, 1e-9)))
    other = ["--model.init_args.backbone", str(tiny_llama_folder)]
    own, later = tmp_path / "own.yaml", tmp_path / "later.yaml"
    own.write_text((configs_root() / "train" / "experts.yaml").read_text())
    later.write_text("trainer: {accelerator: cpu}")
    unnamed = "--model.init_args.base_model_name=null"
    fitted = [unnamed, "--model.init_args.optimizer.lr=0.002", "--trainer.accelerator=auto", "--model.init_args.dtype=float32"]
    rate = ["--model.init_args.optimizer.lr", "7"]
    for config, options, added in (
        ("experts", [], []),
        ("experts", ["--model.init_args.backbone", "null"], []),
        ("experts", other, fitted),
        ("experts", [f"--model.backbone={tiny_llama_folder}", *rate], [one for one in fitted if "lr" not in one]),
        ("multitask_r208", other, [unnamed, "--model.init_args.optimizer.lr=0.001", *fitted[2:]]),
        ("router", other, fitted[2:]),
        ("fusion", ["--model.init_args.pretrained", str(tiny_llama_folder)], fitted[2:]),
        ("real_experts", other, fitted[:1]),
        (str(own), other, fitted[:1]),
    ):
        found = with_config_files(["fit", config, *options, "--config", str(later)])
        assert found[3:] == [*added, *options, "--config", str(later)], config
        said = capsys.readouterr().err
        assert ("lr 0.002, accelerator auto, dtype float32" in said) == (added == fitted)
        assert with_config_files(found) == found  # processes that a launcher starts see what it added
        assert capsys.readouterr().err == ""
    named = [base_name_of(one) for one in (None, "smollm2-135m", "org/name", str(tiny_llama_folder))]
    assert named == ["dlplora/nano", "HuggingFaceTB/SmolLM2-135M-Instruct", "org/name", str(tiny_llama_folder)]
    assert base_name_of("org/name", "dlplora/nano") == "org/name"  # a copy of a recipe in which only the base model was changed
    assert base_name_of("org/name", "org/other") == "org/other"


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--model.init_args.optimizer.lrr", "1"], "lr"),
        (["--model.init_args.optimizer.lr", "fast"], "lr"),
        (["--trainer.max_stepz", "1"], "max_steps"),
        (["--trainer.logger", "lightning.pytorch.loggers.WandbLogger"], "a package that is not installed: Requirement 'wandb"),
        (["--trainer.logger", "lightning.pytorch.loggers.NoSuchLogger"], "NoSuchLogger"),
        (["--data.init_args.num_steps", "0"], "'num_steps' must be at least 1"),
        (["--data.init_args.data_root", "/no/such/rows"], "/no/such/rows"),
        (["--data.init_args.suite", "local:petz"], "pets"),
        (["--data.init_args.tasks", "petz"], "pets"),
        (["--model.init_args.backbone", "/no/such/model"], "/no/such/model"),
        (["--model.init_args.lora.target_modules", "[q_prok]"], "q_prok"),
        (["--model.init_args.lora.rank", "0"], "'rank'"),
        (["--model.init_args.optimizer.lr", ".nan"], "needs lr > 0"),
        (["--model.init_args.optimizer.lr", ".inf"], "needs lr > 0"),
        (["--model.init_args.optimizer.weight_decay", ".nan"], "weight_decay >= 0"),
        (["--model.init_args.optimizer.betas", "[0.9, 2]"], "betas in [0, 1)"),
        (["--data.init_args.batch_size", "999999999999"], "'batch_size' must be at most 1,000,000"),
        (["--trainer.accumulate_grad_batches", "0"], "'accumulate_grad_batches' must be more than 0"),
        (["--trainer.val_check_interval", "0"], "'val_check_interval' must be more than 0"),
        (["--trainer.limit_train_batches", "0"], "nothing was trained"),
        (["--trainer.max_steps", "0"], "nothing was trained"),
        (["--ckpt_path", "/no/such.ckpt"], "/no/such.ckpt"),
        (["--config", "/no/such.yaml"], "/no/such.yaml"),
    ],
)
def test_bad_input_gives_one_line_and_leaves_nothing(
    more: list[str], part: str, tiny_llama_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(arguments("fit", "experts", tiny_llama_folder, rows, tmp_path, *more)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, captured.err
    assert part in lines[0]
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (tmp_path / "export").exists()


def test_one_experts_target_that_is_not_there(tiny_llama_folder: Path, rows: Path, tmp_path: Path, capsys: Any) -> None:
    more = ["--model.init_args.lora.target_modules", "[q_prok]", "--data.init_args.tasks", "pets"]
    assert fit(arguments("fit", "expert", tiny_llama_folder, rows, tmp_path, *more)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "lora: Target modules {'q_prok'} not found" in said[0]


def test_a_file_that_is_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for text, part in (
        ("[1]", "must hold a mapping"),
        ("a: [", "as YAML"),
        ("modle: 1", "model"),
        ("model: {class_path: dlplora.x.Y}", "dlplora.x"),
        ("model: {class_path: dlplora.training.expert.LitExpert, init_args: 5}", "model: 'init_args' must be dict"),
        ("data: {class_path: [5]}", "data: 'class_path' must be str"),
        ("seed_everything: ${oc.env:DLPLORA_SECRET}", "may refer to its own keys only"),
    ):
        (tmp_path / "it.yaml").write_text(text)
        assert fit(["fit", "--config", str(tmp_path / "it.yaml")]) == 2
        said = capsys.readouterr().err
        assert part in said
        assert said.count("\n") == 1
    monkeypatch.setenv("DLPLORA_SECRET", "hunter2")
    (tmp_path / "trainer.yaml").write_text("default_root_dir: ${oc.env:DLPLORA_SECRET}")
    assert fit(["fit", "--config", "configs/train/expert.yaml", "--trainer", str(tmp_path / "trainer.yaml")]) == 2
    said = capsys.readouterr().err
    assert "error: Unsupported interpolation type oc.env" in said
    assert said.count("\n") == 1
    assert fit(["fit", "--help"]) == 0
    assert "--config CONFIG" in capsys.readouterr().out
    assert fit([]) == 2


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendConfig:
    start: float = 0.0
    temperature: float = 1.0


class Blend(FusionMethod):
    """One learned weight vector over the experts, the same for every prompt."""

    name = "blend_for_test"
    metadata = Metadata(title="Learned blend", granularity="none", trainable=True, needs=("inputs", "trained"))
    Config = BlendConfig
    evaluation_params = ("temperature",)

    def prepare(self, bank: AdapterBank, context: MethodContext) -> AdapterBank:
        super().prepare(bank, context)
        if not hasattr(self, "scores"):
            self.scores = nn.Parameter(torch.full((bank.num_experts,), float(self.config.start)))
        return bank

    def route(self, prompts: PromptBatch) -> Tensor:
        return (self.scores / self.config.temperature).softmax(0).expand(len(prompts), -1)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        return batch["answer_loss"](self.route(batch["prompts"]))


@pytest.fixture
def blend(monkeypatch: pytest.MonkeyPatch) -> type[FusionMethod]:
    original = registry.available_methods
    monkeypatch.setattr(registry, "available_methods", lambda: {**original(), "blend_for_test": Blend})
    return Blend


def fusion_config(tmp_path: Path, backbone: Path, pool: Path, rows: Path) -> Path:
    content = {
        "seed_everything": 0,
        "model": {
            "class_path": "dlplora.training.fusion.LitFusion",
            "init_args": {
                "method": "blend_for_test",
                "pretrained": str(backbone),
                "pool": str(pool),
                "export_folder": str(tmp_path / "blend"),
            }
            | {"optimizer": {"lr": 0.2, "warmup_steps": 0}},
        },
        "data": {
            "class_path": "dlplora.data.datamodule.FusionDataModule",
            "init_args": {"suite": "local:" + ",".join(NAMES), "data_root": str(rows), "num_steps": 20, "batch_size": 4},
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False}
        | {"default_root_dir": str(tmp_path / "logs"), "enable_model_summary": False}
        | {"callbacks": [{"class_path": "dlplora.training.checkpoints.ResumeCheckpoint", "init_args": {"every_n_steps": 10}}]},
    }
    (tmp_path / "fusion.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "fusion.yaml"


def test_a_method_is_trained_saved_and_checked_when_loaded(
    blend: type[FusionMethod], tiny_llama_folder: Path, rows: Path, tmp_path: Path, make_adapter: Any
) -> None:
    for seed, name in enumerate(NAMES):
        make_adapter(tmp_path / "pool" / name, seed=seed)
        make_adapter(tmp_path / "other" / name, seed=seed + 10)
    before = AdapterBank.from_pool(tmp_path / "pool").checksum()
    config = fusion_config(tmp_path, tiny_llama_folder, tmp_path / "pool", rows)
    assert fit(["fit", "--config", str(config)]) == 0
    assert AdapterBank.from_pool(tmp_path / "pool").checksum() == before
    (newest,) = sorted((tmp_path / "logs" / "checkpoints").glob("*20.ckpt"))
    assert set(torch.load(newest, weights_only=True)["state_dict"]) == {"fused.method.scores"}

    def load(pool: str = "pool", **options: Any) -> FusedCausalLM:
        return FusedCausalLM.from_pretrained(tiny_llama_folder, pool=tmp_path / pool, method="blend_for_test", **options)

    trained = {"artifacts": {"trained": tmp_path / "blend"}}
    fused = load(**trained)
    assert isinstance(fused.method, Blend)
    scores = fused.method.scores.detach()
    assert float(scores.max() - scores.min()) > 0.05  # it learned something
    with pytest.raises(MethodError, match=r"has to be trained first: dlplora fit .*blend_for_test"):
        load()
    with pytest.raises(MethodError, match="made for a pool with checksum"):
        load("other", **trained)
    with pytest.raises(MethodError, match=r"trained with start=0.0, 'blend_for_test' asks for 2.0"):
        load(method_params={"start": 2.0}, **trained)
    warmer = load(method_params={"temperature": 50.0}, **trained)
    assert torch.equal(warmer.method.scores, fused.method.scores)  # type: ignore[arg-type]
    prompts = PromptBatch.from_texts(["the cat"], fused.tokenizer)
    assert float(warmer.method.route(prompts).detach().max()) < float(fused.method.route(prompts).detach().max())  # type: ignore[union-attr]
    fused.save_pretrained(tmp_path / "saved")
    again = FusedCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.method.scores, fused.method.scores)  # type: ignore[arg-type]


def test_a_method_without_parameters_is_not_trained(
    tiny_llama_folder: Path, rows: Path, tmp_path: Path, make_adapter: Any, capsys: Any
) -> None:
    for seed, name in enumerate(NAMES):
        make_adapter(tmp_path / "pool" / name, seed=seed)
    config = fusion_config(tmp_path, tiny_llama_folder, tmp_path / "pool", rows)
    assert fit(["fit", "--config", str(config), "--model.init_args.method", "avg_delta"]) == 2
    assert "nothing to fit" in capsys.readouterr().err


@pytest.mark.slow
def test_the_backbones_recipe_runs_and_exports_an_ordinary_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sizes = ["--model.init_args.hidden_size", "16", "--model.init_args.intermediate_size", "24", "--model.init_args.num_layers", "1"]
    sizes += ["--model.init_args.num_heads", "2", "--data.init_args.num_documents", "400", "--data.init_args.batch_size", "4"]
    out = ["--model.init_args.export_folder", str(tmp_path / "it"), "--trainer.default_root_dir", str(tmp_path / "logs")]
    steps = ["--trainer.max_steps", "6", "--trainer.val_check_interval", "3"]
    assert fit(["fit", "--config", "configs/train/nano_backbone.yaml", *sizes, *out, *steps]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "it")
    ids = tokenizer("Mia has a plum.", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    recipe = json.loads((tmp_path / "it" / "recipe.json").read_text())
    assert recipe["sha256"]
